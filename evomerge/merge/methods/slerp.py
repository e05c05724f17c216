"""slerp: walk the great circle from one model to another (Shoemake 1985; mergekit `slerp`).

    out = sin((1-t) a) / sin a * x_0 + sin(t a) / sin a * x_1,     a the angle between the flattened tensors

With one source the arc starts at the base; with two it runs from the first to the second.  Only angles and
lengths enter the coefficients, so the Gram matrix is all a plan needs.
"""

import math

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend

PARALLEL = 0.9995  # mergekit's `dot_threshold`: closer than this the arc is replaced by its chord


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Coefficients at position `t` on the arc: 0 is its start, 1 its end.

    (Anti)parallel tensors and zero tensors have no single arc; there the straight line is used.
    """
    gram, t = measured.gram, knobs.shared["t"]
    first, second = len(gram) - 2, len(gram) - 1
    lengths = math.sqrt(gram[first, first]) * math.sqrt(gram[second, second])
    cosine = min(1.0, max(-1.0, float(gram[first, second]) / lengths)) if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        start, end = 1.0 - t, t
    else:
        angle = math.acos(cosine)
        start, end = math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return Blend((end,), base=start) if first == 0 else Blend((start, end))


METHOD = Method(
    "slerp", {"t": Knob(None, 0.0, 1.0)}, plan, sources=(1, 2), without_base=2, measures=frozenset({"gram"})
)
