"""task_arithmetic: add and subtract what fine-tuning changed (Ilharco et al. 2023; mergekit `task_arithmetic`).

    out = b + lambda * sum_i w_i (x_i - b)          with `normalize`: / sum_i w_i

A negative weight takes a capability away.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.methods.plan import Blend


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Coefficients of the task vectors: lambda w_i, divided by the sum of the weights if `normalize`."""
    weights = knobs.each["weight"]
    divisor = nonzero_divisor(sum(weights)) if knobs.shared["normalize"] else 1.0
    return Blend(tuple(knobs.shared["lambda"] * w / divisor for w in weights), of_task_vectors=True)


METHOD = Method(
    "task_arithmetic",
    {
        "weight": Knob(None, each=True),
        "lambda": Knob(1.0),
        "normalize": Knob(0.0, 0.0, 1.0, switch=True),
    },
    plan,
)
