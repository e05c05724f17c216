"""A few items of each task, answered by base and sources."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from evomerge.evaluate.answers import answers_of
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.tasks import Split, questions_of
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.score_checks import finite_scores
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.space.baselines import Baseline

BASE = "base"


@dataclass(frozen=True)
class Answered:
    """One item as a model answered it: `text`, `taken` and `cut` as in `evaluate/answers.py`.

    metric, objective: the item scores, the higher the better.
    """

    text: str
    taken: str
    cut: bool
    metric: float
    objective: float


@dataclass(frozen=True)
class ProbedItem:
    """One item: its prompt as the model sees it, its gold answer, and each model's answer by name."""

    prompt: str
    gold: str
    answers: dict[str, Answered]


@dataclass(frozen=True)
class ProbedTask:
    """A task with a few of its search items.

    metric, objective: their names.
    right: the highest score of the metric, where it says right or wrong; None for other metrics.
    items: as they were answered.
    seconds: for one item, scored by what a trial is scored by.
    """

    name: str
    kind: str
    metric: str
    objective: str
    right: float | None
    items: list[ProbedItem]
    seconds: float

    @property
    def models(self) -> list[str]:
        """The names of the models, the base first."""
        return list(self.items[0].answers)

    def scores(self, which: str, model: str) -> list[float]:
        """A model's item scores.  which: metric or objective."""
        return [float(getattr(item.answers[model], which)) for item in self.items]

    def mean(self, which: str, model: str) -> float:
        return float(np.mean(self.scores(which, model)))


@dataclass(frozen=True)
class Probe:
    """What base and sources answer.

    tasks: the goals and guards.
    merge: seconds for one merge.
    """

    tasks: list[ProbedTask]
    merge: float


def probe(
    evaluator: Evaluator, models: Sequence[Baseline], count: int, progress: Callable[[str], None] = lambda text: None
) -> Probe:
    """Let models answer the first items of each task's search split.

    models: the base and the sources alone.
    count: items of each task.

    NotFinite or NotFiniteScore if a model is broken.
    """
    engine, tasks = evaluator.engine, evaluator.task_set.tasks
    chosen = {t.name: evaluator.task_set.items[t.name]["search"][:count] for t in tasks}
    asked: dict[str, list[ProbedItem]] = {}
    seconds, merge = {t.name: 0.0 for t in tasks}, 0.0
    for model in models:
        progress(f"{model.name} answers {count} items of each task")
        clock = Clock(evaluator.check, counts=evaluator.counts, device=evaluator.bank.device)
        started = time.perf_counter()
        evaluator.materialise(model.recipe, clock)
        merge = time.perf_counter() - started
        for task in tasks:
            work = engine.prepare(task, chosen[task.name], everything=True)
            started = time.perf_counter()
            found = engine.score(work, clock)
            if model is models[-1]:  # everything is warm by now
                if not evaluator.complete(task, everything=False):
                    cheaper = engine.prepare(task, chosen[task.name], everything=False)
                    started = time.perf_counter()
                    engine.score(cheaper, clock)
                seconds[task.name] = (time.perf_counter() - started) / max(1, len(chosen[task.name]))
            answers = answers_of(engine, work)
            items = asked.setdefault(task.name, [ProbedItem(a.prompt, a.gold, {}) for a in answers])
            scores = [finite_scores(task, metric, found) for metric in (task.metric, task.objective)]
            for item, answer, metric, objective in zip(items, answers, *scores, strict=True):
                item.answers[model.name] = Answered(answer.text, answer.taken, answer.cut, metric, objective)
    return Probe(
        [
            ProbedTask(
                task.name,
                task.kind,
                task.metric,
                task.objective,
                1.0 if evaluator.task_set.values_metric(task) else None,
                asked[task.name],
                seconds[task.name],
            )
            for task in tasks
        ],
        merge,
    )


def questions(task_set: TaskSet) -> dict[str, dict[Split, list[str]]]:
    """Task -> split -> the text of every item's question; without tasks whose items mostly have the same text."""
    found: dict[str, dict[Split, list[str]]] = {}
    for task in task_set.tasks:
        splits = task_set.items[task.name]
        if texts := questions_of(task, chain.from_iterable(splits.values())):
            found[task.name] = {split: [texts[item.id] for item in items] for split, items in splits.items()}
    return found
