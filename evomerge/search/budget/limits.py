"""When a search ends: limits of trials, time, score and patience, as pure functions of the progress and two clocks."""

import math
import time
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pydantic import ValidationError

from evomerge.config.running import BudgetConfig
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError


@dataclass
class SearchProgress:
    """The facts about finished trials that decide when a search ends; updated trial by trial.

    trials: how many have finished, baselines included.
    best, best_number: value and number of the best trial among those that were scored on all items; None and -1 before
        there is one.  Of equal values the lowest number counts.
    sampled: numbers of the finished trials that the sampler proposed, in ascending order.
    """

    trials: int = 0
    best: float | None = None
    best_number: int = -1
    sampled: list[int] = field(default_factory=list)

    def add(self, number: int, value: float | None, sampled: bool) -> None:
        """Add a finished trial.

        value: None unless it was scored on all items.  sampled: whether the sampler proposed it.
        """
        self.trials += 1
        if sampled:
            insort(self.sampled, number)
        if value is not None and (self.best is None or (value, -number) > (self.best, -self.best_number)):
            self.best, self.best_number = value, number

    @property
    def since_best(self) -> int:
        """How many finished trials of the sampler have a higher number than the best trial."""
        return len(self.sampled) - bisect_right(self.sampled, self.best_number)


@dataclass(frozen=True)
class Moment:
    """The time of two clocks, in seconds.  wall: since the epoch; users can set it.  steady: of the monotonic clock."""

    wall: float
    steady: float


def now() -> Moment:
    """The present time of both clocks."""
    return Moment(time.time(), time.monotonic())


@dataclass(frozen=True)
class Deadline:
    """A moment on both clocks; it has passed as soon as one of the clocks has reached it.

    So setting the wall clock back gives no more time, and a machine that was suspended, whose monotonic clock stopped
    meanwhile, still ends at the given wall time.
    """

    at: Moment

    def seconds_left(self, moment: Moment) -> float:
        """Seconds until then, negative afterwards."""
        return min(self.at.wall - moment.wall, self.at.steady - moment.steady)


@dataclass(frozen=True)
class Limits:
    """The limits of a search.  No new trial begins once one of them is reached; None is no limit.

    trials: how many begin, baselines included.
    seconds: of the run from its beginning to its result, over all sessions.
    deadline: when the result must exist.
    target: value that the best trial must reach.
    patience: how many trials of the sampler may finish after the best one.
    """

    trials: int | None = None
    seconds: float | None = None
    deadline: Deadline | None = None
    target: float | None = None
    patience: int | None = None

    @property
    def timed(self) -> bool:
        """Whether there is a time by which the result must exist."""
        return self.seconds is not None or self.deadline is not None

    def seconds_left(self, elapsed: float, moment: Moment) -> float:
        """Seconds until the result must exist; infinite without such a time.  elapsed: seconds of the run so far."""
        times = [math.inf]
        if self.seconds is not None:
            times.append(self.seconds - elapsed)
        if self.deadline is not None:
            times.append(self.deadline.seconds_left(moment))
        return min(times)

    def reached(
        self, progress: SearchProgress, elapsed: float, moment: Moment, reserve: float = 0.0, running: int = 0
    ) -> str | None:
        """The limit that is reached, as a text; None if a new trial may begin.

        Limits other than `trials` do not count before a trial was scored on all items, as there would be no result.

        elapsed: seconds of the run so far.
        reserve: seconds that are kept for judging the finalists and writing the result.
        running: trials that have begun and not finished.
        """
        if self.trials is not None and progress.trials + running >= self.trials:
            return f"{progress.trials + running} trials have begun"
        if progress.best is None:
            return None
        if self.target is not None and progress.best >= self.target:
            return f"trial {progress.best_number} reached {progress.best:.4f}, the target is {self.target:g}"
        if self.patience is not None and progress.since_best >= self.patience:
            return f"{progress.since_best} trials since the best one"
        left = self.seconds_left(elapsed, moment)
        if left <= reserve:
            return f"{max(0.0, left):.0f} s are left, and judging the finalists may take {reserve:.0f} s"
        return None


def with_budget(
    config: SearchConfig,
    trials: int | None = None,
    timeout: str | float | None = None,
    target: float | None = None,
    patience: int | None = None,
) -> SearchConfig:
    """The configuration with the limits that the command line gives; None is not given.

    `trials` and `timeout` replace those of the configuration together: giving one removes the other.
    """
    given: dict[str, object] = {}
    if trials is not None or timeout is not None:
        given = {"trials": trials, "timeout": timeout}
    given |= {k: v for k, v in {"target": target, "patience": patience}.items() if v is not None}
    if not given:
        return config
    try:
        budget = BudgetConfig.model_validate(config.budget.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise EvomergeError(f"--{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}") from error
    return config.model_copy(update={"budget": budget})


def limits_of(budget: BudgetConfig, until: str | None = None, moment: Moment | None = None) -> Limits:
    """The limits of a session.

    With a deadline, the default of 100 trials for an empty budget does not apply.

    until: a time of day, see `deadline_of`.
    moment: when the session begins; None is now.
    """
    deadline = None if until is None else deadline_of(until, moment or now())
    trials = budget.trials if deadline else budget.most
    return Limits(trials, budget.timeout, deadline, budget.target, budget.patience)


def deadline_of(until: str, moment: Moment) -> Deadline:
    """The next moment with the local time `until`, such as `07:00`.

    Changes to and from summer time are respected.  A time that such a change skips becomes the time as much later as
    the clocks were changed; of a time that occurs twice, the next occurrence counts.
    """
    try:
        wanted = datetime.strptime(until, "%H:%M")
    except ValueError:
        raise EvomergeError(f"--until: {until!r} is not a time of day; write 07:00") from None
    today = datetime.fromtimestamp(moment.wall).replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    times = []
    for day in (today, today + timedelta(days=1)):
        first, second = (day.replace(fold=fold).timestamp() for fold in (0, 1))
        times += [first, max(first, second)]  # `second` is earlier where the clocks skip this time
    wall = min(t for t in times if t > moment.wall)
    return Deadline(Moment(wall, moment.steady + wall - moment.wall))
