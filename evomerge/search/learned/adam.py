"""Adam (Kingma and Ba 2015) on the axes of a search space, with projection onto their bounds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution

from evomerge.search.space.space import Point

Vector = NDArray[np.float64]

FIRST, SECOND = 0.9, 0.99  # decay of the mean gradient and of the mean square
TINY = 1e-12  # keeps a coefficient without any gradient where it is


@dataclass
class Adam:
    """Climbs: a step goes along the gradient.

    axes: the bounds of each of the D coefficients by name, in order.
    rate: of the first step, in units of the coefficient; later ones fall along half a cosine.
    steps: after which the rate is 0.
    """

    axes: Mapping[str, FloatDistribution]
    rate: float
    steps: int
    taken: int = 0
    mean: Vector = field(init=False)
    square: Vector = field(init=False)

    def __post_init__(self) -> None:
        self.mean = np.zeros(len(self.axes))
        self.square = np.zeros(len(self.axes))

    def step(self, point: Point, gradient: Mapping[str, float]) -> Point:
        """The next point.  gradient: the derivative by each coefficient of what is to rise, at `point`."""
        g = np.array([gradient[name] for name in self.axes])
        rate = self.rate * (1 + math.cos(math.pi * min(1.0, self.taken / self.steps))) / 2
        self.taken += 1
        self.mean = FIRST * self.mean + (1 - FIRST) * g
        self.square = SECOND * self.square + (1 - SECOND) * g * g
        mean = self.mean / (1 - FIRST**self.taken)
        square = self.square / (1 - SECOND**self.taken)
        moved = np.array([point[name] for name in self.axes]) + rate * mean / (np.sqrt(square) + TINY)
        low = np.array([axis.low for axis in self.axes.values()])
        high = np.array([axis.high for axis in self.axes.values()])
        return dict(zip(self.axes, np.clip(moved, low, high).tolist(), strict=True))


def average(points: Sequence[Point]) -> Point:
    """The mean of points of one space; rounding never takes it out of their range, which may end at a bound."""
    values = {name: [point[name] for point in points] for name in points[0]}
    return {name: float(np.clip(np.mean(each), min(each), max(each))) for name, each in values.items()}
