"""regmean: the linear layer that answers most like every source on that source's own inputs (Jin et al. 2023).

    W = [sum_i w_i G_i]^-1 sum_i w_i G_i W_i          G_i = X_i^T X_i over the inputs of source i's layer

W is (in, out) here.  It minimises sum_i w_i |X_i W - X_i W_i|^2 when `alpha` is 1; the off-diagonal elements of G_i
are multiplied by `alpha`, the paper's remedy against a solution that no source is near (0 looks at each input alone).
All other tensors take the weighted mean.  G_i comes from `evomerge statistics --kind regmean`.  Not in mergekit 0.1.5.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.methods.plan import Blend, Derived


def plan(knobs: Knobs, measured: Measured) -> Blend | Derived:
    """One solved matrix for a linear layer, the weighted mean for everything else."""
    weights = knobs.each["weight"]
    if measured.is_gathered and any(weights):
        return Derived("regmean", (1.0,), settings=(knobs.shared["alpha"], *weights))
    total = nonzero_divisor(sum(weights))
    return Blend(tuple(w / total for w in weights), of_task_vectors=True)


METHOD = Method(
    "regmean",
    {"weight": Knob(1.0, 0.0, each=True), "alpha": Knob(0.9, 0.0, 1.0)},
    plan,
    statistics="regmean",
)
