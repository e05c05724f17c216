"""della and della_linear: drop at random, small changes sooner (Deep et al. 2024; mergekit `della`, `della_linear`).

Within each row of a task vector (a vector is one row) the chance of being kept rises with the rank of |d|, from
density - epsilon for the smallest to density + epsilon for the largest.  Ranks are divided into 256 levels;
magnitudes are ranked by |d| cut to a bfloat16.

    out = b + lambda * sum_i w_i g_i m_i d_i          with `normalize`: / sum_i w_i
    p_j = density - epsilon + 2 epsilon (floor(256 rank_j / n) + 1/2) / 256,          g: see rescale.py

della elects signs as ties does, and divides by the weights that agree.

Different from mergekit on purpose: masks are a hash, as in dare; an epsilon too large for its density is reduced
(mergekit raises an error), so that no search fails there; `rescale` restores the expectation unless it is `l1`; a row
of a tensor with three or more dimensions is a slice along the first, while mergekit ranks along the second.
"""

import math
from functools import lru_cache, partial

from evomerge.merge.methods.density import chance
from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import normalization
from evomerge.merge.methods.plan import Chance, Elect, SparseBlend
from evomerge.merge.methods.rescale import RESCALE, gain

KNOBS = {
    "weight": Knob(None, each=True),
    "density": Knob(1.0, 0.0, 1.0, each=True, smooth=False),
    "epsilon": Knob(0.15, 0.0, 1.0, each=True, smooth=False),
    "lambda": Knob(1.0),
    "normalize": Knob(1.0, 0.0, 1.0, switch=True),
    "rescale": RESCALE,
}


@lru_cache(maxsize=4096)
def rank_chance(density: float, epsilon: float) -> Chance:
    """Chances around `density` that rise by 2 epsilon from the lowest rank to the highest, within (0, 1)."""
    epsilon = min(epsilon, density, 1.0 - density)
    step = math.floor(2 * epsilon / 256 * 2**32)
    low = round(density * 2**32 - 127.5 * step)  # the mean over the 256 levels is the density
    return Chance(low, step) if step and low >= 1 and low + 255 * step < 2**32 else chance(density)


def plan(knobs: Knobs, measured: Measured, elect: Elect) -> SparseBlend:
    """Masks by rank."""
    weights, how = knobs.each["weight"], knobs.shared["rescale"]
    chances = tuple(map(rank_chance, knobs.each["density"], knobs.each["epsilon"]))
    normalize, scale = normalization(knobs, elect)
    return SparseBlend(
        weights=weights,
        keep="rank" if any(c.step for c in chances) else "random",
        gains=tuple(gain(how, measured, i, c) if weights[i] else 1.0 for i, c in enumerate(chances)),
        chances=chances,
        elect=elect,
        normalize=normalize,
        scale=scale,
    )


LINEAR = Method(
    "della_linear",
    KNOBS | {"normalize": Knob(0.0, 0.0, 1.0, switch=True)},
    partial(plan, elect=None),
    measures=frozenset({"ranks"}),
)
DELLA = Method("della", KNOBS, partial(plan, elect="weighted"), measures=frozenset({"ranks"}))
