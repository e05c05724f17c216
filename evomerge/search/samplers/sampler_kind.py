"""What a sampler is made from, how it is seeded, and what a new sampler says about itself."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from evomerge.config.running import SamplerConfig


def trial_seed(seed: int, number: int) -> int:
    """A 32-bit seed for trial `number` of a study with `seed`; the seeds of neighbours are unrelated.

    All randomness of a proposal comes from it, never from the state of a process: so a resumed study proposes what the
    uninterrupted one would have.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest(), "little")


@dataclass(frozen=True)
class SamplerSetup:
    """What a sampler is made from.

    config: the key `sampler` of the search configuration.
    axes: the bounds of each parameter by its name, in order; of one with named values, its choices.
    study_seed: the key `seed` of the search configuration.
    number: of the trial, from 0.
    workers: how many trials may run at once.
    ties: axis -> the group that it belongs to, of those that belong to one: its knob, source and component.
    pairs: axis -> its knob and source, of those that belong to a group.
    say: shows one line to the user.
    """

    config: SamplerConfig
    axes: Mapping[str, FloatDistribution | CategoricalDistribution]
    study_seed: int
    number: int
    workers: int = 1
    ties: Mapping[str, str] = field(default_factory=dict)
    pairs: Mapping[str, str] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None

    @property
    def seed(self) -> int:
        """The seed of this trial."""
        return trial_seed(self.study_seed, self.number)


class WholePointSampler(BaseSampler):
    """A sampler that proposes all parameters of a trial together.  axes: their bounds or choices, by name."""

    axes: Mapping[str, BaseDistribution]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes, as Optuna asks."""
        return dict(self.axes)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise KeyError(f"{param_name} is not an axis of this search: {', '.join(self.axes)}")


@dataclass(frozen=True)
class SamplerKind:
    """One entry of the registry.

    make: makes the sampler; it has to take its seed from the setup.
    requires: the packages that it imports and that evomerge does not depend on.
    serves_all_trials: the sampler is made once a process and seeds itself anew for each trial by `trial_seed`; else it
        is made anew for each trial.
    learned_start: the search climbs along the gradient before the sampler's first trial, see search/learned/.
    turns: with `goals: pareto` its trials go by several task weights in turn, see front.py.
    several: makes the sampler that takes its place with `goals: pareto`, which is told one value a task, see front.py.
    """

    make: Callable[[SamplerSetup], BaseSampler]
    requires: tuple[str, ...] = ()
    serves_all_trials: bool = False
    learned_start: bool = False
    turns: bool = True
    several: Callable[[SamplerSetup], BaseSampler] | None = None


@runtime_checkable
class SamplerWithMean(Protocol):
    """A sampler that draws from a distribution, whose mean is tried as a finalist."""

    def distribution_mean(self, study: Study) -> dict[str, float] | None:
        """The parameters at the mean after all trials of a study, None while there is no distribution yet."""
