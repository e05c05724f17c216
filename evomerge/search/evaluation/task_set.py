"""The tasks of a search and the items of each split.  No model is needed to open them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.chat_template import problem_of
from evomerge.evaluate.deal import deal
from evomerge.evaluate.metrics import find_metric
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import Item, Split, Task
from evomerge.merge.measure.statistics_file import open_statistics_file
from evomerge.merge.methods import METHODS
from evomerge.search.evaluation.guards import Guard
from evomerge.search.verdict.intervals import mean_score
from evomerge.sources.open_models import Models
from evomerge.sources.tokenizer import chat_templates

Scores = dict[str, dict[str, list[float]]]
"""Task -> metric -> one score per item, the higher the better."""


@dataclass(frozen=True)
class TaskSet:
    """The tasks of a search with their items.

    tasks: the goals, and those that are only guards, with weight 0.
    items: task -> split -> its items; no item is in two splits.
    guards: what must not get worse.
    """

    tasks: list[Task]
    items: dict[str, dict[Split, list[Item]]]
    guards: tuple[Guard, ...] = ()

    @cached_property
    def goals(self) -> list[Task]:
        """The tasks that the search improves."""
        return [t for t in self.tasks if t.weight > 0]

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weight of each goal, by name."""
        return {t.name: t.weight for t in self.goals}

    def split(self, split: Split) -> dict[str, list[Item]]:
        """The items of a split by task."""
        return {t.name: self.items[t.name][split] for t in self.tasks}

    @cached_property
    def item_counts(self) -> dict[Split, int]:
        """How many items each split has, all tasks together."""
        return {split: sum(len(self.items[t.name][split]) for t in self.tasks) for split in get_args(Split)}

    def scores_of(self, scores: Scores, which: Literal["objective", "metric"]) -> dict[str, list[float]]:
        """The item scores of every goal's objective, or of every goal's metric, by task."""
        return {t.name: scores[t.name][getattr(t, which)] for t in self.goals}

    def values_metric(self, task: Task) -> bool:
        """Whether a task's metric is a part of the values of trials.

        It is where evomerge chose the objective, and the metric says right or wrong: such a metric is flat far from
        the goal, and near it no objective can replace it.
        """
        if not task.auto or task.metric == task.objective:
            return False
        metric = find_metric(task.metric.split(",")[0])
        return metric is None or not metric.smooth

    def scores_metric(self, task: Task) -> bool:
        """Whether trials are scored by a task's metric too: as a part of their value, or because of a guard."""
        guarded = task.metric != task.objective and any(task.name in guard.metrics for guard in self.guards)
        return guarded or self.values_metric(task)

    def wanted(self, task: Task, split: Split, everything: bool = False) -> tuple[str, ...]:
        """The metrics of a task that are needed on a split, the objective first.

        everything: also on the search split by every metric, as the base and the parents are.
        """
        both = everything or split != "search" or self.scores_metric(task)
        return tuple(dict.fromkeys((task.objective, task.metric))) if both else (task.objective,)

    def mean(self, scores: Scores, which: Literal["objective", "metric"]) -> float:
        """The mean over goals, by their weights, of each one's mean objective or mean metric."""
        return mean_score(self.scores_of(scores, which), self.weights)


def open_task_set(config: SearchConfig) -> TaskSet:
    """Open the tasks of a configuration and divide their items into splits.

    EvomergeError if a task cannot be opened or has too few items, or if there are too few tasks for `goals`.
    """
    goals = {task.task for task in config.tasks}
    tasks = open_tasks([*config.tasks, *(guard for guard in config.guards if guard.task not in goals)])
    if config.goals == "pareto" and sum(task.weight > 0 for task in tasks) < 2:
        raise EvomergeError("goals: pareto needs at least two tasks")
    return TaskSet(tasks, {t.name: deal(t, config.splits, config.seed) for t in tasks}, guards_of(config, tasks))


def guards_of(config: SearchConfig, tasks: Sequence[Task]) -> tuple[Guard, ...]:
    """The guards of a configuration.  tasks: its tasks, opened."""
    found = []
    for guard in config.guards:
        metrics = {t.name: t.metric for t in tasks if t.origin == str(guard.task)}
        name = next(iter(metrics)) if len(metrics) == 1 else str(guard.task)
        found.append(Guard(name, metrics, guard.max_drop, guard.of))
    return tuple(found)


def check_chat_templates(models: Models, task_set: TaskSet) -> None:
    """EvomergeError if a task asks for a chat template that the base's tokenizer lacks, or that asks for too much."""
    asking = [task for task in task_set.tasks if task.chat]
    if not asking:
        return
    templates = chat_templates(models.base.path)
    if not templates:
        raise EvomergeError(
            f"task {asking[0].name}: apply_chat_template is asked for, but {models.base.path} has no chat template; "
            "leave it out, or put the chat_template.jinja of a source beside the base's tokenizer"
        )
    if problem := next(filter(None, map(problem_of, templates)), None):
        raise EvomergeError(f"{models.base.path}: its chat template {problem} for a chat of three short messages")


def check_language(models: Models, task_set: TaskSet) -> None:
    """EvomergeError if a task asks a language model, and the base is none or has no tokenizer."""
    asking = next((task for task in task_set.tasks if not task.is_python), None)
    if asking is None or models.vocabulary is not None:
        return
    raise EvomergeError(
        f"task {asking.name}: asks a language model, and {models.base.path} has no tokenizer; models of other kinds "
        "are scored by Python tasks"
    )


def check_statistics(config: SearchConfig, models: Models, task_set: TaskSet) -> None:
    """Check the statistics files of a configuration.

    EvomergeError if one does not fit its source, or was gathered on items of the selection or the holdout split.
    """
    kinds = {kind for name in config.candidate_methods if (kind := METHODS[name].statistics)}
    judging: Sequence[Split] = ("holdout", "selection")
    for kind, (number, source) in itertools.product(sorted(kinds), enumerate(config.sources)):
        origin = open_statistics_file(Path(str(source.statistics)), kind, source.name, models).origin
        for task, splits in task_set.items.items():
            seen = set(origin.items.get(task, ()))
            for split in judging:
                if count := sum(i.id in seen for i in splits[split]):
                    raise EvomergeError(
                        f"sources.{number}.statistics: was gathered on {count} items of {task} that belong to this "
                        f"search's {split} split; gather it with `evomerge statistics --search CONFIG`, which takes "
                        "items of the search split alone"
                    )
