"""The verdict: is the chosen candidate better than every baseline, by more than luck?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from evomerge.search.verdict.guards import GuardResult, not_kept
from evomerge.search.verdict.intervals import (
    Interval,
    ItemScores,
    detectable,
    intervals,
    mean_score,
    ranges_of_differences,
    score_range,
)

Outcome = Literal[
    "better",
    "guard not kept",
    "no difference shown",
    "worse",
    "nothing better found",
    "too little searched",
    "nothing to compare",
]


@dataclass(frozen=True)
class Rival:
    """A baseline on the holdout split.

    name, kind: the baseline's.
    scores: its metric on every item.
    breaks: the guards that it breaks on the selection split.
    """

    name: str
    kind: str
    scores: ItemScores
    breaks: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """The chosen candidate against one baseline on the holdout split.

    name, kind: the baseline's.
    score: the baseline's mean score.
    difference: the candidate's mean score minus the baseline's, paired by items.
    breaks: the guards that the baseline breaks on the selection split; if another one breaks none, it need not be
        beaten.
    """

    name: str
    kind: str
    score: float
    difference: Interval
    breaks: list[str] = field(default_factory=list)

    @property
    def beaten(self) -> bool:
        """Whether the candidate is better, at one-sided 5%."""
        return self.difference.low is not None and self.difference.low > 0


@dataclass(frozen=True)
class Verdict:
    """The result of a search.

    winner: whether the candidate beats every baseline that counts, and keeps every guard.
    recommended: `winner`, or the name of the baseline that was best on the selection split.
    score: the candidate's mean score on the holdout split.
    comparisons: with every baseline, the best of the selection split first.
    detectable: the gain over that baseline which these items show four times in five.
    sentence: the outcome in words.
    guards: whether the candidate keeps them.
    """

    outcome: Outcome
    winner: bool
    recommended: str
    score: Interval
    comparisons: list[Comparison]
    detectable: float | None
    sentence: str
    guards: list[GuardResult] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    candidate: ItemScores,
    rivals: Sequence[Rival],
    metrics: Mapping[str, str],
    weights: Mapping[str, float],
    seed: int,
    stand_in: str | None = None,
    searched: bool = True,
    guards: Sequence[GuardResult] = (),
) -> Verdict:
    """Compare the chosen candidate with every baseline on the same holdout items.

    candidate: its metric on every item.
    rivals: the baselines; first the one that was best on the selection split, of those that break no guard there.
    metrics: task -> its metric.
    weights: task -> its weight.
    seed: of the bootstrap.
    stand_in: the name of the baseline that takes the candidate's place, where the search has none that is at least as
        good as every baseline on the selection split.
    searched: whether any candidate of the search was scored on the selection split.
    guards: whether the candidate keeps them on these items.

    The candidate wins if the lower end of the paired difference lies above zero against each rival, and if it keeps
    each guard.  This is an intersection-union test (Berger 1982): luck alone makes a winner in at most 5% of all
    searches, however many rivals and guards there are.  Rivals that break a guard on the selection split do not count
    where others break none.
    """
    tables = [candidate, *(rival.scores for rival in rivals)]
    ranges = {task: score_range(metrics[task], [table[task] for table in tables]) for task in candidate}
    differences = [
        {task: (np.asarray(candidate[task]) - np.asarray(rival.scores[task])).tolist() for task in candidate}
        for rival in rivals
    ]
    [score] = intervals([candidate], ranges, weights, seed)
    gaps = intervals(differences, ranges_of_differences(ranges), weights, seed)
    comparisons = [
        Comparison(rival.name, rival.kind, mean_score(rival.scores, weights), gap, list(rival.breaks))
        for rival, gap in zip(rivals, gaps, strict=True)
    ]
    counting = [c for c in comparisons if not c.breaks] or comparisons
    outcome = outcome_of(counting, stand_in, searched, guards)
    winner = outcome == "better"
    return Verdict(
        outcome,
        winner,
        stand_in or ("winner" if winner or not rivals else rivals[0].name),
        score,
        comparisons,
        detectable(differences[0], weights) if rivals else None,
        sentence(outcome, score, counting, stand_in, guards),
        list(guards),
    )


def outcome_of(
    comparisons: Sequence[Comparison], stand_in: str | None, searched: bool, guards: Sequence[GuardResult]
) -> Outcome:
    """The outcome of the comparisons.

    comparisons: those that count; first the one with the best baseline of the selection split.
    stand_in, searched, guards: as in `judge`.
    """
    if stand_in is not None:
        return "nothing better found" if searched else "too little searched"
    if not comparisons:
        return "nothing to compare"
    if all(c.beaten for c in comparisons):
        return "guard not kept" if not_kept(guards) else "better"
    high = comparisons[0].difference.high
    return "worse" if high is not None and high < 0 else "no difference shown"


def sentence(
    outcome: Outcome,
    score: Interval,
    comparisons: Sequence[Comparison],
    stand_in: str | None,
    guards: Sequence[GuardResult],
) -> str:
    """The outcome in words.  The arguments are those of `outcome_of`."""
    holdout = f"{score.value:.3f} on the holdout items"
    if outcome == "too little searched":
        return (
            f"Too little searched: no candidate of the search was scored in full. {stand_in}, the best baseline on the "
            f"selection items, has {holdout} and is recommended."
        )
    if outcome == "nothing better found":
        keeping = " that keeps the guards" if guards else ""
        return (
            f"Nothing better found: on the selection items {stand_in} is better than every candidate of the "
            f"search{keeping}. It has {holdout} and is recommended."
        )
    if not comparisons:
        return f"Nothing to compare: {holdout}, but no baseline could be scored; the run's log.txt says why."
    first = comparisons[0]
    others = f"all {len(comparisons)} baselines" + (" that keep the guards" if guards else "")
    if outcome == "better":
        return (
            f"Winner: {holdout}, better than {others}, each at one-sided 5%; against "
            f"{first.name}, the best of them on the selection items, {difference_text(first.difference)}."
        )
    if outcome == "guard not kept":
        return f"No winner: {holdout}, better than {others}, but {not_kept(guards)}. {first.name} is recommended."
    if outcome == "worse":
        return (
            f"Worse than {first.name}: {holdout} against {first.score:.3f} ({difference_text(first.difference)}). "
            f"{first.name} is recommended."
        )
    rival = next(c for c in comparisons if not c.beaten)
    against = f"{rival.score:.3f} of {rival.name} ({difference_text(rival.difference)})"
    return (
        f"No difference shown: {holdout} against {against}. "
        f"{first.name}, the best baseline on the selection items, is recommended."
    )


def difference_text(gap: Interval) -> str:
    """A difference and its interval in words."""
    if gap.low is None or gap.high is None:
        return f"{gap.value:+.3f}, too few items for an interval"
    return f"{gap.value:+.3f}, 90% interval {gap.low:+.3f} to {gap.high:+.3f}"
