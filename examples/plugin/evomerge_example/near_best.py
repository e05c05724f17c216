"""near-best: a random step away from the best trial so far."""

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from evomerge.search.samplers.sampler_kind import SamplerKind, SamplerSetup


class NearBestSampler(BaseSampler):
    """Draws from a normal distribution around the parameters of the best trial, cut at the bounds.

    The standard deviation is `sigma0` of the configuration times the distance between the bounds.  All randomness
    comes from the seed of the trial and the study, so a resumed search proposes what an uninterrupted one would have.
    """

    def __init__(self, setup: SamplerSetup) -> None:
        self.axes = dict(setup.axes)
        self.sigma = setup.config.sigma0
        self.random = np.random.default_rng(setup.seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.axes)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = max(done, key=lambda t: (t.value, -t.number), default=None)
        drawn = {}
        for name, axis in self.axes.items():
            centre = best.params[name] if best else (axis.low + axis.high) / 2
            step = self.sigma * (axis.high - axis.low) * self.random.standard_normal()
            drawn[name] = float(np.clip(centre + step, axis.low, axis.high))
        return drawn

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise KeyError(f"{param_name} is not a parameter of this search: {', '.join(self.axes)}")


SAMPLER = SamplerKind(NearBestSampler)
