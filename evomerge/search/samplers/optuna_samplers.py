"""Optuna's own samplers, made anew for each trial with the trial's seed.

QMC alone has the study's seed, which makes the sequence; the trial's number is the place in it.
"""

from optuna.samplers import GPSampler, NSGAIISampler, RandomSampler, TPESampler

from evomerge.search.samplers.sampler_kind import SamplerKind
from evomerge.search.storage.optuna_private import NumberedQMCSampler, QuickGPSampler

TPE = SamplerKind(lambda setup: TPESampler(seed=setup.seed))
NSGA_II = SamplerKind(lambda setup: NSGAIISampler(seed=setup.seed), turns=False)  # each would need a population
GP = SamplerKind(
    lambda setup: GPSampler(seed=setup.seed, deterministic_objective=True),
    requires=("scipy",),
    several=lambda setup: QuickGPSampler(setup.seed),
)
QMC = SamplerKind(
    lambda setup: NumberedQMCSampler(setup.study_seed, setup.number, setup.seed), requires=("scipy",), turns=False
)
RANDOM = SamplerKind(lambda setup: RandomSampler(seed=setup.seed), turns=False)
