"""Intervals around mean scores that keep their level for few items, rare errors and heavy tails.

The Bayesian bootstrap (Rubin 1981) of the items and of one pseudo-item with the worst possible score gives a lower
bound of a mean, with the best possible score an upper bound.  For scores of 0 and 1 it is the exact interval of Clopper
and Pearson (1934); for bounded scores in general it is the bound of Learned-Miller and Thomas (2019, "A New Confidence
Interval for the Mean of a Bounded Random Variable"), which they conjecture to hold for all of them.
`benchmarks/verdict.py` measures how often it does.
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
BLOCK = 1 << 21  # random numbers drawn at once: 16 MB, however many items there are
SIDE = 0.05  # how often each end of an interval may be on the wrong side of the truth
ENOUGH = 100  # items of a task whose scores have no bounds: an error of 3% of the items is then seen 19 times in 20
POWER = 1.645 + 0.842  # standard errors between no gain and one that is shown at level SIDE four times in five


@dataclass(frozen=True)
class Interval:
    """An estimate with its 90% interval: each end is wrong in at most 5% of all cases.

    low, high: None if the items are too few to know.
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

    metric: the task's.  tables: the item scores of every model.  If all of them lie between 0 and 1 the metric does;
    other metrics have the bounds that their definition says, or, with ENOUGH items, those that were seen.
    """
    low, high = min(map(min, tables)), max(map(max, tables))
    if low >= 0.0 and high <= 1.0:
        return 0.0, 1.0
    known = find_metric(metric.split(",")[0])
    worst, best = known.score_bounds if known else (None, None)
    if worst is not None and best is not None and worst - ROUNDING <= low and high <= best + ROUNDING:
        return worst, best
    return (low, high) if len(tables[0]) >= ENOUGH else None


def of_differences(ranges: Mapping[str, Range | None]) -> dict[str, Range | None]:
    """The ranges of differences between two models' scores."""
    return {task: r and (r[0] - r[1], r[1] - r[0]) for task, r in ranges.items()}


def intervals(
    scores: Sequence[ItemScores], ranges: Mapping[str, Range | None], weights: Mapping[str, float], seed: int
) -> list[Interval]:
    """The mean of each of several score tables on the same items, with its interval.

    scores: tables, or paired differences of tables.  ranges: of every task's item scores.  The same seed draws the same
    items for every table.

    Tasks are pooled: item j of task t counts as  y = m + (w_t N / n_t) (x_j - m_t),  m_t being the mean of the task's
    n_t items, w_t its share of the weights, m = sum_t w_t m_t and N = sum_t n_t; so the mean of all y is m, and their
    spread is that of m.  The pseudo-item is the most extreme y of any task.
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
    ends = zip(np.quantile(lows, SIDE, axis=0), np.quantile(highs, 1 - SIDE, axis=0), strict=True)
    return [Interval(value, float(low), float(high)) for value, (low, high) in zip(values, ends, strict=True)]


def drawn_means(
    items: NDArray[np.float64], lowest: NDArray[np.float64], highest: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """DRAWS means of items and a pseudo-item under Dirichlet(1, ..., 1) weights, two of (DRAWS, C).

    items: (N, C).  lowest, highest: (C,), the pseudo-item of the first and of the second result.
    """
    rng = np.random.default_rng(seed)
    lows, highs = np.empty((DRAWS, items.shape[1])), np.empty((DRAWS, items.shape[1]))
    rows = max(1, BLOCK // (len(items) + 1))
    for start in range(0, DRAWS, rows):
        part = slice(start, min(start + rows, DRAWS))
        shares = rng.standard_exponential((part.stop - start, len(items) + 1))  # normalised, a Dirichlet draw
        shares /= shares.sum(axis=1, keepdims=True)
        sums = shares[:, 1:] @ items
        lows[part] = sums + shares[:, :1] * lowest
        highs[part] = sums + shares[:, :1] * highest
    return lows, highs


def detectable(differences: ItemScores, weights: Mapping[str, float]) -> float | None:
    """The gain that these items show four times in five, given how much two models' scores differ on them.

    None if a task has a single item.
    """
    total = sum(weights[task] for task in differences)
    variance = 0.0
    for task, items in differences.items():
        if len(items) < 2:
            return None
        variance += (weights[task] / total) ** 2 * float(np.var(items, ddof=1)) / len(items)
    return float(POWER * np.sqrt(variance))
