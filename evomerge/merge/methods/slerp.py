"""slerp: walk the great circle from one model to another (Shoemake 1985; mergekit `slerp`).

    out = sin((1-t) a) / sin a * x_0 + sin(t a) / sin a * x_1,     a the angle between the flattened tensors

With one source the arc goes from the base to it; with two, from the first to the second.  Each further source is merged
into the result so far, in the order of the sources:

    out = slerp(... slerp(slerp(x_0, x_1, t), x_2, t) ..., x_N, t)

The coefficients depend on lengths and angles alone, and those of a blend follow from the sources' own.  So the Gram
matrix is all that the planner needs, and no step is ever computed: the steps together are one blend.
"""

import math

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend

PARALLEL = 0.9995  # mergekit's `dot_threshold`: closer than this the arc is replaced by its chord


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Coefficients at position `t` on the arc of each step: 0 is its start, 1 its end."""
    gram, t = measured.gram, knobs.shared["t"]
    first = 0 if len(gram) == 2 else 1
    found = [1.0]  # of the models from `first` on
    for end in range(first + 1, len(gram)):
        models = list(enumerate(found, first))
        square = sum(c * d * float(gram[i, j]) for i, c in models for j, d in models)
        start, share = arc(square, float(gram[end, end]), sum(c * float(gram[i, end]) for i, c in models), t)
        found = [start * c for c in found] + [share]
    return Blend(tuple(found[1:]), base=found[0]) if first == 0 else Blend(tuple(found))


def arc(first: float, second: float, product: float, t: float) -> tuple[float, float]:
    """Coefficients of the two ends of an arc.  first, second: their squared lengths.  product: their dot product.

    Between parallel, opposite or zero tensors there is no single arc; there the straight line is used.
    """
    lengths = math.sqrt(first) * math.sqrt(second)
    cosine = min(1.0, max(-1.0, product / lengths)) if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


METHOD = Method(
    "slerp",
    {"t": Knob(None, 0.0, 1.0)},
    plan,
    without_base=2,
    measures=frozenset({"gram"}),
    ordered=3,
)
