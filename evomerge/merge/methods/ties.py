"""ties: trim, elect sign, merge what agrees (Yadav et al. 2023; mergekit `ties`).

Trim each task vector to its `density` share of largest magnitude, k = max(1, floor(density n)); elect for every
element the sign of the weighted sum (a sum of 0 counts as +); average the weighted values of that sign.

    out = b + lambda * sum_agreeing w_i d_i / sum_agreeing w_i          without `normalize`: no divisor

Different from mergekit on purpose: elements as large as the k-th are all kept (`torch.topk` keeps some of them,
depending on the device), so that the same recipe gives the same bits everywhere.
"""

from evomerge.merge.methods.density import kept_count, smallest_kept
from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import SparseBlend


def plan(knobs: Knobs, measured: Measured) -> SparseBlend:
    """Trimming by magnitude, election, division by the agreeing weights."""
    ranks = [kept_count(p, measured.elements) for p in knobs.each["density"]]
    return SparseBlend(
        weights=knobs.each["weight"],
        keep="magnitude",
        floors=tuple(smallest_kept(measured, i, k) for i, k in enumerate(ranks)),
        elect="weighted",
        normalize=bool(knobs.shared["normalize"]),
        scale=knobs.shared["lambda"],
    )


METHOD = Method(
    "ties",
    {
        "weight": Knob(None, each=True),
        "density": Knob(1.0, 0.0, 1.0, each=True, smooth=False),
        "lambda": Knob(1.0),
        "normalize": Knob(1.0, 0.0, 1.0, switch=True),
    },
    plan,
    measures=frozenset({"magnitudes"}),
)
