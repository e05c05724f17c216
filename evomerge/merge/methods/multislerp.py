"""multislerp: slerp of any number of sources (Goddard, "Multi-SLERP"; mergekit `multislerp`).

Unit vectors u_i = d_i / (|d_i| + eps) of the task vectors are averaged on the sphere: tangent vectors at the direction
of their weighted mean m = sum_i w_i u_i are averaged, and the exponential map leads back to the sphere.

    out = b + (sum_i w_i |d_i|) m / |m|          w_i divided by their sum with `normalize_weights`

This short form is exact.  With c = m / |m| the weighted tangent is sum_i w_i (u_i - (u_i . c) c) = m - (m . c) c,
which is 0, so the exponential map moves nowhere; mergekit adds `eps` to its length, which leaves a factor cos(eps).
Without `task_vectors` the sources themselves are averaged, as mergekit does when no `base_model` is given.  One source
is its own average.

Different from mergekit on purpose: if m vanishes (sources that cancel, task vectors that are all 0), the result is the
weighted sum sum_i w_i d_i for any number of sources; mergekit does so for two, and otherwise fails.  m counts as
vanishing where float32 has only rounding errors, not only below `eps`.  Weights with a sum of 0 are not normalised;
mergekit divides by 0.
"""

import math

import numpy as np

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.methods.plan import Blend

VANISHING = 2.0**-22  # |m| over sum |w_i|: less of it is rounding in float32, and its direction is arbitrary


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Coefficients of the task vectors, or of the sources, at their barycentre on the sphere."""
    changes, eps = bool(knobs.shared["task_vectors"]), knobs.shared["eps"]
    weights = np.array(knobs.each["weight"])
    if len(weights) == 1:
        return Blend((1.0,))
    if knobs.shared["normalize_weights"]:
        weights = weights / nonzero_divisor(float(weights.sum()))
    gram = measured.task_gram if changes else measured.gram[1:, 1:]
    lengths = np.sqrt(np.diagonal(gram))
    units = np.where(lengths == 0.0, 0.0, weights / np.where(lengths == 0.0, 1.0, lengths + eps))  # m = units . d
    with np.errstate(invalid="ignore"):  # a source may be infinite or NaN; then the merged tensor is reported
        size = math.sqrt(max(0.0, float(units @ gram @ units)))  # |m|
    if size <= max(eps, VANISHING * float(np.abs(weights).sum())):
        found = weights
    else:
        found = units * (float(weights @ lengths) / size * math.cos(eps))
    return Blend(tuple(found.tolist()), of_task_vectors=changes)


METHOD = Method(
    "multislerp",
    {
        "weight": Knob(None, each=True),
        "normalize_weights": Knob(1.0, 0.0, 1.0, switch=True),
        "eps": Knob(1e-8, 0.0, 1.0, smooth=False),
        "task_vectors": Knob(1.0, 0.0, 1.0, switch=True),
    },
    plan,
    measures=frozenset({"task_gram"}),
)
