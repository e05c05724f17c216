"""The status of a run, read from its folder and its study; can be read at any time, also while the search runs."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from evomerge.config.schema import SearchConfig
from evomerge.search.budget.limits import limits_of, now
from evomerge.search.budget.usage import Usage, used_by
from evomerge.search.evaluation.agreement import Agreement, ScoredModel, agreements, scored_models
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.monitor.incumbent import task_scores
from evomerge.search.monitor.monitor import price_of
from evomerge.search.monitor.snapshot import TaskScore
from evomerge.search.run import Run
from evomerge.search.storage.method_choice import MethodChoice, recorded_choice
from evomerge.search.storage.sql_statements import without_collector
from evomerge.search.storage.step_record import StepRecord, steps_by_climb
from evomerge.search.storage.study import FINISHED, in_full, rank, recorded_type, trial_seconds
from evomerge.search.storage.trial_record import Seconds, record_of
from evomerge.search.verdict.front import Front, front_of

PARTS = tuple(each.name for each in fields(Seconds) if each.name != "total")


@dataclass(frozen=True)
class Status:
    """The status of a run.

    trials: all of them, also those that run.
    best: the best trial that was scored on all items; None if there is none.
    seconds: mean time of a finished trial.
    timing: mean seconds of each part of a trial; `other` is the rest.
    verdict: the content of verdict.json; None if there is none yet.
    baselines: names of the trials that are baselines, by number.
    used: by the whole run.
    compute_dtype: the type in which forwards are computed; None in old runs.
    relative: whether a value of 0 is the base's and 1 that of each task's best parent.
    models: those that were scored by objective and metric.
    agreements: how alike objective and metric rank models.
    choice: how the method was chosen; None if the configuration names one, or before the choice.
    climbs: the gradient steps of the learned start, climb by climb; empty without one.
    front: with `goals: pareto` the front of the trials; None if no trial has a place in it.
    tasks: what the best trial scored on the search items, beside the best parent of each task and the base.
    """

    config: SearchConfig
    trials: list[FrozenTrial]
    best: FrozenTrial | None
    seconds: float
    timing: dict[str, float]
    verdict: dict[str, Any] | None
    baselines: dict[int, str] = field(default_factory=dict)
    used: Usage = field(default_factory=Usage)
    compute_dtype: str | None = None
    relative: bool = False
    models: list[ScoredModel] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    choice: MethodChoice | None = None
    climbs: list[list[StepRecord]] = field(default_factory=list)
    front: Front | None = None
    tasks: tuple[TaskScore, ...] = ()

    def count(self, state: TrialState) -> int:
        """How many trials are in a state."""
        return sum(t.state == state for t in self.trials)

    @property
    def shares(self) -> list[float]:
        """Of every trial that was stopped by a race, the share of the items that were scored."""
        return [share for t in self.trials if (share := record_of(t).partial) is not None]

    @property
    def evaluated(self) -> float:
        """The share of the items that a trial was scored on, on average."""
        partial = self.shares
        full = sum(map(in_full, self.trials))
        return (sum(partial) + full) / (len(partial) + full) if partial else 1.0

    @property
    def finished(self) -> int:
        """How many trials have finished."""
        return self.count(TrialState.COMPLETE) + self.count(TrialState.FAIL)

    @property
    def endings(self) -> str:
        """How many trials did not end as they should."""
        partial = len(self.shares)
        broken = sum(record_of(t).broken is not None for t in self.trials)
        text = f", {partial} stopped early ({self.evaluated:.0%} of all items scored)" if partial else ""
        failed = self.count(TrialState.FAIL)
        return text + (f", {broken} broken" if broken else "") + (f", {failed} failed" if failed else "")

    @property
    def price(self) -> tuple[float, str] | None:
        """The price of device time so far as (amount, currency)."""
        return price_of(self.used.device_seconds, self.config.price)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until a limit of the configuration is reached; None if unknown or if there is a verdict."""
        finished = [t for t in self.trials if t.state in FINISHED]
        limits = limits_of(self.config.budget)
        left = limits.seconds_left(self.used.seconds, now())
        if limits.trials is not None and self.seconds:
            left = min(left, (limits.trials - len(finished)) * self.seconds)
        return max(0.0, left) if left < math.inf and self.verdict is None else None

    def as_dict(self) -> dict[str, Any]:
        """What `evomerge status` shows, as JSON has it."""
        config, best = self.config, self.best
        named = None if best is None else self.baselines.get(best.number)
        return {
            "name": config.name,
            "method": config.method if self.choice is None else self.choice.chosen,
            "sources": [source.name for source in config.sources],
            "sampler": config.sampler.name,
            "compute_dtype": self.compute_dtype,
            "trials": {
                "finished": self.finished,
                "planned": config.budget.most,
                "running": self.count(TrialState.RUNNING),
                "stopped_early": len(self.shares),
                "failed": self.count(TrialState.FAIL),
            },
            "best": best and {"trial": best.number, "value": best.value, "baseline": named},
            "relative": self.relative,
            "tasks": [asdict(task) for task in self.tasks],
            "gradient_steps": sum(map(len, self.climbs)),
            "agreements": [found.sentence for found in self.agreements],
            "front": self.front
            and {m.name: dict(zip(self.front.tasks, m.values, strict=True)) for m in self.front.members},
            "seconds_per_trial": self.seconds or None,
            "seconds_left": self.seconds_left,
            "timing": self.timing,
            "used": self.used.as_dict(),
            "verdict": self.verdict,
        }


@without_collector()
def read_status(run: Run) -> Status:
    """Read the status of a run.  EvomergeError if its study cannot be read."""
    config = run.config()
    study = run.study()
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    ran = [t for t in trials if t.state in FINISHED and record_of(t).seconds.forward is not None]
    finished = ran or [t for t in trials if t.state in FINISHED and trial_seconds(t) > 0]
    best = max(filter(in_full, trials), key=rank, default=None)
    seconds = sum(map(trial_seconds, finished)) / len(finished) if finished else 0.0
    names = {t.number: str(t.user_attrs["baseline"]) for t in trials if "baseline" in t.user_attrs}
    used = used_by(trials, study.user_attrs)
    models = scored_models(trials, study.user_attrs)
    front = front_of(trials, study.user_attrs) if config.goals == "pareto" else None
    scale = Scale.from_json(study.user_attrs[SCALE]) if SCALE in study.user_attrs else None
    tasks: tuple[TaskScore, ...] = ()
    if best is not None and scale is not None:
        tasks = task_scores(best, study.user_attrs, scale, "base", [source.name for source in config.sources])
    return Status(
        config,
        trials,
        best,
        seconds,
        mean_timing(complete),
        run.verdict(),
        names,
        used,
        recorded_type(study.user_attrs),
        scale is not None and scale.relative,
        models,
        agreements(models, study.user_attrs),
        recorded_choice(study.user_attrs) if config.methods else None,
        steps_by_climb(study.user_attrs),
        front if front and front.trials else None,
        tasks,
    )


def mean_timing(trials: list[FrozenTrial]) -> dict[str, float]:
    """Mean seconds per part over trials; the first is left out, it warms caches up, and so is one that ran nothing
    because its scores were known (the greedy soup's)."""
    timed = [s for t in trials[1:] if (s := record_of(t).seconds).forward is not None]
    if not timed:
        return {}
    timing = {part: sum(getattr(s, part) or 0.0 for s in timed) / len(timed) for part in PARTS}
    total = sum(s.total or 0.0 for s in timed) / len(timed)
    timing["other"] = max(0.0, total - sum(timing[part] for part in PARTS))
    return timing
