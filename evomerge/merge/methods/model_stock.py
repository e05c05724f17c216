"""model_stock: between the base and the sources' mean, by the angle of the task vectors (Jang et al. 2024, eq. 2;
mergekit `model_stock`).

    out = t * mean_i x_i + (1 - t) b,     t = N c / (1 + (N - 1) c)

c is the mean cosine between the task vectors d_i = x_i - b of all pairs, of the flattened tensors or, with
`filter_wise`, of each row (a slice along the first axis; a vector is one row).  Task vectors that agree are trusted,
those that are orthogonal are noise and leave the base.  As in mergekit, products of lengths below 1e-6 count as 1e-6,
so that task vectors shorter than 0.001 are trusted less, and where the divisor is below 1e-6 the base stays.

Different from mergekit on purpose: with `filter_wise` a tensor of three or more axes has one t for each slice along its
first axis, where mergekit has one for each run along the last.
"""

import numpy as np
from numpy.typing import NDArray

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend, SliceBlend

SHORT = 1e-6  # mergekit's floor for |d_i| |d_j|
SINGULAR = 1e-6  # mergekit: below this the ratio t is not defined


def plan(knobs: Knobs, measured: Measured) -> Blend | SliceBlend:
    """t / N for every task vector, one number for the tensor or one for each row."""
    if not knobs.shared["filter_wise"]:
        gram = measured.task_gram
        count = len(gram)
        return Blend((float(ratio(gram)) / count,) * count, of_task_vectors=True)
    grams = measured.row_grams(0, of_task_vectors=True)
    count = grams.shape[-1]
    return SliceBlend(np.tile(ratio(grams) / count, (count, 1)), None, axis=0, of_task_vectors=True)


def ratio(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """t (...) from the Gram matrices (..., N, N) of the task vectors."""
    count = gram.shape[-1]
    with np.errstate(invalid="ignore"):  # of a source that is not finite; the merged tensor will tell
        lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))  # (..., N)
        products = (lengths[..., :, None] * lengths[..., None, :]).clip(SHORT)
        pairs = np.triu_indices(count, 1)
        cosine = (gram / products)[..., *pairs].clip(-1.0, 1.0).mean(-1)
    divisor = 1.0 + (count - 1) * cosine
    singular = np.abs(divisor) < SINGULAR
    found: NDArray[np.float64] = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
    return found


METHOD = Method(
    "model_stock",
    {"filter_wise": Knob(0.0, 0.0, 1.0, switch=True)},
    plan,
    sources=(2, None),
    measures=frozenset({"task_gram"}),
)
