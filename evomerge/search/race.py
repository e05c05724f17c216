"""A search's races: one order of the items for every candidate, and whom a candidate runs against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from evomerge.config.schema import RacingConfig
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.racing import PREDICTORS, Order, Race, Vector, ceiling, chunks, item_weights, race_order
from evomerge.evaluate.workload import Workload
from evomerge.search.scores import objective_scores
from evomerge.search.study import SearchStudy, record_of


@dataclass(frozen=True)
class Heat:
    """What is scored between two looks.  items: (n,) in the order of the race.  where: for each part of the work, the
    places of its items among all items."""

    items: NDArray[np.intp]
    work: Workload
    where: list[NDArray[np.intp]]


@dataclass(frozen=True)
class Course:
    """The items of the search split, task after task, in the order in which every candidate meets them.

    items: the name under which the study keeps their ids.  sizes: items per task.  ceiling: (N,) see `Race`.
    known: trials' scores that were unpacked before.
    """

    items: str
    sizes: dict[str, int]
    order: Order
    ceiling: Vector
    heats: list[Heat]
    alpha: float
    known: dict[int, Vector] = field(default_factory=dict)

    def by_task(self, scores: Vector) -> dict[str, Vector]:
        """Scores of all items, (N,), task by task."""
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.sizes, np.split(scores, ends[:-1]), strict=True))

    def vector(self, trial: FrozenTrial) -> Vector:
        """A trial's item scores, (N,)."""
        if trial.number not in self.known:
            found = objective_scores(trial)
            self.known[trial.number] = np.concatenate([found[task] for task in self.sizes])
        return self.known[trial.number]

    def race(self, study: SearchStudy) -> Race | None:
        """A race against the incumbent, None if no candidate was evaluated in full on these items."""
        full = [t for t in study.complete if record_of(t).get("items") == self.items]
        if not full:
            return None
        incumbent = max(full, key=lambda t: (t.value or 0.0, -t.number))
        others = [self.vector(t) for t in full if t is not incumbent][-PREDICTORS:]
        history = np.stack(others) if others else None
        return Race(self.order, self.vector(incumbent), self.ceiling, history, self.alpha)


def build_course(
    engine: Engine,
    asked: Sequence[Workload],
    items: str,
    baselines: Sequence[Mapping[str, Sequence[float]]],
    seed: int,
    config: RacingConfig,
) -> Course:
    """The course of a search.

    asked: every task's items.  items: the name of their ids in the study.  baselines: the objective's item scores,
    task by task, of models that were evaluated in full; they say which items tell models apart.
    """
    sizes = {work.task.name: len(work.items) for work in asked}
    known = {name: np.array([b[name] for b in baselines]).reshape(len(baselines), n) for name, n in sizes.items()}
    tops = np.concatenate([np.full(len(w.items), ceiling(w.task.objective, known[w.task.name])) for w in asked])
    weights = item_weights({w.task.name: w.task.weight for w in asked}, sizes)
    scores = np.concatenate(list(known.values()), axis=1) if config.informative and baselines else None
    order = race_order([f"{w.task.name}\0{i.id}" for w in asked for i in w.items], weights, seed, scores, tops)
    pieces = chunks(order)
    ends = np.cumsum(list(sizes.values()))
    split = [[p[(end - n <= p) & (p < end)] for n, end in zip(sizes.values(), ends, strict=True)] for p in pieces]
    starts = ends - list(sizes.values())
    works = engine.in_chunks(asked, [[w - s for w, s in zip(row, starts, strict=True)] for row in split])
    heats = [Heat(p, work, [w for w in row if len(w)]) for p, work, row in zip(pieces, works, split, strict=True)]
    return Course(items, sizes, order, tops, heats, config.alpha)
