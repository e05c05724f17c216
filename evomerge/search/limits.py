"""When a search ends: what the command line says over what the configuration says."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import ValidationError

from evomerge.config.schema import BudgetConfig, SearchConfig
from evomerge.errors import EvomergeError


@dataclass(frozen=True)
class Limits:
    """When the search ends.  trials: finished ones, baselines included.  seconds: of search so far and from now on
    together.  deadline: `time.time()` at which no new trial begins."""

    trials: int | None = None
    seconds: float | None = None
    deadline: float | None = None


def with_budget(config: SearchConfig, trials: int | None, timeout: str | None) -> SearchConfig:
    """The configuration with the budget of the command line, where it gives one."""
    if trials is None and timeout is None:
        return config
    try:
        budget = BudgetConfig.model_validate({"trials": trials, "timeout": timeout})
    except ValidationError as error:
        raise EvomergeError(f"--timeout: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    return config.model_copy(update={"budget": budget})


def deadline_of(until: str | None) -> float | None:
    """`07:00` as the next moment with that local time, in seconds since the epoch."""
    if until is None:
        return None
    try:
        wanted = datetime.strptime(until, "%H:%M")
    except ValueError:
        raise EvomergeError(f"--until: {until!r} is not a time of day; write 07:00") from None
    now = datetime.now()
    moment = now.replace(hour=wanted.hour, minute=wanted.minute, second=0, microsecond=0)
    return (moment if moment > now else moment + timedelta(days=1)).timestamp()
