"""CMA-ES (Hansen 2016) as an Optuna sampler: a thin driver of the `cmaes` library without a state of its own.

The state is the study: every finished trial is told to the optimizer again, in order, when a process first asks.
A resumed study therefore goes on exactly as the uninterrupted one would have, and nothing is pickled.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


def trial_seed(seed: int, number: int) -> int:
    """A 32-bit seed for one trial of one study; neighbours share nothing."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=4).digest(), "little")


def is_enqueued(trial: FrozenTrial) -> bool:
    """Whether a person or a baseline chose the parameters, not the sampler."""
    return "fixed_params" in trial.system_attrs


class CmaEsSampler(BaseSampler):
    """Maximises over float axes, scaled to the unit cube.

    axes: the axes in order.  sigma0: the first step size in the unit cube.  population: samples per generation
    (None: 4 + floor(3 ln D)).  The start mean is the best enqueued trial, or the middle of the cube.  When the
    distribution has collapsed the search starts again at a random point with twice the population (IPOP, Auger
    and Hansen 2005).
    """

    def __init__(self, axes: dict[str, FloatDistribution], seed: int, sigma0: float, population: int | None) -> None:
        self.axes = axes
        self.seed = seed
        self.sigma0 = sigma0
        self.population = population
        self.low = np.array([d.low for d in axes.values()])
        self.width = np.array([d.high - d.low for d in axes.values()])
        self.optimizer: CMA | None = None
        self.told = 0  # trials of the replay that are already inside `optimizer`

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.axes)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if is_enqueued(trial):
            return {}  # its parameters are given
        optimizer = self.replay(study, before=trial.number)
        optimizer.reseed_rng(trial_seed(self.seed, trial.number))
        return self.point(optimizer.ask())

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise KeyError(f"{param_name} is not an axis of this search: {', '.join(self.axes)}")

    def mean(self, study: Study) -> dict[str, float] | None:
        """The mean of the present distribution, None before the first generation is complete."""
        optimizer = self.replay(study, before=len(study.get_trials(deepcopy=False)))
        return self.point(optimizer.mean) if self.told else None

    def replay(self, study: Study, before: int) -> CMA:
        """The optimizer after all whole generations of finished trials with a number below `before`."""
        finished = [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if t.number < before and self.axes.keys() <= t.params.keys()
        ]
        if self.optimizer is None:
            given = [t for t in finished if is_enqueued(t)]
            best = max(given, key=lambda t: (t.value, -t.number), default=None)
            start = self.unit(best) if best else np.full(len(self.axes), 0.5)
            self.optimizer = self.fresh(start, self.population)
        sampled = [t for t in finished if not is_enqueued(t)]
        while len(sampled) - self.told >= self.optimizer.population_size:
            size = self.optimizer.population_size
            self.optimizer = self.tell(self.optimizer, sampled[self.told : self.told + size])
            self.told += size
        return self.optimizer

    def tell(self, optimizer: CMA, generation: Sequence[FrozenTrial]) -> CMA:
        """One generation; a fresh optimizer if the distribution has collapsed."""
        optimizer.tell([(self.unit(t), -float(t.value or 0.0)) for t in generation])
        if not optimizer.should_stop():
            return optimizer
        rng = np.random.RandomState(trial_seed(self.seed, generation[-1].number))
        return self.fresh(rng.uniform(size=len(self.axes)), 2 * optimizer.population_size)

    def fresh(self, mean: NDArray[np.float64], population: int | None) -> CMA:
        bounds = np.tile([0.0, 1.0], (len(self.axes), 1))
        return CMA(mean=mean, sigma=self.sigma0, bounds=bounds, population_size=population, seed=0)

    def unit(self, trial: FrozenTrial) -> NDArray[np.float64]:
        """A trial's parameters in the unit cube."""
        values = np.array([trial.params[name] for name in self.axes])
        unit: NDArray[np.float64] = np.clip((values - self.low) / self.width, 0.0, 1.0)
        return unit

    def point(self, unit: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(self.axes, (self.low + self.width * np.clip(unit, 0.0, 1.0)).tolist(), strict=True))
