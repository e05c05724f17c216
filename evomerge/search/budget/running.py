"""The budget of a running search: whether another trial may begin, and whether the time is enough to search at all."""

from evomerge.search.budget.enough import too_short
from evomerge.search.budget.limits import now
from evomerge.search.budget.reserve import ReservedTime, step_seconds
from evomerge.search.scored_baselines import ScoredBaselines
from evomerge.search.verdict.verdict import ENOUGH_SEARCHED


class RunningBudget:
    """The limits of a search, against what it has used.

    baselines: those of the search, whose trials come first.
    export: seconds that writing the model will take.
    """

    def __init__(self, baselines: ScoredBaselines, export: float) -> None:
        evaluations = baselines.evaluations
        self.study = baselines.study
        self.baselines = baselines
        self.monitor = evaluations.monitor
        self.workers = evaluations.pool.size
        self.reserved = ReservedTime(self.study, baselines.found, evaluations.task_set.item_counts, export)

    def ended(self) -> str | None:
        """Why no trial may begin any more; None if one may."""
        limits, monitor = self.monitor.limits, self.monitor
        monitor.reserve(self.reserved.seconds(self.workers))
        running = self.study.count - monitor.progress.trials
        return limits.reached(monitor.progress, monitor.stopwatch.elapsed.seconds, now(), monitor.reserved, running)

    def say_if_too_short(self) -> None:
        """Say so if the time limit leaves room for hardly any candidate."""
        limits, monitor = self.monitor.limits, self.monitor
        seconds = step_seconds(self.study.trials, self.study.stored.user_attrs) if limits.timed else None
        if seconds is None:
            return
        if limits.trials is not None and limits.trials - monitor.progress.trials < ENOUGH_SEARCHED:
            return  # the user wants no more
        elapsed, proposed = monitor.stopwatch.elapsed.seconds, len(monitor.progress.sampled)
        left, reserve = max(0.0, limits.seconds_left(elapsed, now())), self.reserved.seconds(self.workers)
        first = len(self.baselines.untried())
        if said := too_short(left, reserve, seconds.trial, self.workers, first, proposed, elapsed):
            monitor.say(f"note: {said}")
