"""The metrics that a configuration names: whether a task has them, and what `auto` and the like stand for."""

from evomerge.errors import EvomergeError, did_you_mean
from evomerge.evaluate.metrics import (
    AUTO,
    AUTO_MEAN,
    CHOSEN,
    KINDS,
    METRICS,
    NORMALISED,
    Metric,
    added_metric,
    added_names,
)
from evomerge.evaluate.tasks import Task


def without_first_filter(task: Task, name: str) -> str:
    """A metric as `item_values.py` calls it: `acc,none` and the like without the filter if it is the task's first."""
    plain, _, filter_name = name.partition(",")
    return plain if task.filters and filter_name == task.filters[0] else name


def require_metric(task: Task, key: str, name: str) -> None:
    """EvomergeError if the task does not have the metric that `key` names; one of another package is added to it."""
    plain, _, filter_name = name.partition(",")
    if plain not in task.metrics and plain not in task.own and (found := added_metric(plain)) is not None:
        add_metric(task, found)
    if plain not in {*task.metrics, *task.own} or (filter_name and filter_name not in task.filters):
        known = [*task.metrics, *task.own, *CHOSEN]
        hint = "" if plain in known else did_you_mean(plain, known)
        raise EvomergeError(f"task {task.name}: {key} {name!r} is not one of its metrics ({listed(task)}){hint}")


def objective_for(task: Task, name: str, metric: str) -> str:
    """The objective that a name in a configuration stands for; most names stand for themselves.

    metric: the task's metric, which `metric` stands for.  `auto` is the metric if that is smooth or if no smooth
        objective fits the task.
    """
    if name == "metric" and name not in task.metrics:
        return metric
    if name not in CHOSEN or name in task.metrics:
        return name
    chosen = CHOSEN[name].get(task.kind, name)
    if name not in (AUTO, AUTO_MEAN):
        return chosen
    plain = metric.partition(",")[0]
    known = task.own.get(plain) or METRICS.get(plain)
    chosen = NORMALISED.get(plain, chosen) if task.kind == "multiple_choice" else chosen
    return metric if (known and known.smooth) or chosen not in {*task.own, *task.metrics} else chosen


def add_metric(task: Task, metric: Metric) -> None:
    """Give a task the metric of another package.  EvomergeError if this kind of task does not have what it needs."""
    if task.kind not in KINDS[metric.needs]:
        raise EvomergeError(
            f"task {task.name}: {metric.name} needs a task of the kind {' or '.join(KINDS[metric.needs])}; "
            f"this one is {task.kind}"
        )
    task.added[metric.name] = metric
    task.__dict__.pop("own", None)  # `own` is computed again with it


def listed(task: Task) -> str:
    """The metrics that a task has: smooth ones, others, and those that other packages add."""
    names = dict.fromkeys([*task.metrics, *(n for n in task.own if n not in task.added)])
    smooth = [n for n in names if n in METRICS and METRICS[n].smooth]
    groups = {"smooth": smooth, "others": [n for n in names if n not in smooth], "of other packages": added_names()}
    return "; ".join(f"{title}: {', '.join(found)}" for title, found in groups.items() if found)
