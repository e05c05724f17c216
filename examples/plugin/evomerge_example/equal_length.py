"""equal_length: task arithmetic whose task vectors have the same length.

    out = b + lambda * sum_i w_i (m / |d_i|) d_i          m = the mean of the |d_i|

In plain task arithmetic a source that was trained longer has a longer task vector and so more influence at the same
weight.  Here equal weights mean equal influence.
"""

import numpy as np

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Coefficients of the task vectors.  A source that does not change the tensor has none."""
    lengths = np.sqrt(measured.task_gram.diagonal())  # (N,)
    factors = np.divide(lengths.mean(), lengths, out=np.zeros_like(lengths), where=lengths > 0)
    weights = np.array(knobs.each["weight"])
    return Blend(tuple((knobs.shared["lambda"] * weights * factors).tolist()), of_task_vectors=True)


METHOD = Method(
    "equal_length",
    {"weight": Knob(None, each=True), "lambda": Knob(1.0)},
    plan,
    measures=frozenset({"task_gram"}),
    keeps_parent=False,
)
