"""linear: the weighted average of the sources (model soups: Wortsman et al. 2022; mergekit `linear`).

    out = sum_i w_i x_i / sum_i w_i          without `normalize`: no divisor

The uniform soup is `linear` with equal weights.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.methods.plan import Blend


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Weights of the sources, divided by their sum if `normalize`."""
    weights = knobs.each["weight"]
    divisor = nonzero_divisor(sum(weights)) if knobs.shared["normalize"] else 1.0
    return Blend(tuple(w / divisor for w in weights))


METHOD = Method(
    "linear",
    {"weight": Knob(1.0, each=True), "normalize": Knob(1.0, 0.0, 1.0, switch=True)},
    plan,
    without_base=1,
)
