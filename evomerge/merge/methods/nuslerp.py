"""nuslerp: slerp between sources by their weights, on their task vectors (Shoemake 1985; mergekit `nuslerp`).

    out = b + sin((1-t) a) / sin a * d_1 + sin(t a) / sin a * d_2,     t = w_2 / (w_1 + w_2), 1/2 if the sum is 0

a is the angle between the task vectors d_i = x_i - b: of the flattened tensors, or without `nuslerp_flatten` of each
row (a run along the last axis), or with `nuslerp_row_wise` too of each column.  A vector is one row.  Without
`task_vectors` the arc runs between the sources themselves, as mergekit's does when no `base_model` is given.

Each further source is merged into the result so far, in the order of the sources.  The result weighs as much as the
sources in it: its t is w_k / (w_1 + ... + w_k).

Different from mergekit on purpose: the rows of a tensor of three or more axes are its slices along the first axis, and
its columns those along the last; mergekit takes runs along the last axis and the first.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, SliceBlend

PARALLEL = 2.0**-24  # a sin^2 that is 0 if computed as 1 - cos^2 in float32, mergekit's working type
SHORTEST = 1e-7  # mergekit's floor for lengths; so the shorter a vector, the more it counts as orthogonal
NO_WEIGHT = 1e-6  # mergekit: weights with a smaller sum count as equal


def plan(knobs: Knobs, measured: Measured) -> Blend | SliceBlend:
    """Coefficients of the sources, one set for the tensor or one for each slice."""
    changes = bool(knobs.shared["task_vectors"])
    if knobs.shared["nuslerp_flatten"]:
        gram = measured.task_gram if changes else measured.gram[1:, 1:]
        return Blend(tuple(map(float, one_by_one(gram, knobs.each["weight"]))), of_task_vectors=changes)
    axis = -1 if knobs.shared["nuslerp_row_wise"] else 0
    grams = measured.row_grams(axis, of_task_vectors=changes)
    found = one_by_one(grams if changes else grams[:, 1:, 1:], knobs.each["weight"])
    return SliceBlend(found, None, axis, of_task_vectors=changes)


def one_by_one(gram: NDArray[np.float64], weights: Sequence[float]) -> NDArray[np.float64]:
    """Coefficients (N, ...) of N sources with the Gram matrices (..., N, N), each merged into those before it."""
    found, total = np.ones((1, *gram.shape[:-2])), weights[0]
    for k, weight in enumerate(weights[1:], 1):
        total += weight
        t = 0.5 if abs(total) < NO_WEIGHT else weight / total
        ends = np.zeros((*gram.shape[:-2], 2, 2))  # the Gram matrix of the result so far and the next source
        ends[..., 0, 0] = np.einsum("i...,j...,...ij->...", found, found, gram[..., :k, :k])
        ends[..., 0, 1] = ends[..., 1, 0] = np.einsum("i...,...i->...", found, gram[..., :k, k])
        ends[..., 1, 1] = gram[..., k, k]
        start, end = arc(ends, t)
        found = np.concatenate([start * found, end[None]])
    return found


def arc(gram: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """Coefficients (2, ...) at position t of arcs with the Gram matrices (..., 2, 2) of their ends.

    Where the ends are (anti)parallel there is no single arc, and the straight line is taken.
    """
    with np.errstate(invalid="ignore"):  # a source may be infinite or NaN; then the merged tensor is reported
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
    sources=(2, None),
    measures=frozenset({"task_gram"}),
    ordered=3,
)
