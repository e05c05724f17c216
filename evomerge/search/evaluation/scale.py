"""The scale of a study: item scores of all tasks become values of one kind, whose mean is the value of a trial.

    o, m    the objective and the metric of one item of a task
    a, u    offset and unit of the task's objective; b, r those of its metric
    s       the share of the metric in the task's values

    v = (1 - s) (o - a) / u + s (m - b) / r

The value of a trial is the mean over the goals minus the penalties of the guards (guards.py).

Offset and unit come from the means on the search split: the base is 0, and the best parent on this task is 1.  So a
task's weight means the same whatever its scores are measured in.  A study keeps its scale as an attribute, so all its
values stay comparable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import optuna
from numpy.typing import NDArray

from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import TaskOptions
from evomerge.evaluate.metrics import AUTO, AUTO_MEAN
from evomerge.search.evaluation.guards import GuardScale
from evomerge.search.storage.item_scores import evaluation_records
from evomerge.search.verdict.intervals import mean_score

if TYPE_CHECKING:  # opening tasks needs libraries whose import takes seconds
    from evomerge.search.evaluation.task_set import Scores, TaskSet

Vector = NDArray[np.float64]
Which = Literal["objective", "metric"]
Options = TypeVar("Options", bound=TaskOptions)

SCALE = "evomerge:scale"  # study attribute
METRIC_SHARE = 0.5  # the share of the metric in the values of a task whose trials are scored by both
NOISE = 2.0  # a parent is better than the base if it is by more than so many standard errors of the difference
LEAST = 0.25  # the smallest unit of a metric: where the best parent gains .05, one right item must not count for twenty


@dataclass(frozen=True)
class Line:
    """x -> (x - offset) / unit, for the item scores of one metric of one task.

    name: of the metric.
    offset: the base's mean.
    unit: the best parent's mean minus the base's; 1 if no parent beats the base by more than noise, LEAST for a metric
        in which the best parent gains less.
    parent: the name of that parent; None if the unit is not its gain.
    """

    name: str
    offset: float = 0.0
    unit: float = 1.0
    parent: str | None = None

    def of(self, scores: Sequence[float] | Vector) -> Vector:
        """The scaled scores, (n,)."""
        scaled: Vector = (np.asarray(scores, dtype=np.float64) - self.offset) / self.unit
        return scaled

    def sentence(self, task: str) -> str:
        """What 0 and 1 mean, in words."""
        if self.parent is None and self.unit != 1.0:
            return (
                f"task {task}: 0 is the base ({self.offset:.3f} by {self.name}), 1 is {self.offset + self.unit:.3f}; "
                "the best parent is below that"
            )
        if self.parent is None:
            return (
                f"task {task}: 0 is the base ({self.offset:.3f} by {self.name}); no parent is better by more than "
                "noise, so its own unit stays"
            )
        return (
            f"task {task}: 0 is the base ({self.offset:.3f} by {self.name}), 1 is its best parent, {self.parent} "
            f"({self.offset + self.unit:.3f})"
        )


@dataclass(frozen=True)
class TaskScale:
    """The scale of one task.

    weight: the task's share in the value of a trial.
    share: the share of the metric in the task's values; 0 if trials are scored by the objective alone, 1 if the
        objective says nothing, because models do not write the gold answer.
    """

    weight: float
    share: float
    objective: Line
    metric: Line

    def fits(self, other: "TaskScale") -> bool:
        """Whether what is scored for this scale is enough for another one."""
        names = (self.objective.name, self.metric.name)
        return names == (other.objective.name, other.metric.name) and (self.share > 0 or other.share == 0)

    def lines(self) -> list[Line]:
        """Those that the task's values depend on."""
        return [self.objective, self.metric] if self.share else [self.objective]

    def values(self, objective: Sequence[float] | Vector, metric: Sequence[float] | Vector | None) -> Vector:
        """The values of items, (n,), by their scores.  metric: not needed if its share is 0."""
        scaled = self.objective.of(objective)
        if not self.share:
            return scaled
        assert metric is not None, "trials of this task are scored by the metric too"
        mixed: Vector = (1 - self.share) * scaled + self.share * self.metric.of(metric)
        return mixed


