"""What all races of one search share: the order of the items, the places of the looks, the items of each chunk.

In a race a candidate is scored chunk by chunk.  After each chunk a sequential test looks at the scores so far (this is
a look) and may stop the candidate.  `evaluate/racing.py` is that test; `evaluate/looks.py` chooses after which items it
looks.  This file applies both to the items of a search and knows nothing of its trials; `race_policy.py` decides which
candidate races, and against which trials.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from evomerge.config.running import RacingConfig
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.looks import Cost, Looks, place_looks
from evomerge.evaluate.racing import (
    Order,
    Race,
    Vector,
    ceiling,
    chunks,
    item_weights,
    race_order,
)
from evomerge.evaluate.workload import Workload
from evomerge.search.evaluation.scale import Scale
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.storage.item_scores import trial_scores


@dataclass(frozen=True)
class RaceSetup:
    """The items of the search split, and how every race of the search goes through them.

    Vectors have one element for each of the N items, task after task.  Items of tasks that are only guards take no
    part: they are scored after the race.

    items: the name under which the study keeps the items' ids.
    sizes: items per task.
    order: in which every candidate is scored on the items.
    ceiling: (N,) the highest value that counts, see `Race`.
    scale: makes item scores the values that races compare.
    alpha: the chance that a race stops a candidate that is not worse.
    looks: after how many items a race looks.
    """

    items: str
    sizes: dict[str, int]
    order: Order
    ceiling: Vector
    alpha: float
    looks: Looks
    scale: Scale

    @cached_property
    def name(self) -> str:
        """A hash of the order and the looks; workers keep the batches of a race setup under it."""
        return hashlib.sha256(f"{self.items}{self.looks.ends}".encode() + self.order.items.tobytes()).hexdigest()[:16]

    @cached_property
    def starts(self) -> dict[str, int]:
        """Each task's first place among all N items."""
        ends = np.cumsum(list(self.sizes.values()))
        return {task: int(end) - size for (task, size), end in zip(self.sizes.items(), ends, strict=True)}

    def weighted(self, weights: Mapping[str, float]) -> "RaceSetup":
        """The same races about a mean by other weights of the tasks."""
        order = replace(self.order, weights=item_weights(weights, self.sizes))
        return replace(self, order=order, scale=self.scale.weighted(weights))

    def values(self, scores: Mapping[str, Mapping[str, Sequence[float] | Vector]]) -> Vector:
        """The values of all items, (N,).  scores: task -> metric -> one an item."""
        by_task = self.scale.item_values(scores)
        return np.concatenate([by_task[task] for task in self.sizes])

    def vector(self, trial: FrozenTrial) -> Vector:
        """The values of a trial's items, (N,)."""
        return self.values(trial_scores(trial))

    def race(self, incumbent: Vector, others: Sequence[Vector], penalty: float = 0.0) -> Race:
        """Begin a race.

        incumbent: (N,) the values of the items of the trial to beat.
        others: (N,) each, those of other candidates that were scored on all items.
        penalty: of the trial to beat; the mean of what the candidate runs against is that trial's value.
        """
        incumbent = incumbent - penalty
        return Race(self.order, incumbent, self.ceiling, np.stack(others) if others else None, self.alpha)


def build_race_setup(
    task_set: TaskSet,
    scale: Scale,
    items: str,
    baselines: Sequence[Mapping[str, Mapping[str, Sequence[float] | Vector]]],
    seed: int,
    config: RacingConfig,
    looks: Looks | None = None,
) -> RaceSetup:
    """Build the race setup of a search.

    scale: of the study.
    items: the name under which the study keeps the ids of the search split's items.
    baselines: item scores, by task and metric, of models that were scored on all items; they tell which items
        distinguish models.
    seed: of the search; decides the order.
    looks: after how many items to look; without them those of `even_looks`.
    """
    split = {task: found for task, found in task_set.split("search").items() if task in task_set.weights}
    sizes = {task: len(found) for task, found in split.items()}
    tops = np.concatenate([highest_values(task, scale, baselines, sizes[task]) for task in sizes])
    weights = item_weights(task_set.weights, sizes)
    values = [np.concatenate([v[task] for task in sizes]) for v in map(scale.item_values, baselines)]
    known = np.stack(values) if config.informative and baselines else None
    order = race_order([f"{task}\0{i.id}" for task, found in split.items() for i in found], weights, seed, known, tops)
    return RaceSetup(items, sizes, order, tops, config.alpha, looks or even_looks(order), scale)


def highest_values(
    task: str, scale: Scale, baselines: Sequence[Mapping[str, Mapping[str, Sequence[float] | Vector]]], count: int
) -> Vector:
    """The highest values that count for a task's items, (count,): those of the ceilings of its objective and metric."""

    def top(metric: str) -> Vector:
        scores = [b[task][metric] for b in baselines]
        return np.full(count, ceiling(metric, np.array(scores).reshape(len(scores), count)))

    known = scale.tasks[task]
    return known.values(top(known.objective.name), top(known.metric.name) if known.share else None)


def even_looks(order: Order) -> Looks:
    """Looks after chunks of equal size (`chunks`), for studies that have not yet chosen looks by their cost."""
    ends = np.cumsum([len(piece) for piece in chunks(order)])
    return Looks(tuple(ends.tolist()), tuple((ends / ends[-1]).tolist()))


def choose_looks(race_setup: RaceSetup, engine: Engine, works: Sequence[Workload], whole: Workload) -> Looks:
    """Choose after how many items a race should look, see `place_looks`.

    works: the workload of each task.  whole: all of them as one.
    """

    def pieces_of(ends: Sequence[int]) -> list[Workload]:
        return [
            race_chunk.work
            for race_chunk in build_race_chunks(replace(race_setup, looks=Looks(tuple(ends), ())), engine, works)
        ]

    cost = Cost.on(engine.model.device.type, engine.batch_tokens)
    return place_looks(len(race_setup.ceiling), whole, pieces_of, cost)


@dataclass(frozen=True)
class RaceChunk:
    """The items that are scored between two looks.

    items: (n,) their places among all N items, in the order of the race.
    work: their workload, with a part for each task.
    where: for each part of the workload, the places of its items among all N items.
    """

    items: NDArray[np.intp]
    work: Workload
    where: list[NDArray[np.intp]]


def build_race_chunks(race_setup: RaceSetup, engine: Engine, works: Sequence[Workload]) -> list[RaceChunk]:
    """Build the chunks of a race setup.  works: the workload of each task."""
    pieces = np.split(race_setup.order.items, race_setup.looks.ends[:-1])
    ends = np.cumsum(list(race_setup.sizes.values()))
    starts = ends - list(race_setup.sizes.values())
    split = [[p[(first <= p) & (p < end)] for first, end in zip(starts, ends, strict=True)] for p in pieces]
    chunk_works = engine.in_chunks(works, [[w - s for w, s in zip(row, starts, strict=True)] for row in split])
    return [
        RaceChunk(p, work, [w for w in row if len(w)]) for p, work, row in zip(pieces, chunk_works, split, strict=True)
    ]
