"""Steps along the gradient, as Adam takes them, without what the coefficients' gradients have in common.

    g_k    (D,) the gradient of step k; the last one is g_t
    v      (D,) the decayed mean of g_k^2, and h_k = g_k / sqrt(v)
    h      (D,) the decayed mean of h_k: the step of Adam (Kingma and Ba 2015)
    C      (D, D) the decayed mean of h_k h_k^T: the correlations of the coefficients' gradients
    d      (C + DAMPING I)^(-1/2) h
    step   rate f(t) d / rms(d)

Adam steps as if no coefficient had to do with another.  In one model they do: what a layer adds the next one can undo.
Along directions in which many gradients agree the steps become smaller, and along all others larger, as with the whole
matrix of second moments (Agarwal et al. 2019, arXiv:1806.02958).  C has at most t directions, so nothing is larger than
(t, D): with the rows of R the h_k times the roots of their weights in C, and a such that h = R^T a,

    d = R^T (R R^T + DAMPING I)^(-1/2) a
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution

from evomerge.search.space.space import Point

Vector = NDArray[np.float64]

FIRST, SECOND = 0.8, 0.97  # decay of the mean gradient and of the second moments
DAMPING = 0.05  # the variance of each h_k is 1
WARM_UP = 5  # steps until the rate is reached: the first gradients say little about C
LAST = 0.05  # f at the end


@dataclass
class Climber:
    """Takes the steps of one climb, within the bounds.

    axes: the bounds of each of the D coefficients by name, in order.
    rate: the root mean square of a step over the coefficients that have a gradient, in their units.
    steps: how many there will be; the rate falls along half a cosine.
    gradients: of the steps so far.
    """

    axes: Mapping[str, FloatDistribution]
    rate: float
    steps: int
    gradients: list[Vector] = field(default_factory=list)

    def step(self, point: Point, gradient: Mapping[str, float]) -> Point:
        """The next point.  gradient: the derivative by each coefficient of what is to rise, at `point`."""
        self.gradients.append(np.array([gradient[name] for name in self.axes]))
        taken = len(self.gradients)
        cosine = (1 + math.cos(math.pi * min(1.0, (taken - 1) / self.steps))) / 2
        rate = self.rate * min(1.0, taken / WARM_UP) * (LAST + (1 - LAST) * cosine)
        moved = np.array([point[name] for name in self.axes]) + rate * direction(np.array(self.gradients))
        low = np.array([axis.low for axis in self.axes.values()])
        high = np.array([axis.high for axis in self.axes.values()])
        return dict(zip(self.axes, np.clip(moved, low, high).tolist(), strict=True))


def direction(gradients: Vector) -> Vector:
    """d / rms(d), (D,), over the coefficients that have a gradient; 0 if none has.

    gradients: (t, D), of all steps so far.
    """
    here = np.any(gradients != 0.0, axis=0)
    found = np.zeros(len(here))
    if not here.any():
        return found
    age = np.arange(len(gradients))[::-1]
    first, second = (decay**age / np.sum(decay**age) for decay in (FIRST, SECOND))
    g = gradients[:, here] / np.abs(gradients[:, here]).max()
    rows = g / np.sqrt(second @ g**2) * np.sqrt(second)[:, None]
    values, vectors = np.linalg.eigh(rows @ rows.T)
    damped = np.sqrt(np.maximum(values, 0.0) + DAMPING)
    d = rows.T @ (vectors @ ((vectors.T @ (first / np.sqrt(second))) / damped))
    length = np.sqrt(np.mean(d**2))
    found[here] = d / length if length > 0.0 else 0.0
    return found


def average(points: Sequence[Point]) -> Point:
    """The mean of points of one space; rounding never takes it out of their range, which may end at a bound."""
    values = {name: [point[name] for point in points] for name in points[0]}
    return {name: float(np.clip(np.mean(each), min(each), max(each))) for name, each in values.items()}
