"""When a search ends: limits of trials, time, score and patience, as pure functions of what the study knows."""

import math
import time
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pydantic import ValidationError

from evomerge.config.schema import BudgetConfig, SearchConfig
from evomerge.errors import EvomergeError


@dataclass
class Progress:
    """What limits look at, kept up to date trial by trial.

    trials: finished ones, baselines included.  best, best_number: of those that were evaluated in full, None and -1
    before there is one; of equal ones the first by number.  sampled: numbers of the finished trials that the sampler
    proposed, in order.
    """

    trials: int = 0
    best: float | None = None
    best_number: int = -1
    sampled: list[int] = field(default_factory=list)

    def add(self, number: int, value: float | None, sampled: bool) -> None:
        """One more finished trial.  value: None unless it was evaluated in full."""
        self.trials += 1
        if sampled:
            insort(self.sampled, number)
        if value is not None and (self.best is None or (value, -number) > (self.best, -self.best_number)):
            self.best, self.best_number = value, number

    @property
    def since_best(self) -> int:
        """How many sampled trials later than the best one have finished."""
        return len(self.sampled) - bisect_right(self.sampled, self.best_number)


@dataclass(frozen=True)
class Moment:
    """Seconds of both clocks.  wall: since the epoch, which a person may set.  steady: monotonic."""

    wall: float
    steady: float


def now() -> Moment:
    return Moment(time.time(), time.monotonic())


@dataclass(frozen=True)
class Deadline:
    """A moment on both clocks; the first of the two to reach it counts.

    Whoever sets the clock back wins no time, and a machine that was suspended (its monotonic clock stood still) does
    not go on past the hour.
    """

    at: Moment

    def left(self, moment: Moment) -> float:
        """Seconds until then, negative afterwards."""
        return min(self.at.wall - moment.wall, self.at.steady - moment.steady)


@dataclass(frozen=True)
class Limits:
    """When no new trial begins; whichever comes first.

    trials: that begin, baselines included.  seconds: of the run from its beginning to its result, over all sessions.
    deadline: when the result is to be there.  target: the best value is no lower.  patience: sampled trials have
    finished since the best one.
    """

    trials: int | None = None
    seconds: float | None = None
    deadline: Deadline | None = None
    target: float | None = None
    patience: int | None = None

    @property
    def timed(self) -> bool:
        """Whether there is a time at which the result must be there."""
        return self.seconds is not None or self.deadline is not None

    def left(self, elapsed: float, moment: Moment) -> float:
        """Seconds until the result must be there; infinite without such a time.  elapsed: seconds of the run so far."""
        times = [math.inf]
        if self.seconds is not None:
            times.append(self.seconds - elapsed)
        if self.deadline is not None:
            times.append(self.deadline.left(moment))
        return min(times)

    def reached(
        self, progress: Progress, elapsed: float, moment: Moment, reserve: float = 0.0, in_hand: int = 0
    ) -> str | None:
        """Why no new trial may begin, None if one may.

        reserve: seconds that the time limits keep for what follows.  in_hand: trials that have begun and not finished.
        Time ends nothing before there is a candidate evaluated in full: without one there would be no result at all.
        """
        if self.trials is not None and progress.trials + in_hand >= self.trials:
            return f"{progress.trials + in_hand} trials have begun"
        if progress.best is None:
            return None
        if self.target is not None and progress.best >= self.target:
            return f"trial {progress.best_number} reached {progress.best:.4f}, the target is {self.target:g}"
        if self.patience is not None and progress.since_best >= self.patience:
            return f"{progress.since_best} trials since the best one"
        left = self.left(elapsed, moment)
        if left <= reserve:
            return f"{max(0.0, left):.0f} s are left, of which what follows may need {reserve:.0f}"
        return None


def with_budget(
    config: SearchConfig,
    trials: int | None = None,
    timeout: str | float | None = None,
    target: float | None = None,
    patience: int | None = None,
) -> SearchConfig:
    """The configuration with the budget of the command line, where it gives one.

    `trials` and `timeout` replace those of the configuration together; `target` and `patience` each their own.
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
    """The limits of a session that begins at `moment` (now).  until: a time of day, see `deadline_of`.

    A deadline ends a search by itself, so the hundred trials of a budget that says nothing do not apply beside it.
    """
    deadline = None if until is None else deadline_of(until, moment or now())
    trials = budget.trials if deadline else budget.most
    return Limits(trials, budget.timeout, deadline, budget.target, budget.patience)


def deadline_of(until: str, moment: Moment) -> Deadline:
    """`07:00` as the next moment with that local time.

    By the local calendar, whatever changes to or from summer time lie between.  A time that such a change leaves out
    is that much later; of one that comes twice, the next to come.
    """
    try:
        wanted = datetime.strptime(until, "%H:%M")
    except ValueError:
        raise EvomergeError(f"--until: {until!r} is not a time of day; write 07:00") from None
    today = datetime.fromtimestamp(moment.wall).replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    times = []
    for day in (today, today + timedelta(days=1)):
        first, second = (day.replace(fold=fold).timestamp() for fold in (0, 1))
        times += [first, max(first, second)]  # `second` is earlier where the clocks leave this time out
    wall = min(t for t in times if t > moment.wall)
    return Deadline(Moment(wall, moment.steady + wall - moment.wall))