@dataclass(frozen=True)
class Scale:
    """What a study's values are made of.

    tasks: the scale of every goal, by name.
    guards: the guards by name, each with its level and unit.
    """

    tasks: dict[str, TaskScale]
    guards: dict[str, GuardScale] = field(default_factory=dict)

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weight of each task, by name."""
        return {name: task.weight for name, task in self.tasks.items()}

    @property
    def relative(self) -> bool:
        """Whether 0 is the base: not with `scale: none`, and not in studies that are older than scales."""
        return any(line.offset or line.parent for task in self.tasks.values() for line in task.lines())

    def weighted(self, weights: Mapping[str, float]) -> "Scale":
        """This scale with other weights of the tasks."""
        return replace(self, tasks={name: replace(task, weight=weights[name]) for name, task in self.tasks.items()})

    def with_tasks(self, other: "Scale") -> "Scale":
        """This scale with the tasks of another one that are scored by the same; their weights stay."""
        fitting = {
            name: replace(other.tasks[name], weight=own.weight)
            for name, own in self.tasks.items()
            if name in other.tasks and own.fits(other.tasks[name])
        }
        return Scale(self.tasks | fitting, self.guards)

    def covers(self, scores: Mapping[str, Mapping[str, object]]) -> bool:
        """Whether scores, by task and metric, are all that values are made of: the tasks may have changed since."""
        lines = [(name, line.name) for name, task in self.tasks.items() for line in task.lines()]
        guarded = [pair for guard in self.guards.values() for pair in guard.guard.metrics.items()]
        return all(metric in scores.get(task, {}) for task, metric in (*lines, *guarded))

    def scaled(self, task: str, which: Which, scores: Sequence[float] | Vector) -> Vector:
        """Item scores of a task's objective or metric, scaled: the base's mean is 0, the best parent's is 1."""
        line: Line = getattr(self.tasks[task], which)
        return line.of(scores)

    def item_values(self, scores: Mapping[str, Mapping[str, Sequence[float] | Vector]]) -> dict[str, Vector]:
        """The values of the goals' items, by task.

        scores: task -> metric -> one an item; NaN where an item was not scored.
        """
        return {
            name: self.tasks[name].values(
                metrics[self.tasks[name].objective.name], metrics.get(self.tasks[name].metric.name)
            )
            for name, metrics in scores.items()
            if name in self.tasks
        }

    def goals(self, scores: Mapping[str, Mapping[str, Sequence[float] | Vector]]) -> float:
        """The mean over the goals, by their weights, of the mean value of each one's items."""
        return mean_score({task: v.tolist() for task, v in self.item_values(scores).items()}, self.weights)

    def penalty(self, scores: Mapping[str, Mapping[str, Sequence[float] | Vector]]) -> float:
        """The penalties of all guards together.  scores: of all items of the search split."""
        return sum(guard.penalty(scores) for guard in self.guards.values())

    def value(self, scores: Mapping[str, Mapping[str, Sequence[float] | Vector]]) -> float:
        """The value of a model: `goals` minus `penalty`.  scores: of all items of the search split."""
        return self.goals(scores) - self.penalty(scores)

    def sentences(self) -> list[str]:
        """What 0 and 1 mean in every task, and what the guards cost, in words."""
        goals = [line.sentence(name) for name, task in self.tasks.items() for line in task.lines()]
        return goals + [guard.sentence() for guard in self.guards.values()]

    def to_json(self) -> dict[str, Any]:
        """The scale as a study keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Scale":
        """The scale of `to_json`."""
        return cls(
            {
                name: TaskScale(task["weight"], task["share"], Line(**task["objective"]), Line(**task["metric"]))
                for name, task in content["tasks"].items()
            },
            {name: GuardScale.from_json(guard) for name, guard in content.get("guards", {}).items()},
        )


def scale_of(attributes: Mapping[str, Any], task_set: "TaskSet") -> Scale:
    """The scale that a study has; tasks that have none keep their scores as they are.  attributes: the study's."""
    plain = plain_scale(task_set)
    if SCALE not in attributes:
        return plain
    kept = Scale.from_json(attributes[SCALE])
    names = {guard.name for guard in task_set.guards}
    return Scale(plain.with_tasks(kept).tasks, {n: guard for n, guard in kept.guards.items() if n in names})


