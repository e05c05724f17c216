"""Whether a recipe loses no more than a margin against the candidate, by the items of the search split."""

import numpy as np

from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.evaluation.task_set import Scores
from evomerge.search.verdict.intervals import (
    Interval,
    ItemScores,
    Range,
    intervals,
    ranges_of_differences,
    score_range,
)


class NoLoss:
    """Compares recipes with the candidate."""

    def __init__(self, evaluations: Evaluations, candidate: Scores, margin: float) -> None:
        """candidate: its scores by every metric.  margin: the largest loss."""
        self.tasks = evaluations.task_set
        self.scale = evaluations.scale
        self.candidate = candidate
        self.margin = margin

    def metric_difference(self, scores: Scores) -> Interval:
        """The mean metric minus the candidate's, paired by items."""
        own, theirs = (self.tasks.scores_of(s, "metric") for s in (scores, self.candidate))
        ranges = {t.name: score_range(t.metric, [own[t.name], theirs[t.name]]) for t in self.tasks.goals}
        return self.difference(own, theirs, ranges)

    def value_difference(self, scores: Scores) -> Interval:
        """The mean value of the items minus the candidate's, paired by items."""
        own, theirs = (
            {task: values.tolist() for task, values in self.scale.item_values(s).items()}
            for s in (scores, self.candidate)
        )
        ranges: dict[str, Range | None] = {
            task: (min(*own[task], *theirs[task]), max(*own[task], *theirs[task])) for task in own
        }
        return self.difference(own, theirs, ranges)

    def difference(self, own: ItemScores, theirs: ItemScores, ranges: dict[str, Range | None]) -> Interval:
        """The mean difference of two models' item scores.  ranges: of an item's score, by task."""
        differences = {task: np.subtract(own[task], theirs[task]).tolist() for task in own}
        return intervals([differences], ranges_of_differences(ranges), self.tasks.weights, 0)[0]

    def holds_guards(self, scores: Scores) -> bool:
        """Whether no guard is broken more than by the candidate."""
        return all(g.violation(scores) <= g.violation(self.candidate) for g in self.scale.guards.values())

    def within(self, metric: Interval, value: Interval) -> bool:
        """Whether the metric excludes a loss beyond the margin, and the value does not show one."""
        excluded = metric.low is not None and metric.low > -self.margin
        return excluded and value.high is not None and value.high >= -self.margin
