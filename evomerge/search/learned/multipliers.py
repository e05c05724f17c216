"""The multipliers of guards: how strongly the gradient steps hold each guard (Arrow, Hurwicz and Uzawa 1958).

    o_i, r_i    the smooth objective of item i of the guard, of the step's model and of the reference
    d           the mean of r_i - o_i over the items of the step
    s, t        the standard deviations of the reference's item scores by the objective and by the metric
    a           max_drop in units of the objective: max_drop s / t
    u           the violation that costs 1, in units of the objective: max(a, e), see `evaluation/guards.py`
    lambda      the multiplier, 0 before the first step

A step climbs the goals minus lambda d / u, and then

    lambda <- max(0, lambda + RAISE min(1, max(-1, (d - a) / u)))

A step sees few items, so d is noisy and may be many times u; hence the bounds of -1 and 1.  The multipliers follow from
the drops d in the records of the steps, so a resumed search has the same ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.search.evaluation.guards import Guard, unit_of

RAISE = 0.1  # the most by which one step changes a multiplier; at 1 it holds a guard as strongly as the penalty does


@dataclass(frozen=True)
class Multiplier:
    """What the multiplier of one guard depends on.

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

    def after(self, value: float, drop: float) -> float:
        """The multiplier after a step.  value: before it.  drop: d of the step."""
        return max(0.0, value + RAISE * min(1.0, max(-1.0, (drop - self.allowed) / self.unit)))

    def weight(self, value: float, task: str, items: int) -> float:
        """What a unit of the objective of one item of a task is worth to the guard.

        value: the multiplier.  items: how many of the task's items the step has.
        """
        return value / self.unit / len(self.guard.metrics) / items if task in self.guard.metrics else 0.0


def multiplier(
    guard: Guard, objectives: Mapping[str, str], reference: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> Multiplier:
    """The multiplier of a guard.

    objectives: task -> its objective.
    reference: task -> metric -> item id -> the reference's score on the search split.
    """
    by_objective = {task: reference[task][objectives[task]] for task in guard.metrics}
    smooth = [list(scores.values()) for scores in by_objective.values()]
    plain = [list(reference[task][metric].values()) for task, metric in guard.metrics.items()]
    allowed = guard.max_drop * ratio(smooth, plain)
    return Multiplier(guard, by_objective, allowed, unit_of(allowed, smooth))


def ratio(smooth: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> float:
    """s / t, averaged over tasks; 1 for a task where one of them is 0."""
    pairs = [(float(np.std(o)), float(np.std(m))) for o, m in zip(smooth, plain, strict=True)]
    return float(np.mean([s / t if s and t else 1.0 for s, t in pairs]))
