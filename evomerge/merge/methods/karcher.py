"""karcher: the point of the sphere nearest to all sources (Karcher 1977; arXiv 2603.04972; mergekit `karcher`).

The mean direction c of the unit vectors u_i = x_i / |x_i|, all of equal weight, minimises the sum of squared angles.
From c = (sum_i u_i) / |sum_i u_i|, repeat

    v = mean_i  a_i / sin a_i * (u_i - cos a_i c),     cos a_i = u_i . c
    c = cos|v| c + sin|v| v / |v|

until |v| < `tol`, at most `max_iter` times (whole steps);   out = mean_i |x_i| * c.

The base takes no part unless it is one of the sources.  c stays in the span of the sources, so the iteration runs on
coefficients, and the Gram matrix gives lengths and angles.  Sources shorter than `tol` have no direction, but their
lengths count; if all are shorter, the result is 0.

Different from mergekit on purpose: a source opposite to c (within `tol`) is left out of the step, because no direction
to it is shorter than another; mergekit takes the one that its rounding errors give.
"""

import math

import numpy as np
from numpy.typing import NDArray

from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.measured import Gram, Measured
from evomerge.merge.methods.method import Method
from evomerge.merge.methods.plan import Blend

LEAST_TOL = 1e-7  # a float64 Gram matrix gives lengths of sums of unit vectors no more precisely


def plan(knobs: Knobs, measured: Measured) -> Blend:
    """Coefficients of the sources at their Karcher mean, times the mean length."""
    gram = measured.gram[1:, 1:]
    count, tol = len(gram), max(knobs.shared["tol"], LEAST_TOL)
    if count == 1:
        return Blend((1.0,))
    lengths = np.sqrt(np.diagonal(gram))
    if not np.isfinite(lengths).all():
        return Blend((1.0 / count,) * count)  # a source is not finite; the merged tensor is reported
    pointing = lengths > tol
    if not pointing.any():
        return Blend((0.0,) * count)
    directions = np.where(pointing, 1.0 / np.where(pointing, lengths, 1.0), 0.0)
    units = gram * np.outer(directions, directions)  # of those that have a direction; else 0
    centre = karcher_mean(units[np.ix_(pointing, pointing)], int(knobs.shared["max_iter"]), tol)
    found = np.zeros(count)
    found[pointing] = lengths.mean() * centre * directions[pointing]
    return Blend(tuple(found.tolist()))


def karcher_mean(units: Gram, max_iter: int, tol: float) -> NDArray[np.float64]:
    """The coefficients (M,) of the Karcher mean of M unit vectors.  units: their dot products, (M, M)."""
    count = len(units)

    def length(coefficients: NDArray[np.float64]) -> float:
        return math.sqrt(max(0.0, float(coefficients @ units @ coefficients)))

    centre = np.full(count, 1.0 / count)
    size = length(centre)
    centre = np.eye(count)[0] if size < tol else centre / size
    for _ in range(max_iter):
        cosines = (units @ centre).clip(-1.0, 1.0)
        angles = np.arccos(cosines)
        pulls = np.zeros(count)
        bent = (angles >= tol) & (angles <= math.pi - tol)
        pulls[bent] = angles[bent] / np.sin(angles[bent]) / count
        tangent = pulls - float(pulls @ cosines) * centre
        step = length(tangent)
        if step < tol:
            break
        centre = math.cos(step) * centre + math.sin(step) / step * tangent
        centre = centre / length(centre)
    return centre


METHOD = Method(
    "karcher",
    {"max_iter": Knob(10.0, 0.0, 1000.0, smooth=False), "tol": Knob(1e-5, 0.0, 1.0, smooth=False)},
    plan,
    without_base=1,
    measures=frozenset({"gram"}),
)
