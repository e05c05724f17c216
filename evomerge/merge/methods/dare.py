"""dare_linear and dare_ties: drop at random and rescale (Yu et al. 2024; mergekit `dare_linear`, `dare_ties`).

Each element of a task vector is kept with probability `density` and, with `rescale`, divided by it (g = 1 / density),
so that its expectation stays; dare_ties then elects signs as ties does.

    out = b + lambda * sum_i w_i g_i m_i d_i          with `normalize`: / sum_i w_i (of the agreeing)

Different from mergekit on purpose: the masks are a hash of (seed, tensor, source, element), so they do not depend
on device, order or process, and the mask at density 0.4 lies inside the mask at 0.5; `rescale` divides by the
density as the paper does, while mergekit restores the L1 norm of the task vector (here `rescale: l1`, see rescale.py).
"""

from functools import partial

from evomerge.merge.methods.density import chance
from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import normalization
from evomerge.merge.methods.plan import Elect, SparseBlend
from evomerge.merge.methods.rescale import RESCALE, gain

KNOBS = {
    "weight": Knob(None, each=True),
    "density": Knob(1.0, 0.0, 1.0, each=True, smooth=False),
    "lambda": Knob(1.0),
    "normalize": Knob(0.0, 0.0, 1.0, switch=True),
    "rescale": RESCALE,
}


def plan(knobs: Knobs, measured: Measured, elect: Elect) -> SparseBlend:
    """Random masks, gain 1 / density."""
    weights, density = knobs.each["weight"], knobs.each["density"]
    normalize, scale = normalization(knobs, elect)
    chances, how = tuple(map(chance, density)), knobs.shared["rescale"]
    return SparseBlend(
        weights=weights,
        keep="random",
        gains=tuple(gain(how, measured, i, c) if weights[i] else 1.0 for i, c in enumerate(chances)),
        chances=chances,
        elect=elect,
        normalize=normalize,
        scale=scale,
    )


LINEAR = Method("dare_linear", KNOBS, partial(plan, elect=None))
TIES = Method("dare_ties", KNOBS, partial(plan, elect="weighted"))
