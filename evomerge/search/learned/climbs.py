"""The climbs of a learned start: by the search's task weights, and with `goals: pareto` by a few others.

    w    (T,) the search's task weights, sum 1
    S    the tasks that a climb emphasises: each one; with three tasks also each pair
    e    the share that the climb gives to them beside their own: EMPHASIS, with two tasks also STRONG

    weights of a climb = (1 - e) w + e w[S] / sum(w[S])

A weighted sum reaches every point of the front's convex hull (Zadeh 1963), and no task ever has a weight of 0, where
the climb would give all of it away for nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

Weights = dict[str, float]

LOOKS = 3  # trials on the way of the first climb, at equal distances
SHARE = 3  # the other climbs have one part in so many of its steps, since each starts from a neighbour's result
EMPHASIS, STRONG = 0.5, 0.8


@dataclass(frozen=True)
class Climb:
    """Gradient steps by one set of task weights.

    number: 0 is the one by the search's own weights.
    weights: by task, sum 1.
    steps: at most.
    looks: after how many steps the mean of the last points is tried.
    """

    number: int
    weights: Weights
    steps: int
    looks: frozenset[int]

    @property
    def own_weights(self) -> Weights | None:
        """The weights, None if they are the search's."""
        return self.weights if self.number else None

    @property
    def text(self) -> str:
        """The weights for the log; empty if they are the search's."""
        return ", ".join(f"{t} {w:.2f}" for t, w in self.weights.items()) if self.number else ""


def climbs(weights: Mapping[str, float], steps: int, pareto: bool) -> list[Climb]:
    """The climbs of a learned start in their order.

    weights: of the search, by task.
    steps: of the first climb, at most.
    pareto: whether there are more.
    """
    total = sum(weights.values())
    own = {task: weight / total for task, weight in weights.items()}
    found = [Climb(0, own, steps, frozenset(math.ceil(steps * k / LOOKS) for k in range(1, LOOKS + 1)))]
    few = max(1, steps // SHARE)
    for chosen, share in emphases(list(own)) if pareto else []:
        whole = sum(own[task] for task in chosen)
        shifted = {t: (1 - share) * w + (share * w / whole if t in chosen else 0.0) for t, w in own.items()}
        found.append(Climb(len(found), shifted, few, frozenset({few})))
    return found


def emphases(tasks: list[str]) -> list[tuple[tuple[str, ...], float]]:
    """Which tasks are emphasised, and how much, climb by climb."""
    if len(tasks) < 2:
        return []
    found: list[tuple[tuple[str, ...], float]] = [((task,), EMPHASIS) for task in tasks]
    if len(tasks) == 2:
        found += [((task,), STRONG) for task in tasks]
    if len(tasks) == 3:
        found += [(pair, EMPHASIS) for pair in combinations(tasks, 2)]
    return found


def distance(a: Weights, b: Weights) -> float:
    """How far two sets of weights are from each other: the sum of the absolute differences."""
    return sum(abs(a[task] - b[task]) for task in a)
