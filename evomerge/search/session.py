"""One session of a search: opens models, tasks, study and workers, drives the search (loop.py), closes what it opened.

What a study settles once, every later session reads from it: the objectives, the type of the forwards, the method.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import optuna

from evomerge.config.schema import SearchConfig
from evomerge.search.budget.reserve import export_seconds
from evomerge.search.evaluation.method_race import score_default_recipes
from evomerge.search.evaluation.scale import with_first_objectives
from evomerge.search.evaluation.settled_dtype import settle_compute_dtype
from evomerge.search.evaluation.settled_scale import settle_scale
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.interrupt import StopSignal, stoppable
from evomerge.search.loop import Driver
from evomerge.search.models import open_config_models
from evomerge.search.monitor.monitor import Monitor
from evomerge.search.opened import Opened
from evomerge.search.run import Run, claim
from evomerge.search.samplers.registry import sampler_kind
from evomerge.search.scored_baselines import ScoredBaselines
from evomerge.search.space.baselines import Baseline, base_alone
from evomerge.search.space.choose_method import choose_method, must_choose_method, settle_method, tried_baselines
from evomerge.search.space.space import build_space
from evomerge.search.storage.database import Retry, open_study, storage_of
from evomerge.search.storage.method_choice import METHOD, DefaultRecipe, recorded_choice
from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.study_lease import acquire_lease
from evomerge.search.verdict.verdict import Verdict
from evomerge.search.workers.make_workers import device_kind, make_workers
from evomerge.search.workers.pool import Pool
from evomerge.search.workers.worker_options import WorkerOptions
from evomerge.sources.open_models import Models

BEAT = 5.0  # seconds between two renewals of the study's lease


def search(
    run: Run,
    monitor: Monitor,
    stop: StopSignal,
    worker_options: WorkerOptions,
    out: Path | None = None,
    opened: Opened | None = None,
) -> Verdict:
    """Run or resume a search until its limits, then judge the finalists and write the verdict.

    run: the run folder.
    monitor: is told what happens; it has the limits.
    stop: the user's request to stop.
    worker_options: how many workers of which kind.
    out: where the model will be written afterwards; the time limits keep the time for that too.
    opened: models and tasks, if a check has opened them.

    Raises Interrupted if the user stops it (everything finished is in the study), EvomergeError on wrong input or when
    ten trials in a row fail.
    """
    config = run.config()
    sampler_kind(config.sampler.name)  # an unknown sampler is an error before anything is opened
    opened, stored = open_models_study_and_tasks(run, config, monitor, stop, opened)
    config, models, task_set = opened.config, opened.models, opened.task_set
    lease = acquire_lease(stored, BEAT, stop.check)

    def show_life() -> None:
        monitor.refresh()
        lease.beat_in_time()

    try:
        claim(stored, run)
        export = 0.0
        if out and monitor.limits.timed:
            monitor.phase("measuring the disk, for the export at the end")
            export = export_seconds(config, models, out)
        monitor.phase("choosing the type of the forwards")
        config = settle_compute_dtype(stored, config, models, device_kind(worker_options, config), monitor.say)
        config = settle_method(run, config, stored, monitor)
        workers = make_workers(worker_options, run, config, models, task_set, stop.check, monitor.phase, opened)
        study = SearchStudy(stored, build_space(config, models), len(workers), monitor.say)
        monitor.restore(study.trials, stored.user_attrs)
        monitor.phase(f"starting {len(workers)} workers" if len(workers) > 1 else "starting")
        pool = Pool(workers, run.log, config.workers.stuck, config.workers.trial)
        monitor.attach_workers(pool.states, len(workers), config.compute_dtype)
        evaluations = Evaluations(stored, task_set, pool, monitor)
        return asyncio.run(search_with_workers(study, evaluations, models, export, stop, show_life))
    finally:
        lease.release()


def open_models_study_and_tasks(
    run: Run, config: SearchConfig, monitor: Monitor, stop: StopSignal, before: Opened | None
) -> tuple[Opened, optuna.Study]:
    """Open what a search needs, and its study; the result's configuration has the objectives that the study began with.

    before: models and tasks that a check has opened; they are used as far as they are those of the configuration.
    """
    if before is not None and before.config != config:
        before.take_live()
        before = None
    if before is None:
        monitor.phase("opening the models")
    models = open_config_models(config) if before is None else before.models
    for note in models.compatibility.notes:
        run.log(f"note: {note}")
    monitor.phase("opening the study")
    retry = Retry(stop.check, run.log)
    stored = open_study(run.storage_url(config), config.name, create=not run.has_begun(), retry=retry)
    storage_of(stored).refuse_damage()
    first = with_first_objectives(stored, config)
    live = None if before is None else before.take_live()
    if before is not None and first == config:
        return Opened(first, models, before.task_set, live), stored
    monitor.phase("opening the tasks")
    return Opened(first, models, open_task_set(first), live), stored


async def search_with_workers(
    study: SearchStudy,
    evaluations: Evaluations,
    models: Models,
    export: float,
    stop: StopSignal,
    show_life: Callable[[], None],
) -> Verdict:
    """Start the workers, choose the method if that is to be done, search, and close the workers.

    export: seconds that writing the model will take.
    show_life: called a few times a second while the search runs.
    """
    run, pool, config = evaluations.monitor.run, evaluations.pool, study.space.config
    baselines = baselines_of(study, evaluations, models)
    try:
        await stoppable(stop, pool.open(), evaluations.monitor.refresh)
        if must_choose_method(config, study):
            await stoppable(stop, settle_method_by_scores(baselines, models), show_life)
            config = settle_method(run, config, study.stored, evaluations.monitor)
            study = SearchStudy(study.stored, build_space(config, models), pool.size, evaluations.monitor.say)
            baselines = baselines_of(study, evaluations, models)
        driver = Driver(run, study, evaluations, baselines, export)
        return await stoppable(stop, driver.search(), show_life)
    finally:
        await pool.close()


def baselines_of(study: SearchStudy, evaluations: Evaluations, models: Models) -> ScoredBaselines:
    """The baselines of a search, with the best recipe of each method that it could choose."""
    tried = tried_baselines(study.space.config, models, recorded_choice(study.stored.user_attrs))
    return ScoredBaselines(study, evaluations, tried)


async def settle_method_by_scores(baselines: ScoredBaselines, models: Models) -> None:
    """Score the default recipes of all methods on the scale of base and parents, and keep the choice in the study."""
    evaluations, space = baselines.evaluations, baselines.study.space
    await settle_scale(baselines.study, evaluations, baselines.found)
    evaluations.monitor.phase("choosing the method")
    known = [base_alone(space), *baselines.parents]

    async def score(recipes: list[Baseline]) -> list[DefaultRecipe]:
        return await score_default_recipes(recipes, known, evaluations, space.config)

    choice = await choose_method(space.config, models, score)
    evaluations.monitor.say(choice.sentence)
    baselines.study.stored.set_user_attr(METHOD, choice.to_json())
