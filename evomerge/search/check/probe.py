"""A few items of each task, answered by base and sources."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from evomerge.evaluate.answers import answers_of, gold_of
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.deal import questions_of
from evomerge.evaluate.tasks import Split, Task
from evomerge.search.check.near_duplicates import Text
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.score_checks import finite_scores
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.space.baselines import Baseline

BASE = "base"
TIMED = 2.0  # seconds for which the items of all tasks are scored to find out how long one takes


@dataclass(frozen=True)
class Answered:
    """One item as a model answered it: `text`, `taken` and `cut` as in `evaluate/answers.py`.

    metric, objective: the item scores, the higher the better.
    written: the `answer_logprob` of the gold answer; NaN if the task has none.
    """

    text: str
    taken: str
    cut: bool
    metric: float
    objective: float
    written: float = math.nan


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
    delimiter: what the task puts between prompt and gold answer.
    """

    name: str
    kind: str
    metric: str
    objective: str
    right: float | None
    items: list[ProbedItem]
    seconds: float
    delimiter: str = ""

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
        clock = Clock(evaluator.check, counts=evaluator.counts, device=evaluator.bank.live_device)
        started = time.perf_counter()
        evaluator.materialise(model.recipe, clock)
        merge = time.perf_counter() - started
        for task in tasks:
            work = engine.prepare(task, chosen[task.name], everything=True)
            started = time.perf_counter()
            found = engine.score(work, clock)
            if model is models[-1]:  # everything is warm by now
                taken = time.perf_counter() - started
                seconds[task.name] = item_seconds(
                    evaluator, task, len(chosen[task.name]), taken, TIMED / len(tasks), clock
                )
            answers = answers_of(engine, work)
            items = asked.setdefault(task.name, [ProbedItem(a.prompt, a.gold, {}) for a in answers])
            names = [task.metric, task.objective, *(["answer_logprob"] if "answer_logprob" in found else [])]
            scores = [finite_scores(task, name, found) for name in names]
            for item, answer, *values in zip(items, answers, *scores, strict=True):
                item.answers[model.name] = Answered(answer.text, answer.taken, answer.cut, *values)
    return Probe(
        [
            ProbedTask(
                task.name,
                task.kind,
                task.metric,
                task.objective,
                right_or_wrong(asked[task.name]),
                asked[task.name],
                seconds[task.name],
                str(task.lm.config.target_delimiter),
            )
            for task in tasks
        ],
        merge,
    )


def item_seconds(evaluator: Evaluator, task: Task, count: int, taken: float, limit: float, clock: Clock) -> float:
    """Seconds for one item of the search split, scored as in a trial.

    count, taken: how many items were scored by all metrics, and the seconds of that.  Few items make small batches,
    which are slow, so more and more are scored until it takes `limit` seconds.
    """
    whole, items = evaluator.task_set.scores_metric(task), evaluator.task_set.items[task.name]["search"]
    done = 0
    while True:
        wanted = min(len(items), int((count if done == 0 else done) * max(1.0, limit / max(taken, 1e-6))))
        if wanted < 2 * done or (done == 0 and whole and wanted < 2 * count):
            return taken / max(1, done or count)
        work = evaluator.engine.prepare(task, items[:wanted], whole)
        started = time.perf_counter()
        evaluator.engine.score(work, clock)
        done, taken = wanted, time.perf_counter() - started


def right_or_wrong(items: Sequence[ProbedItem]) -> float | None:
    """1 if a metric says right or wrong, which its scores show; else None."""
    return 1.0 if {answer.metric for item in items for answer in item.answers.values()} <= {0.0, 1.0} else None


def questions(task_set: TaskSet) -> dict[str, dict[Split, list[Text]]]:
    """Task -> split -> question and answer of every item; without tasks whose items mostly have the same question."""
    found: dict[str, dict[Split, list[Text]]] = {}
    for task in task_set.tasks:
        splits = task_set.items[task.name]
        if texts := questions_of(task, chain.from_iterable(splits.values())):
            found[task.name] = {
                split: [Text(texts[item.id], gold_of(task, item)) for item in items] for split, items in splits.items()
            }
    return found
