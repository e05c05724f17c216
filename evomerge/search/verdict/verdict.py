"""The verdict: is the chosen candidate better than every baseline, by more than luck?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from evomerge.search.verdict.guards import GuardResult, not_kept
from evomerge.search.verdict.intervals import (
    Interval,
    ItemScores,
    Range,
    detectable,
    intervals,
    mean_score,
    ranges_of_differences,
    score_range,
)

Outcome = Literal["better", "no difference shown", "worse", "too little searched"]

ENOUGH_SEARCHED = 20  # candidates; a search of fewer that found nothing better says nothing about the sources
FEWEST_GAINS = 5  # items that gain while none loses, which chance alone gives in 1 of 32 cases, below 5%


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
    same: whether both have the same score on every item.
    """

    name: str
    kind: str
    score: float
    difference: Interval
    breaks: list[str] = field(default_factory=list)
    same: bool = False

    @property
    def beaten(self) -> bool:
        """Whether the candidate is better, at one-sided 5%."""
        return self.difference.low is not None and self.difference.low > 0


@dataclass(frozen=True)
class Verdict:
    """The result of a search.

    outcome: `better` than every baseline that counts; `no difference shown`; `worse` than the baseline that is
        recommended instead; `too little searched`: nothing better was found among too few candidates.
    winner: whether the outcome is `better`.
    recommended: `winner`, or the name of the baseline that was best on the selection split.
    score: the candidate's mean score on the holdout split.
    comparisons: with every baseline, the best of the selection split first.
    detectable: the gain over that baseline which these items show four times in five; None if they cannot show any.
    sentence: the outcome with its reason, in words.
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
    searched: int = ENOUGH_SEARCHED,
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
    searched: how many candidates the search tried.
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
        Comparison(
            rival.name,
            rival.kind,
            mean_score(rival.scores, weights),
            gap,
            list(rival.breaks),
            not any(map(any, difference.values())),
        )
        for rival, gap, difference in zip(rivals, gaps, differences, strict=True)
    ]
    counting = [c for c in comparisons if not c.breaks] or comparisons
    outcome = outcome_of(counting, stand_in, searched, guards)
    winner = outcome == "better"
    smallest = smallest_gain(differences[0], ranges, weights) if rivals else None
    return Verdict(
        outcome,
        winner,
        stand_in or ("winner" if winner or not rivals else rivals[0].name),
        score,
        comparisons,
        smallest,
        sentence(outcome, score, counting, stand_in, searched, guards, smallest),
        list(guards),
    )


def outcome_of(
    comparisons: Sequence[Comparison], stand_in: str | None, searched: int, guards: Sequence[GuardResult]
) -> Outcome:
    """The outcome of the comparisons.

    comparisons: those that count; first the one with the best baseline of the selection split.
    stand_in, searched, guards: as in `judge`.
    """
    beats_all = bool(comparisons) and stand_in is None and all(c.beaten for c in comparisons)
    if beats_all and not not_kept(guards):
        return "better"
    if searched < ENOUGH_SEARCHED:
        return "too little searched"
    if stand_in is not None:
        return "worse"
    if beats_all:
        return "worse" if any(g.state == "broken" for g in guards) else "no difference shown"
    high = comparisons[0].difference.high if comparisons else None
    return "worse" if high is not None and high < 0 else "no difference shown"


def smallest_gain(
    differences: ItemScores, ranges: Mapping[str, Range | None], weights: Mapping[str, float]
) -> float | None:
    """The smallest gain that these items can show: `detectable`, or if that is more, what FEWEST_GAINS items make.

    differences: task -> paired differences of two models' scores.
    ranges: task -> the range of an item's score.
    weights: task -> its weight.

    None if they can show none.
    """
    by_variance = detectable(differences, weights)
    widths = {task: r[1] - r[0] for task, r in ranges.items() if r is not None}
    if by_variance is None or len(widths) < len(differences):
        return None
    total = sum(weights[task] for task in differences)
    shares = {task: weights[task] / total * width for task, width in widths.items()}
    found = max(by_variance, FEWEST_GAINS * max(share / len(differences[task]) for task, share in shares.items()))
    return found if found <= sum(shares.values()) else None


def sentence(
    outcome: Outcome,
    score: Interval,
    comparisons: Sequence[Comparison],
    stand_in: str | None,
    searched: int,
    guards: Sequence[GuardResult],
    smallest: float | None,
) -> str:
    """The outcome and why.  smallest: the smallest gain that the items can show.  The others: as in `outcome_of`."""
    holdout = f"{score.value:.3f} on the holdout items"
    keeping = " that keep the guards" if guards else ""
    others = f"all {len(comparisons)} baselines{keeping}"
    first = comparisons[0] if comparisons else None
    if outcome == "better":
        assert first is not None, "a candidate is better than some baseline"
        return (
            f"Better: {holdout}, better than {others}, each at one-sided 5%; against "
            f"{first.name}, the best of them on the selection items, {difference_text(first.difference, first.same)}."
        )
    if outcome == "too little searched":
        tried = f"Too little searched: {searched or 'no'} candidate{'s were' if searched != 1 else ' was'} tried"
        if stand_in is None and first is None:
            return f"{tried}, and no baseline could be scored; the run's log.txt says why."
        best = f"; the best has {holdout}, {against(comparisons)}" if stand_in is None else ""
        name = stand_in or comparisons[0].name
        own = f" with {holdout}" if stand_in else ""
        return (
            f"{tried}, fewer than {ENOUGH_SEARCHED}{best}. {name}, the best baseline on the selection items, is "
            f"recommended{own}."
        )
    if stand_in is not None:
        return (
            f"Worse than {stand_in}: on the selection items it is better than the best of the {searched} candidates "
            f"that were tried{' and keep the guards' if guards else ''}. It has {holdout} and is recommended."
        )
    if first is None:
        return f"No difference shown: {holdout}, but no baseline could be scored; the run's log.txt says why."
    title = f"Worse than {first.name}" if outcome == "worse" else "No difference shown"
    if all(c.beaten for c in comparisons):
        return f"{title}: {holdout}, better than {others}, but {not_kept(guards)}. {first.name} is recommended."
    if outcome == "worse":
        return f"{title}: {holdout}, {against([first])}. {first.name} is recommended."
    shown = "too few to show any gain" if smallest is None else f"enough to show a gain of {smallest:.3f}, but not less"
    return (
        f"{title}: {holdout}, {against(comparisons)}; these items are {shown}. "
        f"{first.name}, the best baseline on the selection items, is recommended."
    )


def against(comparisons: Sequence[Comparison]) -> str:
    """The comparison with the first baseline that is not beaten, in words."""
    rival = next((c for c in comparisons if not c.beaten), comparisons[0])
    return f"against {rival.score:.3f} of {rival.name} ({difference_text(rival.difference, rival.same)})"


def difference_text(gap: Interval, same: bool = False) -> str:
    """A difference and its interval in words.  same: whether both models have the same score on every item."""
    if same:
        return "the same score on every item"
    if gap.low is None or gap.high is None:
        return f"{gap.value:+.3f}, too few items for an interval"
    return f"{gap.value:+.3f}, 90% interval {gap.low:+.3f} to {gap.high:+.3f}"
