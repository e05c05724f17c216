"""Confidence intervals around mean scores, for few items, rare errors and heavy tails.

Method: the Bayesian bootstrap (Rubin 1981) of the N items and of one pseudo-item.  A draw is a weighted mean of the
N + 1 scores under Dirichlet(1, ..., 1) weights.  With the worst possible score as the pseudo-item, the 5% quantile of
the draws is the lower end; with the best possible score, the 95% quantile is the upper end.

For scores of 0 and 1 this is the exact interval of Clopper and Pearson (1934).  For bounded scores in general it is the
bound of Learned-Miller and Thomas (2019, "A New Confidence Interval for the Mean of a Bounded Random Variable"), who
conjecture that it holds for all of them.  `benchmarks/verdict.py` measures how often it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.evaluate.metrics import find_metric

ItemScores = Mapping[str, Sequence[float]]
"""Task name -> one score per item, the higher the better."""

Range = tuple[float, float]
"""The least and the greatest score that an item can have."""

DRAWS = 10_000
ROUNDING = 1e-6  # by which a float32 score may lie beyond a bound
DRAWN_AT_ONCE = 1 << 21  # random numbers in memory: 16 MB, however many items there are
LEVEL = 0.05  # one-sided error rate of each end of an interval
ENOUGH = 100  # items of a task whose scores have no bounds: an error of 3% of the items is then seen 19 times in 20
ONE_SIDED = 1.645  # standard errors from a mean to the end of its interval: z(0.95)
STANDARD_ERRORS = ONE_SIDED + 0.842  # a gain of so many is shown at LEVEL four times in five: z(0.95) + z(0.80)


@dataclass(frozen=True)
class Interval:
    """A mean with its 90% interval: each end is wrong in at most 5% of all cases.

    low, high: None if the items are too few for an interval.
    """

    value: float
    low: float | None
    high: float | None


def mean_score(scores: ItemScores, weights: Mapping[str, float]) -> float:
    """The weighted mean over tasks of the mean over items."""
    total = sum(weights[task] for task in scores)
    return float(sum(weights[task] * np.mean(items) for task, items in scores.items()) / total)


def score_range(metric: str, tables: Sequence[Sequence[float]]) -> Range | None:
    """The least and the greatest score that an item of a task can have; None if that cannot be known.

    metric: the task's.
    tables: for every model, its N item scores.

    If all scores lie between 0 and 1, that is the range.  Other metrics have the bounds of their definition, or, with
    ENOUGH items, the least and the greatest score of any model.
    """
    low, high = min(map(min, tables)), max(map(max, tables))
    if low >= 0.0 and high <= 1.0:
        return 0.0, 1.0
    known = find_metric(metric.split(",")[0])
    worst, best = known.score_bounds if known else (None, None)
    if worst is not None and best is not None and worst - ROUNDING <= low and high <= best + ROUNDING:
        return worst, best
    return (low, high) if len(tables[0]) >= ENOUGH else None


def ranges_of_differences(ranges: Mapping[str, Range | None]) -> dict[str, Range | None]:
    """Task -> the range of the difference between two models' scores of an item.  ranges: of the scores themselves."""
    return {task: r and (r[0] - r[1], r[1] - r[0]) for task, r in ranges.items()}


def intervals(
    scores: Sequence[ItemScores], ranges: Mapping[str, Range | None], weights: Mapping[str, float], seed: int
) -> list[Interval]:
    """The mean of each of several score tables on the same items, with its interval.

    scores: C tables, or paired differences of tables.
    ranges: task -> the range of its item scores.
    weights: task -> its weight.
    seed: the same seed draws the same weights of the items for every table.

    Tasks are pooled: item j of task t counts as

        y = m + (w_t N / n_t) (x_j - m_t)

    where m_t is the mean of the task's n_t items, w_t its share of the weights, m = sum_t w_t m_t and N = sum_t n_t.
    So the mean of all y is m, and the variance of their mean is that of m.  The pseudo-item is the most extreme y that
    an item of any task can have.
    """
    values = [mean_score(table, weights) for table in scores]
    if not values:
        return []
    tasks = sorted(ranges)  # the order in which a file lists them does not matter
    known = {task: r for task, r in ranges.items() if r is not None}
    if len(known) < len(tasks):
        return [Interval(value, None, None) for value in values]
    means = np.array(values)  # (C,)
    total = sum(weights[task] for task in tasks)
    count = sum(len(scores[0][task]) for task in tasks)
    pooled, lowest, highest = [], [], []
    for task in tasks:
        items = np.array([table[task] for table in scores], dtype=np.float64).T  # (n, C)
        factor = weights[task] / total * count / len(items)
        own = items.mean(axis=0)
        pooled.append(means + factor * (items - own))
        lowest.append(means + factor * (known[task][0] - own))
        highest.append(means + factor * (known[task][1] - own))
    lows, highs = drawn_means(np.concatenate(pooled), np.minimum.reduce(lowest), np.maximum.reduce(highest), seed)
    ends = zip(np.quantile(lows, LEVEL, axis=0), np.quantile(highs, 1 - LEVEL, axis=0), strict=True)
    return [Interval(value, float(low), float(high)) for value, (low, high) in zip(values, ends, strict=True)]


def drawn_means(
    items: NDArray[np.float64], lowest: NDArray[np.float64], highest: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw means of N items and a pseudo-item under Dirichlet(1, ..., 1) weights.

    items: (N, C) scores.
    lowest, highest: (C,) the pseudo-item of the first and of the second result.
    seed: of the weights.

    Returns two arrays of (DRAWS, C): with the lowest and with the highest pseudo-item, under the same weights.
    """
    rng = np.random.default_rng(seed)
    lows, highs = np.empty((DRAWS, items.shape[1])), np.empty((DRAWS, items.shape[1]))
    rows = max(1, DRAWN_AT_ONCE // (len(items) + 1))
    for start in range(0, DRAWS, rows):
        part = slice(start, min(start + rows, DRAWS))
        shares = rng.standard_exponential((part.stop - start, len(items) + 1))  # normalised, a Dirichlet draw
        shares /= shares.sum(axis=1, keepdims=True)
        sums = shares[:, 1:] @ items
        lows[part] = sums + shares[:, :1] * lowest
        highs[part] = sums + shares[:, :1] * highest
    return lows, highs


def detectable(differences: ItemScores, weights: Mapping[str, float]) -> float | None:
    """The least gain that a verdict on so many items shows four times in five.

    differences: task -> paired differences of two models' scores, whose variance is used.
    weights: task -> its weight.

    None if a task has a single item.
    """
    total = sum(weights[task] for task in differences)
    variance = 0.0
    for task, items in differences.items():
        if len(items) < 2:
            return None
        variance += (weights[task] / total) ** 2 * float(np.var(items, ddof=1)) / len(items)
    return float(STANDARD_ERRORS * np.sqrt(variance))
