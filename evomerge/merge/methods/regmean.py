"""regmean: the linear layer whose outputs are closest to each source's on that source's inputs (Jin et al. 2023).

    W = [sum_i w_i G_i]^-1 sum_i w_i G_i W_i          G_i = X_i^T X_i over the inputs of source i's layer

W is (in, out) here.  With an `alpha` of 1 it minimises sum_i w_i |X_i W - X_i W_i|^2.  The elements of G_i off the
diagonal are multiplied by `alpha`, which the paper does against solutions far from all sources (0 takes each input by
itself).  All other tensors are the weighted mean.  G_i comes from `evomerge statistics --kind regmean`.  Not in
mergekit 0.1.5.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.methods.plan import Blend, Derived


def plan(knobs: Knobs, measured: Measured) -> Blend | Derived:
    """The solution of the regression for a linear layer, the weighted mean for all other tensors."""
    weights = knobs.each["weight"]
    if measured.is_gathered and any(weights):
        return Derived("regmean", (1.0,), settings=(knobs.shared["alpha"], *weights))
    total = nonzero_divisor(sum(weights))
    return Blend(tuple(w / total for w in weights), of_task_vectors=True)


METHOD = Method(
    "regmean",
    {"weight": Knob(1.0, 0.0, each=True, smooth=False), "alpha": Knob(0.9, 0.0, 1.0, smooth=False)},
    plan,
    statistics="regmean",
)
