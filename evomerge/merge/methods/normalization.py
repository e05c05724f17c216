"""How `normalize` divides by the sum of the weights."""

from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.plan import Elect


def nonzero_divisor(total: float) -> float:
    """The divisor for a sum of weights; a sum closer to 0 than 1e-8 counts as 1 (mergekit's rule)."""
    return 1.0 if abs(total) < 1e-8 else total


def normalization(knobs: Knobs, elect: Elect) -> tuple[bool, float]:
    """`normalize` and `scale` of a sparse plan.

    Without an election the divisor is one number for the tensor, and goes into the scale.
    """
    normalize, scale = bool(knobs.shared["normalize"]), knobs.shared["lambda"]
    if elect or not normalize:
        return normalize, scale
    return False, scale / nonzero_divisor(sum(knobs.each["weight"]))
