"""Item scores: lm-eval's own metrics one item at a time, and the smooth ones that guide a search."""

import math
from collections.abc import Sequence
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.evaluate.taskfile import reason
from evomerge.evaluate.tasks import Item, Task

ItemMetrics = dict[str, list[Any]]
"""Metric name -> one raw value per item, as lm-eval's `process_results` gives it."""


class MetricFailed(ValueError):
    """A task's filters or metrics cannot score what a model answered: one trial's failure, not the run's."""


def lm_eval_metrics(task: Task, items: Sequence[Item], instances: Sequence[list[Any]]) -> ItemMetrics:
    """Run lm-eval's filters and metrics over answered instances.  MetricFailed if one of them raises anything.

    instances: per item, its lm-eval requests with `resps` set.  The first filter's metrics have plain names, those
    of further filters `metric,filter`.
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
    except Exception as error:  # what a task's file asks for may not fit its documents, or this answer
        raise MetricFailed(
            f"task {task.name}: its filters and metrics fail on an answer ({type(error).__name__}: {reason(error)})"
        ) from error
    return found


def gold_metrics(logprobs: Sequence[float], sizes: Sequence[int]) -> ItemMetrics:
    """gold_logprob: the log-probability of the gold answer, in nats.  gold_prob: the probability itself.
    bits_per_byte: its surprise per byte of its text in UTF-8, the lower the better.

    sizes: the bytes of every answer.
    """
    return {
        "gold_logprob": list(logprobs),
        "gold_prob": [math.exp(min(0.0, x)) for x in logprobs],
        "bits_per_byte": [-x / math.log(2) / max(1, size) for x, size in zip(logprobs, sizes, strict=True)],
    }


def choice_metrics(logprobs: Sequence[Sequence[float]], gold: Sequence[int]) -> ItemMetrics:
    """margin: the gold choice's log-likelihood minus the best other one's, in nats: above 0 where `acc` is 1.
    brier: the squared error of the softmax over the choices (Brier 1950), 0 to 2, the lower the better.

    logprobs: per item, of every choice.  gold: per item, which choice is right.
    """
    margins, squares = [], []
    for choices, right in zip(logprobs, gold, strict=True):
        others = [x for k, x in enumerate(choices) if k != right]
        margins.append(choices[right] - max(others, default=choices[right]))
        highest = max(choices)
        odds = [math.exp(x - highest) for x in choices]
        squares.append(sum((x / sum(odds) - (k == right)) ** 2 for k, x in enumerate(odds)))
    return {"margin": margins, "brier": squares}


def gold_choice(task: Task, doc: dict[str, Any]) -> int:
    """The index of the gold choice of a multiple-choice document (the first, if it has several).

    EvomergeError if it is not one of the choices (lm-eval would count the item as wrong for every model).
    """
    gold = task.lm.doc_to_text(doc) if task.lm.multiple_input else task.lm.doc_to_target(doc)
    if isinstance(gold, list) and gold:
        gold = gold[0]
    choices = list(task.lm.doc_to_choice(doc))
    if gold in choices and not isinstance(gold, int):
        return choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise EvomergeError(f"task {task.name}: the gold answer {gold!r} is not among its {len(choices)} choices")
    return gold


def item_score(task: Task, metric: str, value: Any) -> float:
    """One raw value as a number, the higher the better.

    Perplexities count as bits (or nats a word) per item; a Brier score as the item's squared error.
    EvomergeError for metrics that exist for a whole task alone (f1, mcc).
    """
    plain = metric.split(",")[0]
    if isinstance(value, tuple) and plain in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        loglikelihood, count = value
        score: float = -loglikelihood / max(1, count) / (math.log(2) if plain == "bits_per_byte" else 1.0)
    elif isinstance(value, tuple) and plain == "brier_score":
        gold, probabilities = value
        score = sum((float(p) - (k == gold)) ** 2 for k, p in enumerate(probabilities))
    elif plain == "perplexity":
        score = -float(value)
    else:
        try:
            score = float(value)
        except (TypeError, ValueError) as error:
            raise EvomergeError(f"task {task.name}: the metric {metric!r} has no value per item") from error
    return score if task.higher_is_better(metric) else -score


def aggregate(task: Task, metric: str, values: Sequence[Any]) -> float:
    """A metric over all items, by lm-eval's own aggregation (the mean for the smooth ones)."""
    aggregation = task.lm.aggregation().get(metric.split(",")[0])
    if aggregation is None:
        return sum(map(float, values)) / len(values)
    return float(aggregation(list(values)))
