"""nuslerp: slerp between two sources by their weights, on their task vectors (Shoemake 1985; mergekit `nuslerp`).

    out = b + sin((1-t) a) / sin a * d_1 + sin(t a) / sin a * d_2,     t = w_2 / (w_1 + w_2), 1/2 if the sum is 0

a is the angle between the task vectors d_i = x_i - b: of the flattened tensors, or without `nuslerp_flatten` of each
row (a run along the last axis), or with `nuslerp_row_wise` too of each column.  A vector is one row.  Without
`task_vectors` the arc runs between the sources themselves, as mergekit's does when no `base_model` is given.

Different from mergekit on purpose: a tensor of three or more axes has as rows its slices along the first axis and as
columns those along the last, where mergekit takes runs along the last axis and the first.
"""

import numpy as np
from numpy.typing import NDArray

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, SliceBlend

PARALLEL = 2.0**-24  # a sin^2 that 1 - cos^2 in float32, mergekit's working type, cannot tell from 0
SHORTEST = 1e-7  # mergekit's floor for lengths: shorter vectors count as more and more orthogonal
NO_WEIGHT = 1e-6  # mergekit: weights that add up to less are equal


def plan(knobs: Knobs, measured: Measured) -> Blend | SliceBlend:
    """Coefficients of the two ends of the arc, one pair for the tensor or one for each slice."""
    first, second = knobs.each["weight"]
    t = 0.5 if abs(first + second) < NO_WEIGHT else second / (first + second)
    changes = bool(knobs.shared["task_vectors"])
    if knobs.shared["nuslerp_flatten"]:
        start, end = arc(measured.task_gram if changes else measured.gram[1:, 1:], t)
        return Blend((float(start), float(end)), of_task_vectors=changes)
    axis = -1 if knobs.shared["nuslerp_row_wise"] else 0
    grams = measured.row_grams(axis, of_task_vectors=changes)
    ends = arc(grams if changes else grams[:, 1:, 1:], t)
    return SliceBlend(ends, None, axis, of_task_vectors=changes)


def arc(gram: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """Coefficients (2, ...) at position t of arcs with the Gram matrices (..., 2, 2) of their ends.

    Where the ends are (anti)parallel there is no single arc, and the straight line is taken.
    """
    with np.errstate(invalid="ignore"):  # of a source that is not finite; the merged tensor will tell
        lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)).clip(SHORTEST)  # (..., 2)
        cosine = (gram[..., 0, 1] / lengths.prod(-1)).clip(-1.0, 1.0)
    straight = 1.0 - cosine**2 <= PARALLEL
    angle = np.arccos(np.where(straight, 0.0, cosine))
    start, end = (np.sin(part * angle) / np.sin(angle) for part in (1.0 - t, t))
    return np.stack([np.where(straight, 1.0 - t, start), np.where(straight, t, end)])


METHOD = Method(
    "nuslerp",
    {
        "weight": Knob(None, each=True),
        "nuslerp_row_wise": Knob(0.0, 0.0, 1.0, switch=True),
        "nuslerp_flatten": Knob(1.0, 0.0, 1.0, switch=True),
        "task_vectors": Knob(1.0, 0.0, 1.0, switch=True),
    },
    plan,
    sources=(2, 2),
    measures=frozenset({"task_gram"}),
)
