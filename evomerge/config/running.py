"""The keys of a configuration that say how a search runs: sampler, budget, price, workers, races, and who is told."""

import re
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from evomerge.config.strict import Strict

COARSE = 30  # the default of `sampler.coarse`


class SamplerConfig(Strict):
    """What proposes the coefficients.

    name: a sampler of search/samplers/registry.py, or one that an installed package brings; `sampler_kind` checks it.
    sigma0: the first step of cma-es, as a share of the bounds.
    population: samples per generation of cma-es.
    coarse: trials of cma-es that search one value for each knob and source before those that search all; 0: none.
    steps: gradient steps of `auto` and `learned`, at most.
    """

    name: str = Field(default="auto", pattern=r"^[A-Za-z0-9._-]+$")
    sigma0: float = Field(default=0.2, gt=0, le=1)
    population: int | None = Field(default=None, ge=4)
    coarse: int = Field(default=COARSE, ge=0, exclude_if=lambda coarse: coarse == COARSE)
    steps: int | None = Field(default=None, ge=1)


def parse_duration(value: object) -> object:
    """`8h`, `90m`, `45s` and `1h30m` as seconds; ValueError for other text.  A number is returned unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", value.strip())
    if not match or not value.strip():
        raise ValueError(f"{value!r} is not a duration; write 8h, 90m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()


class BudgetConfig(Strict):
    """When the search ends: at the limit that is reached first.

    trials: the number of finished trials, baselines included.
    timeout: the seconds from the beginning to the result, over every resume.
    target: a score that the best trial reaches.
    patience: the number of the sampler's trials that have finished since the best one.
    """

    trials: int | None = Field(default=None, ge=1)
    timeout: Annotated[float, BeforeValidator(parse_duration), Field(gt=0)] | None = None
    target: float | None = None
    patience: int | None = Field(default=None, ge=1)

    @property
    def most(self) -> int | None:
        """The number of trials that ends the search: 100 if neither `trials`, `timeout` nor `patience` is given."""
        return self.trials or (100 if self.timeout is None and self.patience is None else None)


class PriceConfig(Strict):
    """The price of an hour of one device, and its currency (EUR, USD)."""

    per_device_hour: float = Field(ge=0)
    currency: str = Field(pattern=r"^[^\s]{1,8}$")


class WorkersConfig(Strict):
    """Limits of workers.

    stuck: a worker that sends nothing for so many seconds during a job is replaced.
    trial: a trial that takes more seconds fails; None is no limit.
    """

    stuck: Annotated[float, BeforeValidator(parse_duration), Field(gt=0)] = 300.0
    trial: Annotated[float, BeforeValidator(parse_duration), Field(gt=0)] | None = None


class RacingConfig(Strict):
    """Races: candidates that are worse than the best so far are stopped before all items are scored.

    enabled: whether there are races.
    alpha: the greatest probability that a candidate which is as good on the search items is stopped, over the random
        order of the items.
    informative: whether items on which models differ come early.
    """

    enabled: bool = True
    alpha: float = Field(default=0.02, gt=0, lt=1)
    informative: bool = True


def parse_racing(value: object) -> object:
    """`true` and `false` as a mapping; a mapping is returned unchanged."""
    if not isinstance(value, (bool, dict, RacingConfig)):
        raise ValueError("give true, false, or what to change: {alpha: 0.05, informative: false}")
    return {"enabled": value} if isinstance(value, bool) else value


RacingValue = Annotated[RacingConfig, BeforeValidator(parse_racing)]


class OnFinishConfig(Strict):
    """What happens when a search has ended, see `api/on_finish.py`.

    command: for the shell.
    webhook: an http or https address; `${NAME}` is a variable of the environment.
    """

    command: str | None = Field(default=None, min_length=1)
    webhook: str | None = Field(default=None, pattern=r"^https?://[^\s]+$")

    @model_validator(mode="after")
    def check_something(self) -> "OnFinishConfig":
        if self.command is None and self.webhook is None:
            raise ValueError("give a `command`, a `webhook` or both")
        return self


Tracker = Literal["trackio", "mlflow", "wandb"]


def parse_trackers(value: object) -> object:
    """One name as a list; a list is returned unchanged."""
    return [value] if isinstance(value, str) else value


Trackers = Annotated[list[Tracker], BeforeValidator(parse_trackers)]
