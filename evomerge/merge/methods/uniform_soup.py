"""uniform_soup: the plain mean of the sources (Wortsman et al. 2022, the uniform soup).

    out = sum_i x_i / k          over k sources

The same as `linear` with equal weights, without a coefficient.
"""

from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """The same coefficient 1 / k for every source."""
    return Blend((1.0 / knobs.count,) * knobs.count)


METHOD = Method("uniform_soup", {}, plan, without_base=1)
