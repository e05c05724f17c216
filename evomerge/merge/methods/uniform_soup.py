"""uniform_soup: the plain mean of the sources (Wortsman et al. 2022, the uniform soup).

    out = sum_i x_i / k          over k sources

The same as `linear` with equal weights, without a knob to get wrong.
"""

from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Every source by the same share."""
    return Blend((1.0 / knobs.count,) * knobs.count)


METHOD = Method("uniform_soup", {}, plan, without_base=1)
