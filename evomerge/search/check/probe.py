"""A few items of each task, answered by base and sources."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine, choices_of
from evomerge.evaluate.item_values import ItemMetrics
from evomerge.evaluate.requests import gold_choice
from evomerge.evaluate.tasks import Item, Split, Task
from evomerge.evaluate.workload import ItemRequests, Workload
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.score_checks import finite_scores
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.space.baselines import Baseline

BASE = "base"


@dataclass(frozen=True)
class Answered:
    """One item as a model answered it.

    text: what the model wrote, or the choice that it took; empty where a task only scores texts.
    taken: what the task's filter took of it.
    cut: whether the text has as many tokens as the task allows.
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
    answers: dict[str, list[dict[str, Answered]]] = {t.name: [{} for _ in chosen[t.name]] for t in tasks}
    seconds, merge = {t.name: 0.0 for t in tasks}, 0.0
    for model in models:
        progress(f"{model.name} answers {count} items of each task")
        clock = Clock(evaluator.check, counts=evaluator.counts, device=evaluator.bank.device)
        started = time.perf_counter()
        evaluator.materialise(model.recipe, clock)
        merge = time.perf_counter() - started
        for task in tasks:
            if model is models[-1]:  # everything is warm by now
                work = engine.prepare(task, chosen[task.name], evaluator.complete(task, everything=False))
                started = time.perf_counter()
                engine.score(work, clock)
                seconds[task.name] = (time.perf_counter() - started) / max(1, len(chosen[task.name]))
            work = engine.prepare(task, chosen[task.name], everything=True)
            found = engine.score(work, clock)
            for place, answer in enumerate(answered(engine, work, found)):
                answers[task.name][place][model.name] = answer
    probed = []
    for task in tasks:
        items = [
            ProbedItem(prompt_of(engine, task, item), gold_of(task, item), answers[task.name][place])
            for place, item in enumerate(chosen[task.name])
        ]
        right = 1.0 if evaluator.task_set.values_metric(task) else None
        probed.append(ProbedTask(task.name, task.kind, task.metric, task.objective, right, items, seconds[task.name]))
    return Probe(probed, merge)


def answered(engine: Engine, work: Workload, found: ItemMetrics) -> list[Answered]:
    """The answers of one task's workload, after it was scored."""
    task = work.task
    scores: Mapping[str, list[float]] = {m: finite_scores(task, m, found) for m in (task.metric, task.objective)}
    both = zip(scores[task.metric], scores[task.objective], strict=True)
    return [
        Answered(*text_of(engine, task, asked), metric, objective)
        for asked, (metric, objective) in zip(work.items, both, strict=True)
    ]


def text_of(engine: Engine, task: Task, asked: ItemRequests) -> tuple[str, str, bool]:
    """What was answered, what the first filter took of it, and whether it was cut."""
    if task.kind == "generate_until":
        text = str(asked.instances[0].resps[0])
        taken = asked.instances[0].filtered_resps[task.filters[0]]
        length = len(engine.lm.tok_encode(text, add_special_tokens=False))
        return text, str(taken[0] if isinstance(taken, list) and taken else taken), length >= asked.prompts[0].limit
    if task.kind == "multiple_choice":
        numbers, _ = choices_of(task, asked)
        logprobs = [asked.instances[k].resps[0][0] for k in range(len(numbers))]
        text = asked.instances[int(np.argmax(logprobs))].args[1].removeprefix(task.lm.config.target_delimiter)
        return text, text, False
    return "", "", False


def prompt_of(engine: Engine, task: Task, item: Item) -> str:
    """The prompt as the model sees it, with examples and template."""
    return str(engine.requests.instances(task, item)[0].args[0])


def gold_of(task: Task, item: Item) -> str:
    """The gold answer as text: what the metric compares with."""
    if task.kind == "multiple_choice":
        return str(task.lm.doc_to_choice(item.doc)[gold_choice(task, item.doc)])
    target = task.lm.doc_to_target(item.doc)
    return "" if task.kind == "loglikelihood_rolling" else str(target[0] if isinstance(target, list) else target)


def questions(task_set: TaskSet) -> dict[str, dict[Split, list[str]]]:
    """Task -> split -> the text of every item's question; without tasks whose items mostly have the same text."""
    found: dict[str, dict[Split, list[str]]] = {}
    for task in task_set.tasks:
        texts = {
            split: [str(task.lm.doc_to_text(item.doc)) for item in items]
            for split, items in task_set.items[task.name].items()
        }
        every = [text for each in texts.values() for text in each]
        if 2 * len(set(every)) > len(every):
            found[task.name] = texts
    return found