def with_first_objectives(study: optuna.Study, config: SearchConfig) -> SearchConfig:
    """The configuration with the objectives that a study began with where it leaves the choice to evomerge.

    A study whose trials are older than scales was scored by the metric.  For one that was scored by `answer_logprob`
    and never by `answer_weakest`, `auto` was what `auto_mean` is now.
    """
    if SCALE in study.user_attrs:
        names = scored_by(study.user_attrs)
        first = AUTO_MEAN if "answer_logprob" in names and "answer_weakest" not in names else AUTO
    else:
        first = "metric" if study.get_trials(deepcopy=False) else AUTO
    if first == AUTO:
        return config

    def earlier(options: list[Options]) -> list[Options]:
        return [o.model_copy(update={"objective": first}) if o.objective == AUTO else o for o in options]

    return config.model_copy(update={"tasks": earlier(config.tasks), "guards": earlier(config.guards)})


def scored_by(attributes: Mapping[str, Any]) -> set[str]:
    """The metrics by which a study's models were scored before the first trial.  attributes: the study's."""
    scale = Scale.from_json(attributes[SCALE])
    records = evaluation_records(attributes, ["search"]).values()
    found = {metric for record in records for metrics in record.scores.values() for metric in metrics}
    return found | {task.objective.name for task in scale.tasks.values()}


def plain_scale(task_set: "TaskSet") -> Scale:
    """The scale that leaves all scores as they are."""
    return Scale(
        {
            task.name: TaskScale(
                task.weight,
                METRIC_SHARE if task_set.values_metric(task) else 0.0,
                Line(task.objective),
                Line(task.metric),
            )
            for task in task_set.goals
        }
    )


def make_scale(task_set: "TaskSet", base: "Scores", parents: "Mapping[str, Scores]") -> Scale:
    """The scale on which the base is 0 and each task's best parent 1.

    base: its item scores on the search split, by every metric.
    parents: name -> the same of a parent; those that could not be scored are left out.
    """

    def line(task: str, metric: str, least: float = 0.0) -> Line:
        each = {name: scores[task][metric] for name, scores in parents.items()}
        return fitted(metric, base[task][metric], each, least)

    plain = plain_scale(task_set)
    return Scale(
        {
            name: TaskScale(
                task.weight, task.share, line(name, task.objective.name), line(name, task.metric.name, LEAST)
            )
            for name, task in plain.tasks.items()
        }
    )


def fitted(metric: str, base: Sequence[float], parents: Mapping[str, Sequence[float]], least: float = 0.0) -> Line:
    """The line on which the base's mean is 0 and the best parent's 1.

    base: (n,) item scores.
    parents: name -> (n,) item scores of the same items.
    least: the smallest unit.

    The unit stays 1 unless that parent's mean is higher by more than NOISE standard errors of the paired difference: a
    smaller difference may be luck, and as a unit it would make the task count far more than its weight says.
    """
    offset = float(np.mean(base))
    best = max(parents, key=lambda name: float(np.mean(parents[name])), default=None)
    if best is not None and len(base) > 1:
        gains = np.subtract(parents[best], base)  # (n,)
        unit = float(np.mean(parents[best])) - offset
        if unit > NOISE * float(np.std(gains, ddof=1)) / len(gains) ** 0.5:
            return Line(metric, offset, unit, best) if unit >= least else Line(metric, offset, least)
    return Line(metric, offset)
