"""The verdict: is the winner better than what nobody searched for, and is that more than luck?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

ItemScores = Mapping[str, Sequence[float]]
"""Task name -> one score per item, the higher the better."""

RESAMPLES = 10_000
BLOCK = 500  # draws that are multiplied at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The chosen candidate against one baseline on the holdout split: paired difference of the mean score."""

    name: str
    kind: str
    score: float
    difference: Interval

    @property
    def beaten(self) -> bool:
        return self.difference.low > 0


@dataclass(frozen=True)
class Verdict:
    """winner: whether the candidate beats every baseline.  recommended: `winner`, or the best baseline's name."""

    winner: bool
    recommended: str
    score: Interval
    comparisons: list[Comparison]
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_score(scores: ItemScores, weights: Mapping[str, float]) -> float:
    """The weighted mean over tasks of the mean over items."""
    total = sum(weights[task] for task in scores)
    return float(sum(weights[task] * np.mean(items) for task, items in scores.items()) / total)


def resampled_means(scores: ItemScores, weights: Mapping[str, float], seed: int) -> NDArray[np.float64]:
    """The mean score under RESAMPLES bootstrap draws, (RESAMPLES,); items are drawn within each task.

    The same seed draws the same items for every candidate, so differences of two results are paired.
    """
    tasks = sorted(scores)
    total = sum(weights[task] for task in tasks)
    means = np.zeros(RESAMPLES)
    for task, counts in zip(tasks, drawn(tuple(len(scores[t]) for t in tasks), seed), strict=True):
        items = np.asarray(scores[task], dtype=np.float64)  # (n,)
        found = np.concatenate([counts[k : k + BLOCK] @ items for k in range(0, RESAMPLES, BLOCK)])
        means += weights[task] / total * found / len(items)
    return means


@lru_cache(maxsize=64)
def drawn(sizes: tuple[int, ...], seed: int) -> list[NDArray[np.uint16]]:
    """How often each item is drawn, (RESAMPLES, n) for each task's n: the same for every model of a verdict."""
    rng = np.random.default_rng(seed)

    def block(n: int) -> NDArray[np.uint16]:
        return rng.multinomial(n, np.full(n, 1 / n), size=BLOCK).astype(np.uint16)

    return [np.concatenate([block(n) for _ in range(RESAMPLES // BLOCK)]) for n in sizes]


def interval(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def judge(
    candidate: ItemScores,
    baselines: Mapping[str, tuple[str, ItemScores]],
    weights: Mapping[str, float],
    seed: int,
) -> Verdict:
    """Compare the chosen candidate with every baseline on the same holdout items.

    baselines: name -> (kind, item scores).  The candidate wins only if the paired 95% interval of the difference
    (Efron 1979, percentile bootstrap) lies above zero against each of them.
    """
    own = resampled_means(candidate, weights, seed)
    score = mean_score(candidate, weights)
    comparisons = []
    for name, (kind, scores) in baselines.items():
        theirs = mean_score(scores, weights)
        gap = interval(score - theirs, own - resampled_means(scores, weights, seed))
        comparisons.append(Comparison(name, kind, theirs, gap))
    best = max(comparisons, key=lambda c: c.score)
    winner = all(c.beaten for c in comparisons)
    against = best.difference
    span = f"{against.value:+.3f}, 95% interval {against.low:+.3f} to {against.high:+.3f}"
    if winner:
        sentence = (
            f"Winner: {score:.3f} on the holdout items, better than all {len(comparisons)} baselines; "
            f"against the best of them, {best.name}, {span}."
        )
    else:
        sentence = (
            f"No significant gain: {score:.3f} on the holdout items against {best.score:.3f} of {best.name} "
            f"({span}); the simpler model is recommended."
        )
    return Verdict(winner, "winner" if winner else best.name, interval(score, own), comparisons, sentence)


class JudgedBy(BaseModel):
    """What a task was judged by.  items: how many per split.  code: whether its file ran Python of its own."""

    metric: str
    objective: str
    items: dict[str, int]
    code: bool = False


class Written(BaseModel):
    """What those who show verdict.json look at."""

    winner: bool
    recommended: str
    sentence: str
    score: Interval
    comparisons: list[Comparison]
    chosen: dict[str, Any]
    finalists: list[Any]
    holdout: dict[str, dict[str, Interval]]
    holdout_uses: int
    greedy_soup: str = ""
    tasks: dict[str, JudgedBy]


def what_is_wrong(content: Any) -> str | None:
    """Why the content of a verdict.json cannot be shown, None if it can."""
    try:
        found = Written.model_validate_json(json.dumps(content), strict=True)  # as JSON: text is no number there
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    for name in ("winner", *(c.name for c in found.comparisons)):
        if lacking := found.tasks.keys() - found.holdout.get(name, {}).keys():
            return f"holdout.{name}: lacks {min(lacking)}"
    if any(not {"search", "holdout"} <= task.items.keys() for task in found.tasks.values()):
        return "tasks: one of them has no number of items"
    return None if "name" in found.chosen else "chosen: has no name"
