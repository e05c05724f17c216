"""The multipliers of guards: how strongly the gradient steps hold each guard (augmented Lagrangian, Hestenes 1969).

    o_i, r_i    the smooth objective of item i of the guard, of the step's model and of the reference
    d           the mean of r_i - o_i over the items of the step
    a           max_drop in units of the objective, see `slope`
    u           the violation that costs 1, in units of the objective: max(a, e), see `evaluation/guards.py`
    v           min(1, max(-1, (d - a) / u)), the violation of the latest step; 0 before the first
    lambda      the multiplier; 0 before the first step

A step climbs the goals minus max(0, lambda + v) d / u, and then

    lambda <- max(0, lambda + RAISE v)

lambda finds the price of the guard, and v answers at once to the latest step, which damps the swings of lambda.  A step
sees few items, so (d - a) / u is noisy and may be large; hence the bounds of v.  All of this follows from the drops d
in the records of the steps, so a resumed search has the same multipliers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.search.evaluation.guards import Guard, unit_of

Known = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Task -> metric -> item id -> its score."""

RAISE = 0.1  # the most by which one step changes lambda; at 1 a guard is held as strongly as by the penalty


@dataclass(frozen=True)
class State:
    """lambda and v of one guard."""

    multiplier: float = 0.0
    latest: float = 0.0

    @property
    def strength(self) -> float:
        """By how much the next step holds the guard."""
        return max(0.0, self.multiplier + self.latest)


@dataclass(frozen=True)
class Multiplier:
    """What the multiplier of one guard is made of.

    guard: the guard.
    reference: task -> item id -> the reference's score by the task's objective.
    allowed: a.
    unit: u.
    """

    guard: Guard
    reference: Mapping[str, Mapping[str, float]]
    allowed: float
    unit: float

    def drop(self, scores: Mapping[str, Sequence[float]], items: Mapping[str, Sequence[str]]) -> float:
        """d of a step.  scores: task -> the objective of each of the items.  items: task -> their ids."""
        drops = [
            np.mean([self.reference[task][i] for i in items[task]]) - np.mean(scores[task])
            for task in self.guard.metrics
        ]
        return float(np.mean(drops))

    def after(self, state: State, drop: float) -> State:
        """The state after a step.  state: before it.  drop: d of the step."""
        latest = min(1.0, max(-1.0, (drop - self.allowed) / self.unit))
        return State(max(0.0, state.multiplier + RAISE * latest), latest)

    def weight(self, state: State, task: str, items: int) -> float:
        """What a unit of the objective of one item of a task is worth to the guard.

        items: how many of the task's items the step has.
        """
        return state.strength / self.unit / len(self.guard.metrics) / items if task in self.guard.metrics else 0.0


def multiplier(guard: Guard, objectives: Mapping[str, str], reference: Known, others: Sequence[Known]) -> Multiplier:
    """The multiplier of a guard.

    objectives: task -> its objective.
    reference: the reference's scores on the search split.
    others: those of other models.
    """
    by_objective = {task: reference[task][objectives[task]] for task in guard.metrics}
    slopes = [slope(task, objectives[task], metric, reference, others) for task, metric in guard.metrics.items()]
    allowed = guard.max_drop * float(np.mean(slopes))
    return Multiplier(guard, by_objective, allowed, unit_of(allowed, [list(s.values()) for s in by_objective.values()]))


def slope(task: str, objective: str, metric: str, reference: Known, others: Sequence[Known]) -> float:
    """How much the objective of a task drops for each unit of its metric: least squares over the other models' drops.

    Where that is not positive, it is the ratio of the standard deviations of the reference's item scores; 1 if one of
    them is 0.
    """
    smooth, plain = list(reference[task][objective].values()), list(reference[task][metric].values())
    x = np.array([np.mean(plain) - np.mean(list(known[task][metric].values())) for known in others])
    y = np.array([np.mean(smooth) - np.mean(list(known[task][objective].values())) for known in others])
    if len(x) and x @ y > 0:
        return float(x @ y / (x @ x))
    # The range is exactly 0 where all are equal; the standard deviation may be what rounding leaves.
    return float(np.std(smooth) / np.std(plain)) if np.ptp(smooth) > 0 and np.ptp(plain) > 0 else 1.0
