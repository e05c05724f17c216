"""fisher: average each weight by how much its model's answers depend on it (Matena & Raffel 2022).

    out = sum_i w_i F_i x_i / sum_i w_i F_i,  element by element

F_i is the diagonal of the empirical Fisher information, from `evomerge statistics --kind fisher`.  With `normalize`
each F_i is divided by its own root mean square over the whole model (the authors divide by the L2 norm, which is the
same up to a factor that all sources share); without it by the mean of these sizes.  What is then below FLOOR counts
as FLOOR, so that where no source has information the weights alone decide.  Not in mergekit 0.1.5.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.methods.plan import Blend, FisherBlend

FLOOR = 1e-6  # the authors'; theirs holds for the first model alone, which then wins where no model has information


def plan(knobs: Knobs, measured: Measured) -> Blend | FisherBlend:
    """Scales that bring every F_i near 1; the plain mean for tables that have no gradient."""
    weights = knobs.each["weight"]
    if not measured.is_gathered:
        total = nonzero_divisor(sum(weights))
        return Blend(tuple(w / total for w in weights), of_task_vectors=True)
    sizes = [measured.fisher_size(i) for i in range(len(weights))]
    if not knobs.shared["normalize"]:
        sizes = [sum(sizes) / len(sizes)] * len(sizes)
    return FisherBlend(weights, tuple(1.0 / s if s > 0 else 1.0 for s in sizes), FLOOR)


METHOD = Method(
    "fisher",
    {"weight": Knob(1.0, 0.0, each=True), "normalize": Knob(1.0, 0.0, 1.0, switch=True)},
    plan,
    statistics="fisher",
)
