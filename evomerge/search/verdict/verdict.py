"""The verdict: is the chosen candidate better than what nobody searched for, and is that more than luck?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from evomerge.search.verdict.intervals import (
    Interval,
    ItemScores,
    detectable,
    intervals,
    mean_score,
    of_differences,
    score_range,
)

Outcome = Literal["better", "no difference shown", "worse", "too little searched", "nothing to compare"]


@dataclass(frozen=True)
class Rival:
    """A baseline on the holdout split.  scores: the metric of every item."""

    name: str
    kind: str
    scores: ItemScores


@dataclass(frozen=True)
class Comparison:
    """The chosen candidate against one baseline on the holdout split: paired difference of the mean score."""

    name: str
    kind: str
    score: float
    difference: Interval

    @property
    def beaten(self) -> bool:
        """Whether the candidate is better, at one-sided 5%."""
        return self.difference.low is not None and self.difference.low > 0


@dataclass(frozen=True)
class Verdict:
    """What a search came to.

    winner: whether the candidate beats every baseline.  recommended: `winner`, or the name of the baseline that was
    best on the selection split.  detectable: the gain over that baseline which these items show four times in five.
    """

    outcome: Outcome
    winner: bool
    recommended: str
    score: Interval
    comparisons: list[Comparison]
    detectable: float | None
    sentence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    candidate: ItemScores,
    rivals: Sequence[Rival],
    metrics: Mapping[str, str],
    weights: Mapping[str, float],
    seed: int,
    stand_in: str | None = None,
) -> Verdict:
    """Compare the chosen candidate with every baseline on the same holdout items.

    rivals: the one that was best on the selection split first.  metrics: each task's.  stand_in: the name of the
    baseline that stands for the candidate where the search has none.

    The candidate wins if the lower end of the paired difference lies above zero against each rival: an
    intersection-union test (Berger 1982), so luck alone makes a winner in at most 5% of all searches, however many
    rivals there are.
    """
    tables = [candidate, *(rival.scores for rival in rivals)]
    ranges = {task: score_range(metrics[task], [table[task] for table in tables]) for task in candidate}
    differences = [
        {task: (np.asarray(candidate[task]) - np.asarray(rival.scores[task])).tolist() for task in candidate}
        for rival in rivals
    ]
    [score] = intervals([candidate], ranges, weights, seed)
    gaps = intervals(differences, of_differences(ranges), weights, seed)
    comparisons = [
        Comparison(rival.name, rival.kind, mean_score(rival.scores, weights), gap)
        for rival, gap in zip(rivals, gaps, strict=True)
    ]
    outcome = outcome_of(comparisons, stand_in is None)
    winner = outcome == "better"
    return Verdict(
        outcome,
        winner,
        stand_in or ("winner" if winner or not rivals else rivals[0].name),
        score,
        comparisons,
        detectable(differences[0], weights) if rivals else None,
        sentence(outcome, score, comparisons, stand_in),
    )


def outcome_of(comparisons: Sequence[Comparison], searched: bool) -> Outcome:
    """What the comparisons come to; the first is that with the best baseline of the selection split."""
    if not searched:
        return "too little searched"
    if not comparisons:
        return "nothing to compare"
    if all(c.beaten for c in comparisons):
        return "better"
    high = comparisons[0].difference.high
    return "worse" if high is not None and high < 0 else "no difference shown"


def sentence(outcome: Outcome, score: Interval, comparisons: Sequence[Comparison], stand_in: str | None) -> str:
    """The verdict in words."""
    holdout = f"{score.value:.3f} on the holdout items"
    if outcome == "too little searched":
        return (
            f"Too little searched: no candidate of the search was scored in full. {stand_in}, the best baseline on the "
            f"selection items, has {holdout} and is recommended."
        )
    if not comparisons:
        return f"Nothing to compare: {holdout}, but no baseline could be scored; the run's log.txt says why."
    first = comparisons[0]
    if outcome == "better":
        return (
            f"Winner: {holdout}, better than all {len(comparisons)} baselines, each at one-sided 5%; against "
            f"{first.name}, the best of them on the selection items, {span(first.difference)}."
        )
    if outcome == "worse":
        return (
            f"Worse than {first.name}: {holdout} against {first.score:.3f} ({span(first.difference)}). {first.name} is "
            "recommended."
        )
    standing = [c for c in comparisons if not c.beaten]
    rival = standing[0]
    return (
        f"No difference shown: {holdout} against {rival.score:.3f} of {rival.name} ({span(rival.difference)}). "
        f"{first.name}, the best baseline on the selection items, is recommended."
    )


def span(gap: Interval) -> str:
    """A difference in words."""
    if gap.low is None or gap.high is None:
        return f"{gap.value:+.3f}, too few items for an interval"
    return f"{gap.value:+.3f}, 90% interval {gap.low:+.3f} to {gap.high:+.3f}"


class JudgedBy(BaseModel):
    """What a task was judged by.  items: how many per split.  code: whether its file ran Python of its own."""

    metric: str
    objective: str
    items: dict[str, int]
    code: bool = False


class Written(BaseModel):
    """What those who show verdict.json look at."""

    outcome: Outcome
    winner: bool
    recommended: str
    sentence: str
    score: Interval
    comparisons: list[Comparison]
    detectable: float | None
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
