"""passthrough: one source as it is, or scaled (mergekit `passthrough`).

    out = scale * x

At scale 1 and in the source's own type the result has the source's bits.
"""

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend


def plan(knobs: Knobs, measured: Measured) -> Blend:
    return Blend(knobs.each["scale"])


METHOD = Method("passthrough", {"scale": Knob(1.0, each=True)}, plan, sources=(1, 1), without_base=1)
