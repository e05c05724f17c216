"""Run one finished trial again, alone, from its record in the study (`evomerge repeat`)."""

from dataclasses import dataclass, replace

import numpy as np

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import Failure, TrialJob
from evomerge.search.evaluation.method_race import kept_method_race, was_raced
from evomerge.search.evaluation.race_policy import make_race_setup
from evomerge.search.evaluation.scale import with_first_objectives
from evomerge.search.evaluation.stored_evaluations import StoredEvaluations
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.run import Run
from evomerge.search.space.baselines import baselines
from evomerge.search.space.choose_method import tried_baselines
from evomerge.search.space.space import build_space
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.method_choice import recorded_choice
from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.trial_record import WEIGHTS, record_of
from evomerge.search.trial import parent_signs, value_of


@dataclass(frozen=True)
class Repeated:
    """The comparison of a repeated trial with its record.

    items: how many item scores were compared.
    differing: how many of them differ.
    values: the trial's value in the study, and now.
    """

    items: int
    differing: int
    values: tuple[float, float]


def repeat(run: Run, number: int) -> Repeated:
    """Run a trial again in this process, in the race that it ran in then.

    run: the run folder.
    number: the trial's.

    Raises EvomergeError if there is no such trial, if it has no scores to compare with, or if it fails now.
    """
    stored = run.study()
    config = with_first_objectives(stored, run.config())
    models = open_config_models(config)
    study = SearchStudy(stored, build_space(config, models))
    trial = next((t for t in study.finished if t.number == number), None)
    if trial is None or trial.value is None or not record_of(trial).scores:
        raise EvomergeError(f"{run.folder}: trial {number} is not finished, or has no scores to compare with")
    task_set = open_task_set(config)
    evaluations = StoredEvaluations(study.stored, task_set)
    tried = tried_baselines(config, models, recorded_choice(study.stored.user_attrs))
    known, record = baselines(study.space, tried), record_of(trial)
    job = TrialJob(study.space.recipe(trial.params), None)
    if "baseline" in trial.user_attrs:
        method_race = kept_method_race(evaluations, config) if was_raced(evaluations, job.recipe) else None
        if method_race is not None:
            job = replace(job, race_setup=method_race.setup, race=method_race.begin())
    else:
        race_setup = make_race_setup(study, known, evaluations)
        race = None
        if race_setup is not None and (weights := trial.user_attrs.get(WEIGHTS)):
            race_setup = race_setup.weighted(weights)
        if race_setup is not None and (ran := record.race) is not None and ran.incumbent is not None:
            full = {t.number: t for t in study.complete}
            race = race_setup.race(
                race_setup.vector(full[ran.incumbent]),
                [race_setup.vector(full[n]) for n in ran.others],
                evaluations.scale.penalty(trial_scores(full[ran.incumbent])),
            )
        job = TrialJob(job.recipe, parent_signs(study, known), race_setup, race)
    computed = record.compute_dtype or config.dtype  # the oldest records do not say; there was no other type then
    config = config.model_copy(update={"compute_dtype": computed})
    evaluator = Evaluator(config, models, task_set, log=run.log, cache=run.folder / "cache")
    evaluator.prepare(run.manifest()["inputs"])
    result = evaluator.run(job)
    if isinstance(result, Failure):
        raise EvomergeError(f"trial {number} has scores in the study, but failed now: {result.reason}")
    pairs = [
        (before, np.array(result.scores[task][metric]))
        for task, metrics in trial_scores(trial).items()
        for metric, before in metrics.items()
    ]
    differing = sum(int((~np.isclose(before, after, 0, 0, equal_nan=True)).sum()) for before, after in pairs)
    items = sum(int(np.isfinite(before).sum()) for before, _ in pairs)
    return Repeated(items, differing, (trial.value, value_of(result, evaluations.scale)))
