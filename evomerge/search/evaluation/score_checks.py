"""Checks of item scores: a candidate with a score that is NaN or infinite is broken."""

from collections.abc import Sequence

import numpy as np

from evomerge.evaluate.item_values import ItemMetrics, scores_of
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.evaluate.tasks import Task
from evomerge.search.storage.item_scores import rounded


def needed_scores(task: Task, found: ItemMetrics) -> dict[str, list[float]]:
    """The item scores of the metrics that a search uses or shows: objective, metric and `gold_logprob`.

    Beside `answer_weakest` also `answer_logprob`, which says whether models write the gold answer.

    found: all metrics that were computed.  NotFiniteScore: see `finite_scores`.
    """
    beside = ("answer_logprob",) if task.objective == "answer_weakest" else ()
    wanted = dict.fromkeys(m for m in (task.objective, task.metric, "gold_logprob", *beside) if m in found)
    return {metric: finite_scores(task, metric, found) for metric in wanted}


def finite_scores(task: Task, metric: str, found: ItemMetrics) -> list[float]:
    """The item scores of one metric, the higher the better.

    NotFiniteScore: see `checked`.
    """
    return checked(task, metric, scores_of(task, metric, found))


def checked(task: Task, metric: str, scores: Sequence[float]) -> list[float]:
    """Item scores as a study keeps them.

    NotFiniteScore if one is NaN or infinite.  A study keeps NaN for items that were not scored, and neither a race nor
    a mean can use such a score.
    """
    with np.errstate(over="ignore"):
        scores = rounded(scores)
    if not np.isfinite(scores).all():
        wrong = next(s for s in scores if not np.isfinite(s))
        raise NotFiniteScore(f"task {task.name}: the {metric} of an item is {wrong}")
    return scores
