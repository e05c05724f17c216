"""The Pareto front of a search: the trials than which no other one is better in every task.

    x            (T,) the values of a trial by task, scaled as in `scale.py`: 0 is the base, 1 the task's best parent
    dominates    at least as good in every task, and better in one
    front        the trials that no other one dominates; of equal ones the first
    hypervolume  of the part of the space above 0 that the front dominates (Zitzler and Thiele 1999), computed exactly
                 by exclusive volumes (While, Bradstreet and Barone 2012, "A Fast Way of Calculating Exact
                 Hypervolumes"); its time grows exponentially with T, so it stops at MOST_TASKS
    knee         the model whose smallest share of the possible gain is largest (Kalai and Smorodinsky 1975, "Other
                 Solutions to Nash's Bargaining Problem"); unlike the distance from the plane through the extremes, it
                 is defined for any number of tasks and models

Shapes: N points, T tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from evomerge.search.evaluation.agreement import model_name
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.study import in_full
from evomerge.search.storage.trial_record import WEIGHTS, place_in_order

Matrix = NDArray[np.float64]

MOST_TASKS = 4  # of a hypervolume


@dataclass(frozen=True)
class FrontTrial:
    """A trial by its values.

    number: of the trial.
    name: the baseline's, or `trial N`, with the task weights that it was learned with.
    values: one a task.
    """

    number: int
    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Front:
    """The trials of a search by their values in every task.

    tasks: their names.
    trials: all that were scored in full, in the order in which they finished.
    relative: whether 0 is the base in every task.
    """

    tasks: tuple[str, ...]
    trials: tuple[FrontTrial, ...]
    relative: bool

    @cached_property
    def points(self) -> Matrix:
        """The values, (N, T)."""
        return np.array([t.values for t in self.trials], dtype=np.float64).reshape(-1, len(self.tasks))

    @cached_property
    def members(self) -> list[FrontTrial]:
        """The front, the best of the first task first."""
        found = [self.trials[i] for i in non_dominated(self.points)]
        return sorted(found, key=lambda t: t.values, reverse=True)

    @cached_property
    def hypervolumes(self) -> list[float] | None:
        """The hypervolume after each trial; None with more than MOST_TASKS tasks, or if 0 is not the base."""
        if len(self.tasks) > MOST_TASKS or not self.relative:
            return None
        found, front, volume = [], np.empty((0, len(self.tasks))), 0.0
        for point in self.points:
            if (point > 0).all():
                volume += max(0.0, exclusive_volume(point, front))
                front = np.vstack([front, point])
                front = front[non_dominated(front)]
            found.append(volume)
        return found

    @property
    def sentence(self) -> str:
        """The size of the front and its hypervolume in words."""
        text = f"front: {len(self.members)} of {len(self.trials)} trials; no other one is better in every task"
        if self.hypervolumes is None:
            why = "with `scale: none`" if not self.relative else f"of more than {MOST_TASKS} tasks"
            return f"{text} (no hypervolume {why})"
        volume = self.hypervolumes[-1] if self.hypervolumes else 0.0
        return f"{text}. Hypervolume: {volume:.4f}"


def front_of(trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]) -> Front | None:
    """The front of a study; None if it has no scale.

    trials: all that are in the study; those without scores of all items of every task are left out.
    attributes: the study's.
    """
    if SCALE not in attributes:
        return None
    scale = Scale.from_json(attributes[SCALE])
    found = []
    for trial in sorted(filter(in_full, trials), key=lambda t: (place_in_order(t), t.number)):
        scores = trial_scores(trial)
        if not all(line.name in scores.get(n, {}) for n, task in scale.tasks.items() for line in task.lines()):
            continue
        values = scale.item_values({name: scores[name] for name in scale.tasks})
        found.append(FrontTrial(trial.number, front_name(trial), tuple(float(v.mean()) for v in values.values())))
    return Front(tuple(scale.tasks), tuple(found), scale.relative)


def front_name(trial: FrozenTrial) -> str:
    """The name of a trial in tables of the front."""
    weights: dict[str, float] = trial.user_attrs.get(WEIGHTS, {})
    shown = ", ".join(f"{task} {weight:.2f}" for task, weight in weights.items())
    return f"{model_name(trial)} ({shown})" if shown else model_name(trial)


def non_dominated(points: Matrix) -> list[int]:
    """The indices of the points that no other one dominates; of equal ones the first.  points: (N, T)."""
    as_good = np.ones((len(points), len(points)), dtype=bool)  # [i, j]: point i is at least as good as point j
    for values in points.T:
        as_good &= values[:, None] >= values
    dominated = (as_good & ~as_good.T).any(axis=0)
    repeated = np.triu(as_good & as_good.T, 1).any(axis=0)
    return np.flatnonzero(~(dominated | repeated)).tolist()


def hypervolume(points: Matrix) -> float:
    """The volume above 0 that points dominate.  points: (N, T)."""
    front = points[(points > 0).all(axis=1)]
    front = front[non_dominated(front)]
    return sum(exclusive_volume(point, front[i + 1 :]) for i, point in enumerate(front))


def exclusive_volume(point: Matrix, others: Matrix) -> float:
    """The volume above 0 that a point dominates and others do not.  point: (T,), above 0.  others: (N, T)."""
    return float(np.prod(point)) - hypervolume(np.minimum(others, point))


def spread_along(points: Matrix, count: int) -> list[int]:
    """The indices of at most `count` points of a front: the best of each task, then always the one that is farthest
    from those that are taken (Gonzalez 1985), in shares of the front's extent.

    points: (N, T).
    """
    if len(points) <= count:
        return list(range(len(points)))
    extent = np.ptp(points, axis=0)
    shares = (points - points.min(axis=0)) / np.where(extent > 0, extent, 1.0)
    taken = list(dict.fromkeys(int(i) for i in shares.argmax(axis=0)))[:count]
    while len(taken) < count:
        distances = np.linalg.norm(shares[:, None] - shares[taken], axis=2).min(axis=1)  # (N,)
        distances[taken] = -1.0
        taken.append(int(distances.argmax()))
    return taken


def knee(points: Matrix, base: Matrix) -> int:
    """The index of the knee: the point that is best in the task in which it is worst.

    points: (N, T).
    base: (T,) where the gains begin.

    A gain is measured as a share of the largest one in its task; tasks in which no point gains do not count.  Of equal
    ones the one with the largest mean share, then the first, is taken.
    """
    gains = points - base  # (N, T)
    most = gains.max(axis=0)
    shares = gains[:, most > 0] / most[most > 0]
    if not shares.shape[1]:
        return int(points.mean(axis=1).argmax())
    order = np.lexsort((-np.arange(len(points)), shares.mean(axis=1), shares.min(axis=1)))
    return int(order[-1])
