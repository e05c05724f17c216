"""How long a trial of a search takes, how many there will be, and what disk they need."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.config.schema import SearchConfig
from evomerge.evaluate.tasks import Split
from evomerge.search.budget.limits import Limits, limits_of, now
from evomerge.search.budget.reserve import UNMEASURED, RemainingWork, StepSeconds, reserve_seconds
from evomerge.search.check.probe import Probe
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.learned.learn import ITEMS, STEPS
from evomerge.search.samplers.registry import sampler_kind
from evomerge.search.verdict.finalists import FINALISTS

BACKWARD = 3.0  # how many times as long an item takes in a gradient step as in a forward


@dataclass(frozen=True)
class Forecast:
    """What a search will take, by what was measured on some items; candidates that lose early take less.

    trial: seconds of a trial on all items.  scoring: task -> its part of them.  merge: the merge's part.
    start: seconds before the first candidate: base and sources by every metric, and the other baselines.
    steps: seconds of the learned start; 0 without one.
    end: seconds after the last trial.
    limit: seconds that the search has, None for as long as it takes.
    trials: the number that ends the search, None for no limit.
    baselines: how many of the trials are baselines.
    disk, disk_left: bytes of an exported model, and free in the working folder.
    """

    trial: float
    scoring: dict[str, float]
    merge: float
    start: float
    steps: float
    end: float
    limit: float | None
    trials: int | None
    baselines: int
    disk: int
    disk_left: int

    @property
    def candidates(self) -> int | None:
        """How many candidates the time allows; None without a time limit."""
        if self.limit is None:
            return None
        return max(0, math.floor((self.limit - self.start - self.steps - self.end) / self.trial))

    def needed(self, candidates: int) -> float:
        """Seconds for so many candidates."""
        return self.start + self.steps + candidates * self.trial + self.end

    @property
    def whole(self) -> float:
        """Seconds until the result."""
        most = math.inf if self.trials is None else self.needed(self.trials)
        return min(most, math.inf if self.limit is None else self.limit)


def forecast(
    config: SearchConfig,
    task_set: TaskSet,
    probe: Probe,
    size: int,
    baselines: int,
    workers: int = 1,
    limits: Limits | None = None,
) -> Forecast:
    """What a search will take.

    probe: of its first items.
    size: bytes of the models' weights in `dtype`.
    baselines: how many trials are baselines.
    workers: how many trials run at once.
    limits: of the search; None is what the configuration says.
    """
    limits = limits or limits_of(config.budget)
    left = limits.seconds_left(0.0, now())
    counts: Mapping[Split, int] = task_set.item_counts
    scoring = {task.name: task.seconds * len(task_set.items[task.name]["search"]) for task in probe.tasks}
    trial = probe.merge + sum(scoring.values())
    item = sum(scoring.values()) / counts["search"]
    every = item if all(map(task_set.scores_metric, task_set.tasks)) else UNMEASURED * item
    models = 1 + len(config.sources)
    others = 3 + len(config.baselines)  # recommended recipes and the greedy soup
    seconds = StepSeconds(probe.merge, every, trial, item)
    work = RemainingWork({"selection": FINALISTS + models + others, "holdout": models + 2}, counts)
    learned = sampler_kind(config.sampler.name).learned_start
    return Forecast(
        trial=trial / workers,
        scoring=scoring,
        merge=probe.merge,
        start=(models * (probe.merge + every * counts["search"]) + others * trial) / workers,
        steps=(config.sampler.steps or STEPS) * (probe.merge + BACKWARD * ITEMS * item) if learned else 0.0,
        end=reserve_seconds(seconds, work, workers),
        limit=left if left < math.inf else None,
        trials=limits.trials,
        baselines=baselines,
        disk=size,
        disk_left=shutil.disk_usage(Path.cwd()).free,
    )
