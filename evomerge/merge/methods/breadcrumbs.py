"""breadcrumbs and breadcrumbs_ties: keep the middle (Davari & Belilovsky 2023; mergekit names the same).

Of the n elements of a task vector the floor(gamma n) largest, the outliers, and enough of the smallest are dropped
that floor(density n) stay; where gamma + density exceeds 1, fewer outliers go.  A density of 1 keeps everything.

    out = b + lambda * sum_i w_i m_i d_i          with `normalize`: / sum_i w_i

breadcrumbs_ties elects signs as ties does, and divides by the weights that agree.

Different from mergekit on purpose: elements as large as the largest or smallest kept one are all kept (mergekit keeps
some of them, by a sort that is not stable).
"""

from functools import partial

from evomerge.merge.methods.density import smallest_kept
from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.normalization import normalization
from evomerge.merge.methods.plan import Elect, SparseBlend

KNOBS = {
    "weight": Knob(None, each=True),
    "density": Knob(1.0, 0.0, 1.0, each=True, smooth=False),
    "gamma": Knob(0.01, 0.0, 1.0, each=True, smooth=False),
    "lambda": Knob(1.0),
    "normalize": Knob(0.0, 0.0, 1.0, switch=True),
}


def band(density: float, gamma: float, measured: Measured, source: int) -> tuple[float, float]:
    """The smallest and the largest magnitude that are kept; with a floor of infinity nothing is."""
    n = measured.elements
    kept, outliers = int(density * n), int(gamma * n)
    if density >= 1.0:
        return 0.0, float("inf")
    if kept == 0:
        return float("inf"), 0.0
    dropped = max(0, n - kept - outliers)  # of the smallest
    top = n - dropped - kept
    ceiling = measured.magnitude(source, top + 1) if top else float("inf")
    return smallest_kept(measured, source, n - dropped), ceiling


def plan(knobs: Knobs, measured: Measured, elect: Elect) -> SparseBlend:
    """Masks by magnitude."""
    weights, density, gamma = knobs.each["weight"], knobs.each["density"], knobs.each["gamma"]
    bands = [band(p, g, measured, i) for i, (p, g) in enumerate(zip(density, gamma, strict=True))]
    normalize, scale = normalization(knobs, elect)
    return SparseBlend(
        weights=weights,
        keep="band",
        floors=tuple(low for low, _ in bands),
        ceilings=tuple(high for _, high in bands),
        elect=elect,
        normalize=normalize,
        scale=scale,
    )


LINEAR = Method("breadcrumbs", KNOBS, partial(plan, elect=None), measures=frozenset({"magnitudes"}))
TIES = Method("breadcrumbs_ties", KNOBS, partial(plan, elect="weighted"), measures=frozenset({"magnitudes"}))
