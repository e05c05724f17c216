"""Guards: tasks that must not get worse, and what it costs the value of a trial if they do.

    d       the drop: the reference's mean metric on the guard's items minus the model's, the higher the better
    a       max_drop, the drop that is allowed
    e       the standard error of the reference's mean

    penalty = PENALTY max(0, d - a) / max(a, e)

The value of a trial is that of its goals minus the penalties of all guards.  Beyond the allowed drop, a drop of
max(a, e) more costs PENALTY = 1: on a scaled task the whole way from the base to the best parent.  A drop that is
smaller than e cannot be told from luck, so it costs little.

A penalty is computed from the scores of all items, never in a race.  A race compares the candidate's goals alone with
the incumbent's value, its penalties included.  That is safe: penalties are never below 0, so the value of a candidate
whose goals are below the incumbent's value is below it too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Tables = Mapping[str, Mapping[str, Sequence[float] | Vector]]
"""Task -> metric -> one score an item, the higher the better."""

PENALTY = 1.0


@dataclass(frozen=True)
class Guard:
    """A task, or the tasks of a group with equal weights, whose mean metric must not get worse.

    name: the task's; of a group the configuration's.
    metrics: task -> the metric that is guarded.
    max_drop: by how much the mean may be below the reference's.
    of: the reference: `base`, or the name of a source.
    """

    name: str
    metrics: dict[str, str]
    max_drop: float
    of: str

    def scores(self, scores: Tables) -> dict[str, Sequence[float] | Vector]:
        """The item scores of the guard's tasks, by task."""
        return {task: scores[task][metric] for task, metric in self.metrics.items()}

    def mean(self, scores: Tables) -> float:
        """The mean over the guard's tasks of the mean over items."""
        return float(np.mean([np.mean(items) for items in self.scores(scores).values()]))


@dataclass(frozen=True)
class GuardScale:
    """A guard with what its penalty needs; a study keeps it beside its scale.

    level: the reference's mean on the search split.
    unit: the violation that costs PENALTY.
    """

    guard: Guard
    level: float
    unit: float

    def violation(self, scores: Tables) -> float:
        """By how much the drop of a model exceeds what is allowed; 0 if it does not.  scores: on the search split."""
        return max(0.0, self.level - self.guard.mean(scores) - self.guard.max_drop)

    def penalty(self, scores: Tables) -> float:
        """What the drop of a model costs.  scores: on the search split."""
        return PENALTY * self.violation(scores) / self.unit

    def sentence(self) -> str:
        """What the guard allows and what more would cost, in words."""
        return (
            f"guard {self.guard.name}: {self.guard.of} has {self.level:.3f} by "
            f"{' and '.join(dict.fromkeys(self.guard.metrics.values()))}; a drop of {self.guard.max_drop:g} is "
            f"allowed, and each further {self.unit:.2g} costs {PENALTY:g}"
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "GuardScale":
        """The guard that a study keeps, of `dataclasses.asdict`."""
        return cls(Guard(**content["guard"]), content["level"], content["unit"])


def guard_scale(guard: Guard, reference: Tables) -> GuardScale:
    """A guard with its level and unit.  reference: the item scores of its reference on the search split."""
    return GuardScale(guard, guard.mean(reference), unit_of(guard.max_drop, list(guard.scores(reference).values())))


def unit_of(allowed: float, tables: Sequence[Sequence[float] | Vector]) -> float:
    """max(a, e) of the allowed drop a and the standard error e of the reference's mean; of two zeros one item's share.

    tables: the reference's item scores of each task.  The variance of equal scores is 0, without what rounding leaves.
    """
    variances = [float(np.var(items, ddof=1)) / len(items) if np.ptp(items) > 0 else 0.0 for items in tables]
    error = sum(variances) ** 0.5 / len(tables)
    return max(allowed, error) or 1.0 / sum(map(len, tables))
