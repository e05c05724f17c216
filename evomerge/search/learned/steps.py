"""Steps along the gradient, preconditioned by the whole matrix of its second moments (Agarwal et al. 2019).

    g_k    (D,) the gradient of step k; the last one is g_t
    F      (D, D) the decayed mean of g_k g_k^T
    m      (D,) the decayed mean of g_k
    d      (F + DAMPING tr(F) / D)^(-1/2) m
    step   rate f(t) d / rms(d)

Adam takes only the diagonal of F, as if no coefficient had to do with another.  In one model they do: what a layer
adds the next one can undo.  F has at most t directions, so nothing is larger than (t, D): with the rows of R the
gradients times the roots of their weights in F, K = R R^T, and a such that m = R^T a,

    d = R^T (K + DAMPING tr(K) / D)^(-1/2) a

Source: Efficient full-matrix adaptive regularization, arXiv:1806.02958, section 2.
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
DAMPING = 0.05
WARM_UP = 5  # steps until the rate is reached: the first gradients say little about F
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
    size = np.count_nonzero(gradients.any(0))
    age = np.arange(len(gradients))[::-1]
    first, second = (decay**age / np.sum(decay**age) for decay in (FIRST, SECOND))
    root = np.sqrt(second)
    rows = gradients * root[:, None]
    values, vectors = np.linalg.eigh(rows @ rows.T)
    values = np.maximum(values, 0.0)
    if not values.any():
        return np.zeros(gradients.shape[1])
    damped = values + DAMPING * values.sum() / size
    found: Vector = rows.T @ (vectors @ ((vectors.T @ (first / root)) / np.sqrt(damped)))
    length: float = np.sqrt(np.sum(found**2) / size)
    return found / length


def average(points: Sequence[Point]) -> Point:
    """The mean of points of one space; rounding never takes it out of their range, which may end at a bound."""
    values = {name: [point[name] for point in points] for name in points[0]}
    return {name: float(np.clip(np.mean(each), min(each), max(each))) for name, each in values.items()}
