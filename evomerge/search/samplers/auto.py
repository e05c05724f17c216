"""`auto` and `learned`: a learned start, and which sampler follows it.

`learned` ends the search after the learned start.  `auto` goes on with the sampler that `choose` names; the choice is
kept in the study, so that a resume with another budget does not change the sampler.  With `goals: pareto` it is also
kept how many trials a Gaussian process for several goals has before (`front_trials`).  The numbers of the rules are
those of the tables in docs/explanation/search.md.
"""

from collections.abc import Mapping
from typing import Any

from evomerge.config.running import SamplerConfig
from evomerge.search.samplers.cmaes import make_cma_es
from evomerge.search.samplers.sampler_kind import SamplerKind

CHOSEN = "evomerge:sampler"  # study attribute: what `auto` chose
UNTIL = "evomerge:front"  # study attribute: with `goals: pareto`, the number of the first trial that goes by turns
GP_TRIALS = 60  # 30 trials of a Gaussian process have reached what CMA-ES in all axes reaches with 100
GP_AXES = 100  # not measured in more than 96; a proposal takes an eighth of a second there
GP_FRONT = 30  # trials of a Gaussian process for several goals: they find more than 60 trials of CMA-ES by turns
MOST_GOALS = 4  # of it: its time grows exponentially with them
GP_SECONDS = {2: 0.2, 3: 0.3, 4: 0.5}  # of a proposal for so many goals after GP_FRONT trials, in 24 to 840 axes
GP_SHARE = 0.2  # of the time of a trial that its proposal may take

AUTO = SamplerKind(make_cma_es, serves_all_trials=True, learned_start=True)
LEARNED = SamplerKind(make_cma_es, serves_all_trials=True, learned_start=True)


def choose(axes: int, trials: int | None, workers: int, learned: bool, coarser: bool) -> str:
    """The sampler that follows.

    axes: how many coefficients are searched.
    trials: how many are left; None is not limited.
    workers: how many trials run at once.
    learned: whether there was a learned start.  After it a Gaussian process finds no more than CMA-ES, which needs no
        time of its own.
    coarser: whether CMA-ES would search fewer coordinates first, by which it finds more than a Gaussian process.
    """
    few = trials is not None and trials <= GP_TRIALS
    return "gp" if few and workers == 1 and axes <= GP_AXES and not learned and not coarser else "cma-es"


def front_trials(goals: int, seconds: float, workers: int) -> int:
    """How many trials after a learned start a Gaussian process for several goals proposes, before turns begin.

    goals: how many tasks.
    seconds: that a trial takes.
    workers: how many trials run at once; all wait for a proposal.
    """
    return GP_FRONT if goals <= MOST_GOALS and workers * GP_SECONDS[goals] <= GP_SHARE * seconds else 0


def settled(attributes: Mapping[str, Any], config: SamplerConfig) -> SamplerConfig:
    """The configuration with the sampler that `auto` chose, if it has chosen.  attributes: the study's."""
    chosen = attributes.get(CHOSEN)
    return config if config.name != "auto" or chosen is None else config.model_copy(update={"name": chosen})
