"""arcee_fusion: take over only what matters most (Arcee AI, no paper; mergekit `arcee_fusion`).

The importance of an element is its change times the divergence of its row's softmax:

    importance = |d| * KL(softmax x || softmax b)          per row of the last dimension, both softmaxes plus 1e-8
    out        = b + d where importance >= median + 1.5 (upper quartile - lower quartile), else b

Of several sources each is merged into the result of those before it, in their order, with that result as its b.

A change that is the same everywhere in a row does not change its softmax.  If all importances of a tensor are equal,
they are all at the threshold, and all changes are taken over.

Different from mergekit on purpose: quartiles come from all elements (mergekit draws a million at random from larger
tensors), and divergences are summed in float64 (in float32 those of close models are mostly rounding errors).
"""

from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import SparseBlend


def plan(knobs: Knobs, measured: Measured) -> SparseBlend:
    """The threshold.  The kernel gets the rows' divergences as planes."""
    return SparseBlend((1.0,), keep="importance", floors=(measured.importance(),))


METHOD = Method("arcee_fusion", {}, plan, in_turn=True, ordered=2)
