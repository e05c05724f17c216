"""From answers to item values and scores: lm-eval's filters and metrics, and the formulas of `formulas.py`."""

from collections.abc import Iterable, Sequence
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.evaluate.formulas import Answer
from evomerge.evaluate.metrics import METRICS, Metric
from evomerge.evaluate.taskfile import reason
from evomerge.evaluate.tasks import Item, Task

ItemMetrics = dict[str, list[Any]]
"""Metric name -> one raw value per item, as lm-eval's `process_results` gives it, or a number by our own formula."""


class MetricFailed(ValueError):
    """A task's filters or metrics fail on a model's answer: one trial fails, the search goes on."""


def lm_eval_values(task: Task, items: Sequence[Item], instances: Sequence[list[Any]]) -> ItemMetrics:
    """Run lm-eval's filters and metrics over answered requests.

    instances: per item, its lm-eval requests with `resps` set.

    Returns the values of the first filter's metrics under plain names, those of further filters under
    `metric,filter`.  MetricFailed if a filter or a metric raises anything.
    """
    flat = [instance for group in instances for instance in group]
    for instance in flat:
        instance.filtered_resps = {}  # a filter keeps an old answer otherwise
    found: ItemMetrics = {}
    try:
        for ensemble in task.lm._filters:
            ensemble.apply(flat)
        for number, name in enumerate(task.filters):
            for item, group in zip(items, instances, strict=True):
                values = task.lm.process_results(item.doc, [i.filtered_resps[name] for i in group])
                for metric, value in values.items():
                    found.setdefault(metric if number == 0 else f"{metric},{name}", []).append(value)
    except Exception as error:  # filters and metrics of a task file may not fit its documents, or this answer
        raise MetricFailed(
            f"task {task.name}: its filters and metrics fail on an answer ({type(error).__name__}: {reason(error)})"
        ) from error
    return found


def formula_values(task: Task, metrics: Iterable[Metric], answers: Sequence[Answer]) -> ItemMetrics:
    """The values of metrics that have a formula.  MetricFailed if the formula of another package fails."""
    found: ItemMetrics = {}
    for metric in metrics:
        assert metric.formula is not None, "only lm-eval's own metrics have none"
        try:
            found[metric.name] = [float(metric.formula(answer)) for answer in answers]
        except Exception as error:
            raise MetricFailed(
                f"task {task.name}: the metric {metric.name} fails on an answer "
                f"({type(error).__name__}: {reason(error)})"
            ) from error
    return found


def item_score(task: Task, metric: str, value: Any) -> float:
    """One raw value as a number, the higher the better.

    Perplexities count as bits (or nats a word) per item; a Brier score as the item's squared error.
    EvomergeError for metrics that exist only for a whole task (f1, mcc).
    """
    known = None if metric in task.own else METRICS.get(metric.split(",")[0])
    try:
        score = (known.from_lm_eval if known else float)(value)
    except (TypeError, ValueError) as error:
        raise EvomergeError(f"task {task.name}: the metric {metric!r} has no value per item") from error
    return score if task.higher_is_better(metric) else -score


def scores_of(task: Task, metric: str, found: ItemMetrics) -> list[float]:
    """The item scores of one metric, the higher the better.  EvomergeError if the metric was not computed."""
    if metric not in found:
        raise EvomergeError(f"task {task.name}: the metric {metric!r} was not computed; there are {', '.join(found)}")
    return [item_score(task, metric, value) for value in found[metric]]


def aggregate(task: Task, metric: str, values: Sequence[Any]) -> float:
    """A metric over all items: lm-eval's own aggregation, or else the mean."""
    aggregation = task.lm.aggregation().get(metric.split(",")[0])
    if aggregation is None:
        return sum(map(float, values)) / len(values)
    return float(aggregation(list(values)))
