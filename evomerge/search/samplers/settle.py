"""Which sampler follows the learned start of `auto`: chosen once, when the start has ended, and kept in the study."""

import statistics

from evomerge.search.samplers.auto import CHOSEN, UNTIL, choose, front_trials
from evomerge.search.samplers.stages import stages_of
from evomerge.search.storage.study import SearchStudy, trial_seconds
from evomerge.search.storage.trial_record import LEARNED


def settle_sampler(study: SearchStudy, limit: int | None, workers: int, goals: int) -> None:
    """Keep the sampler that `auto` goes on with in the study, unless it is there; other samplers need no choice.

    limit: the number of trials, None for any.
    workers: how many trials run at once.
    goals: how many tasks.
    """
    space, config = study.space, study.space.config
    if config.sampler.name != "auto" or CHOSEN in study.stored.user_attrs:
        return
    left = None if limit is None else limit - study.count
    learned = any(LEARNED in trial.user_attrs for trial in study.finished)
    coarser = bool(stages_of([*space.distributions], [space.pairs, space.ties], config.sampler.coarse))
    chosen = choose(len(space.distributions), left, workers, learned, coarser)
    if learned and config.goals == "pareto":
        scored = [trial_seconds(t) for t in study.complete if LEARNED in t.user_attrs]
        first = front_trials(goals, statistics.median(scored) if scored else 0.0, workers)
        study.stored.set_user_attr(UNTIL, study.count + first)
    study.stored.set_user_attr(CHOSEN, chosen)
