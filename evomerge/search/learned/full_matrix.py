"""Steps along the gradient, preconditioned by the whole matrix of its second moments.

    g_k    (D,) the gradient of step k, the last one is g_t
    F      (D, D) the decayed mean of g_k g_k^T
    m      (D,) the decayed mean of g_k
    d      (F + DAMPING tr(F) / D)^(-1/2) m
    step   rate f(t) d / rms(d)

Adam takes only the diagonal of F, as if no two coefficients had to do with each other.  Those of one model do: what
one layer gives the next one can undo.  F has no more than t directions, so nothing is larger than (t, D): with R the
gradients as rows, times the roots of their weights in F, K = R R^T, and a with m = R^T a,

    d = R^T (K + DAMPING tr(K) / D)^(-1/2) a

Source: Agarwal et al. 2019, Efficient full-matrix adaptive regularization, arXiv:1806.02958.
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
LEAST = 0.05  # of the rate at the end


@dataclass
class FullMatrix:
    """Climbs: a step goes along the gradient, and stays within the bounds.

    axes: the bounds of each of the D coefficients by name, in order.
    rate: the root mean square of a step, in units of the coefficients; it falls along half a cosine.
    steps: how many there are.
    """

    axes: Mapping[str, FloatDistribution]
    rate: float
    steps: int
    gradients: list[Vector] = field(default_factory=list)

    def step(self, point: Point, gradient: Mapping[str, float]) -> Point:
        """The next point.  gradient: the derivative by each coefficient of what is to rise, at `point`."""
        self.gradients.append(np.array([gradient[name] for name in self.axes]))
        moved = np.array([point[name] for name in self.axes]) + self.rate * self.fall() * direction(self.gradients)
        low = np.array([axis.low for axis in self.axes.values()])
        high = np.array([axis.high for axis in self.axes.values()])
        return dict(zip(self.axes, np.clip(moved, low, high).tolist(), strict=True))

    def fall(self) -> float:
        """f(t), by which the rate of the last step is multiplied."""
        taken = len(self.gradients)
        cosine = (1 + math.cos(math.pi * min(1.0, (taken - 1) / self.steps))) / 2
        return min(1.0, taken / WARM_UP) * (LEAST + (1 - LEAST) * cosine)


def direction(gradients: Sequence[Vector]) -> Vector:
    """d / rms(d), (D,); 0 if all gradients are 0.  gradients: of all steps so far."""
    rows = np.array(gradients)  # (t, D)
    age = np.arange(len(rows))[::-1]
    first, second = (decay**age / np.sum(decay**age) for decay in (FIRST, SECOND))
    root = np.sqrt(second)
    scaled = rows * root[:, None]
    values, vectors = np.linalg.eigh(scaled @ scaled.T)
    values = np.maximum(values, 0.0)
    if not values.any():
        return np.zeros(rows.shape[1])
    damped = values + DAMPING * values.sum() / rows.shape[1]
    found: Vector = scaled.T @ (vectors @ ((vectors.T @ (first / root)) / np.sqrt(damped)))
    length: float = np.sqrt(np.mean(found**2))
    return found / length
