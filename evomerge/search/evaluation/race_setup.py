"""A search's races: one order of the items for every candidate, and whom a candidate runs against."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from evomerge.config.schema import RacingConfig
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
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.storage.item_scores import objective_scores


@dataclass(frozen=True)
class RaceSetup:
    """The items of the search split, task after task, in the order in which every candidate meets them.

    items: the name under which the study keeps their ids.  sizes: items per task.  ceiling: (N,) see `Race`.
    looks: where a race looks.
    """

    items: str
    sizes: dict[str, int]
    order: Order
    ceiling: Vector
    alpha: float
    looks: Looks

    @cached_property
    def name(self) -> str:
        """A hash of the order: workers keep a race setup's batches under it."""
        return hashlib.sha256(f"{self.items}{self.looks.ends}".encode() + self.order.items.tobytes()).hexdigest()[:16]

    def by_task(self, scores: Vector) -> dict[str, Vector]:
        """Scores of all items, (N,), task by task."""
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.sizes, np.split(scores, ends[:-1]), strict=True))

    def joined(self, scores: Mapping[str, Sequence[float] | Vector]) -> Vector:
        """(N,) the scores of `by_task`."""
        return np.concatenate([scores[task] for task in self.sizes])

    def vector(self, trial: FrozenTrial) -> Vector:
        """(N,) a trial's item scores."""
        return self.joined(objective_scores(trial))

    def race(self, incumbent: Vector, others: Sequence[Vector]) -> Race:
        """A race against the incumbent's item scores, (N,); others: of candidates that were evaluated in full."""
        return Race(self.order, incumbent, self.ceiling, np.stack(others) if others else None, self.alpha)


def build_race_setup(
    task_set: TaskSet,
    items: str,
    baselines: Sequence[Mapping[str, Sequence[float]]],
    seed: int,
    config: RacingConfig,
    looks: Looks | None = None,
) -> RaceSetup:
    """The race setup of a search.

    items: the name of the search split's item ids in the study.  baselines: the objective's item scores, task by task,
    of models that were evaluated in full; they say which items tell models apart.  looks: without
    them those of `even_looks`.
    """
    split = task_set.split("search")
    sizes = {task: len(found) for task, found in split.items()}
    known = {name: np.array([b[name] for b in baselines]).reshape(len(baselines), n) for name, n in sizes.items()}
    tops = np.concatenate([np.full(sizes[t.name], ceiling(t.objective, known[t.name])) for t in task_set.tasks])
    weights = item_weights(task_set.weights, sizes)
    scores = np.concatenate(list(known.values()), axis=1) if config.informative and baselines else None
    order = race_order([f"{task}\0{i.id}" for task, found in split.items() for i in found], weights, seed, scores, tops)
    return RaceSetup(items, sizes, order, tops, config.alpha, looks or even_looks(order))


def even_looks(order: Order) -> Looks:
    """The looks of `chunks`, as they were before they were placed by what they cost."""
    ends = np.cumsum([len(piece) for piece in chunks(order)])
    return Looks(tuple(ends.tolist()), tuple((ends / ends[-1]).tolist()))


def choose_looks(race_setup: RaceSetup, engine: Engine, asked: Sequence[Workload], whole: Workload) -> Looks:
    """Where a race should look, see `place_looks`.  asked: every task's items.  whole: all at once."""

    def pieces_of(ends: Sequence[int]) -> list[Workload]:
        return [
            race_chunk.work
            for race_chunk in build_race_chunks(replace(race_setup, looks=Looks(tuple(ends), ())), engine, asked)
        ]

    cost = Cost.on(engine.model.device.type, engine.batch_tokens)
    return place_looks(len(race_setup.ceiling), whole, pieces_of, cost)


@dataclass(frozen=True)
class RaceChunk:
    """What is scored between two looks.  items: (n,) in the order of the race.  where: for each part of the work, the
    places of its items among all items."""

    items: NDArray[np.intp]
    work: Workload
    where: list[NDArray[np.intp]]


def build_race_chunks(race_setup: RaceSetup, engine: Engine, asked: Sequence[Workload]) -> list[RaceChunk]:
    """The work between the looks of a race setup.  asked: every task's items."""
    pieces = np.split(race_setup.order.items, race_setup.looks.ends[:-1])
    ends = np.cumsum(list(race_setup.sizes.values()))
    starts = ends - list(race_setup.sizes.values())
    split = [[p[(first <= p) & (p < end)] for first, end in zip(starts, ends, strict=True)] for p in pieces]
    works = engine.in_chunks(asked, [[w - s for w, s in zip(row, starts, strict=True)] for row in split])
    return [RaceChunk(p, work, [w for w in row if len(w)]) for p, work, row in zip(pieces, works, split, strict=True)]
