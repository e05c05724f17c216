"""The loop: propose, materialise, evaluate, tell, until the budget ends; a trial may fail, the run may not."""

import asyncio
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from evomerge.errors import EvomergeError
from evomerge.evaluate.canary import Signs, normal_signs
from evomerge.evaluate.racing import Race, Vector
from evomerge.search.budget.limits import now
from evomerge.search.budget.reserve import ReservedTime, export_seconds
from evomerge.search.budget.usage import stored_usage
from evomerge.search.evaluation.evaluator import reason
from evomerge.search.evaluation.jobs import Failure, Outcome, RaceLooksJob, Result, TrialJob
from evomerge.search.evaluation.model_files import open_config_models
from evomerge.search.evaluation.race_policy import LOOKS, make_race_setup, may_race, must_choose_looks, rivals
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.settled_dtype import settle_compute_dtype
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.evaluation.task_set import TaskSet, open_task_set
from evomerge.search.failures import FAILURES_IN_A_ROW, explain_failures, failures_in_a_row
from evomerge.search.interrupt import StopSignal, stoppable
from evomerge.search.monitor.monitor import Monitor, remark
from evomerge.search.run import Run, claim
from evomerge.search.space.baselines import Baseline, baselines
from evomerge.search.space.greedy_soup import GREEDY, GreedySoup, greedy_soup
from evomerge.search.space.space import Point, build_space
from evomerge.search.storage.database import Patience, open_study
from evomerge.search.storage.item_scores import pack
from evomerge.search.storage.study import Begun, SearchStudy, in_full, record_of
from evomerge.search.storage.study_lease import Lease, lease
from evomerge.search.verdict.finals import finish, search_score
from evomerge.search.verdict.verdict import Verdict
from evomerge.search.workers.make_workers import device_kind, make_workers
from evomerge.search.workers.options import WorkerOptions
from evomerge.search.workers.pool import Pool, run_all

BEAT = 5.0  # seconds between signs of life in the study


def search(
    run: Run, monitor: Monitor, stop: StopSignal, worker_options: WorkerOptions, out: Path | None = None
) -> Verdict:
    """Run or go on with a search until its limits, then judge the finalists and write the verdict.

    out: where the model will be written afterwards, which takes its time too.  Interrupted if the user stops it:
    everything finished is in the study.  EvomergeError on wrong input, or when ten trials in a row fail.
    """
    return asyncio.run(drive(run, monitor, stop, worker_options, out))


async def drive(
    run: Run, monitor: Monitor, stop: StopSignal, worker_options: WorkerOptions, out: Path | None
) -> Verdict:
    config = run.config()
    monitor.phase("opening the models")
    models = open_config_models(config)
    for note in models.compatibility.notes:
        run.log(f"note: {note}")
    task_set = open_task_set(config)
    patience = Patience(stop.check, run.log)
    stored = open_study(run.storage_url(config), config.name, create=True, patience=patience)
    holder = lease(stored, BEAT, stop.check)
    try:
        claim(stored, run)
        study = SearchStudy(stored, build_space(config, models))
        monitor.restore(study.trials, stored.user_attrs)
        export = export_seconds(config, models, out) if out and monitor.limits.timed else 0.0
        config = settle_compute_dtype(stored, config, models, device_kind(worker_options, config), monitor.say)
        workers = make_workers(worker_options, run, config, models, task_set, stop.check, monitor.phase)
        if len(workers) > 1:
            monitor.phase(f"starting {len(workers)} workers")
        study.workers = len(workers)
        pool = Pool(workers, run.log, config.workers.stuck, config.workers.trial)
        monitor.attach_workers(pool.states, len(workers), config.compute_dtype)
        driver = Driver(run, study, Evaluations(stored, task_set, pool, monitor), pool, monitor, export)
        try:
            await stoppable(stop, pool.open(), monitor.refresh)
            return await stoppable(stop, driver.search(), lambda: signs_of_life(monitor, holder))
        finally:
            await pool.close()
    finally:
        holder.release()


def signs_of_life(monitor: Monitor, holder: Lease) -> None:
    """For people, and for other drivers that would like the study."""
    monitor.refresh()
    holder.beat_in_time()


class Driver:
    """Owns study and sampler: proposes, sends recipes to the pool, takes scores as they come, decides.

    There are as many slots as workers, each with one thing in hand: a trial, or for a while the greedy soup.  So a
    free worker always gets a trial, and with one worker everything happens in one order.
    """

    def __init__(
        self, run: Run, study: SearchStudy, evaluations: Evaluations, pool: Pool, monitor: Monitor, export: float
    ) -> None:
        """export: seconds that writing the model will take."""
        self.run = run
        self.study = study
        self.evaluations = evaluations
        self.task_set = evaluations.task_set
        self.pool = pool
        self.monitor = monitor
        self.known = baselines(study.space)
        self.reserved = ReservedTime(study, self.known, self.task_set.item_counts, export)
        self.failures = failures_in_a_row(study)
        self.soup: GreedySoup | None = None
        self.cooking = False
        self.race_setup: RaceSetup | None = None
        self.vectors: dict[int, Vector] = {}  # item scores of finished trials, unpacked
        self.storing = 0.0  # seconds that it took to store the last trial

    async def search(self) -> Verdict:
        outside = [b for b in self.known if b.point is None]
        await run_all(*(search_score(self.study, self.evaluations, b) for b in outside))
        self.monitor.phase("searching")
        await run_all(*(self.slot() for _ in range(self.pool.size)))
        soup = self.soup or await self.make_soup()  # the budget ended among the baselines
        self.monitor.phase("judging the finalists")
        return await finish(self.run, self.study, self.evaluations, self.known, soup)

    async def slot(self) -> None:
        """One trial after the other, until the budget ends."""
        while (end := self.ended()) is None:
            if not self.cooking and self.baselines_are_done():
                self.cooking = True
                self.race_setup = await self.make_race_setup()
                self.soup = await self.make_soup()
            else:
                await self.trial()
        self.run.log(f"no more trials: {end}")

    def ended(self) -> str | None:
        """Why no trial may begin any more, None if one may."""
        limits, monitor = self.monitor.limits, self.monitor
        monitor.reserve(self.reserved.seconds(self.pool.size) if limits.timed else 0.0)
        in_hand = self.study.count - monitor.progress.trials
        return limits.reached(monitor.progress, monitor.stopwatch.elapsed.seconds, now(), monitor.reserved, in_hand)

    def baselines_are_done(self) -> bool:
        return all(b.point is None or self.study.of_baseline(b.name) is not None for b in self.known)

    async def make_race_setup(self) -> RaceSetup | None:
        """The race setup of this search's races, None if looking at candidates early does not pay.

        Where races look is found out once and kept with the study: it decides on batches, and so on bits.
        """
        race_setup = make_race_setup(self.study, self.known, self.evaluations)
        if race_setup is None or not must_choose_looks(self.study, race_setup.items):
            return race_setup
        result = await self.pool.run(RaceLooksJob(race_setup), "where races look")
        if isinstance(result, Failure):
            self.run.log(f"candidates are not raced in this session: {result.reason}")
            return None
        assert result.looks is not None, "a survey places looks"
        self.study.stored.set_user_attr(LOOKS, {"items": race_setup.items, **asdict(result.looks)})
        self.run.log(f"races look after {', '.join(map(str, result.looks.ends))} items")
        return make_race_setup(self.study, self.known, self.evaluations)

    async def make_soup(self) -> GreedySoup:
        """The greedy soup, added to the baselines unless it is one of them."""
        soup = await greedy_soup(self.study.space, self.known, lambda b: search_score(self.study, self.evaluations, b))
        if soup.baseline not in self.known:
            self.known.append(soup.baseline)
        self.run.log(soup.sentence)
        return soup

    async def trial(self) -> None:
        """One trial from proposal to database.

        What goes wrong inside becomes the trial's recorded reason.  A broken candidate has the value of the worst, so
        that samplers learn from it.  A finished trial cannot be written to, so the time of its storing is in the record
        of the next one.
        """
        started = time.perf_counter()
        trial = self.study.begin(next_baseline(self.study, self.known))
        proposed = time.perf_counter()
        self.run.log(f"trial {trial.number} begins")
        record: dict[str, Any] = {}
        result = await self.result_of(trial, record)
        value, seconds = None, {}
        if isinstance(result, Outcome):
            value = value_of(result, self.task_set)
            record |= describe(result, self.task_set, self.evaluations.items("search"))
            seconds = result.seconds
        elif result.broken:
            record["broken"] = result.reason
            value = self.study.penalty
        else:
            record["reason"] = result.reason
            self.run.log(f"trial {trial.number}: {result.traceback}")
        record["compute_dtype"] = self.monitor.compute_dtype
        scored = time.perf_counter()
        total = scored - started + self.storing
        times = {"propose": proposed - started, "store": self.storing, "total": total}
        record["seconds"] = {**seconds, **times}
        record |= stored_usage(replace(result.used, seconds=total), self.monitor.stopwatch)
        state = self.study.finish(trial, value, record)
        self.run.log(f"trial {trial.number} {state.name.lower()} value={value} {remark(record)}".rstrip())
        self.storing = time.perf_counter() - scored
        self.monitor.trial(trial.number, value, record, trial.baseline)
        self.failures = self.failures + 1 if isinstance(result, Failure) else 0
        if self.failures >= FAILURES_IN_A_ROW:
            raise EvomergeError(explain_failures(self.study))

    async def result_of(self, trial: Begun, record: dict[str, Any]) -> Result:
        """The trial's scores; the race it ran in goes into the record, so that it can be run again alone."""
        try:
            recipe = self.study.space.recipe(trial.params)
            known = self.evaluations.stored("search", recipe) if trial.baseline == GREEDY else None
            if known:  # it was scored to be found
                return Outcome(known, {})
            job = TrialJob(recipe, None)
            if not trial.baseline:
                race_setup, race, record["race"] = self.race()
                job = TrialJob(recipe, healthy(self.study, self.known), race_setup, race)
        except EvomergeError:
            raise
        except Exception as error:  # a bug in making the recipe costs this trial
            return Failure(reason(error), traceback=traceback.format_exc())
        return await self.pool.run(job, f"trial {trial.number}", trial=trial.number)

    def race(self) -> tuple[RaceSetup | None, Race | None, dict[str, Any] | None]:
        """A race against the incumbent, and who ran in it; None before there is one on these items."""
        race_setup = self.race_setup
        if race_setup is None or not may_race(self.study, race_setup):
            return None, None, None
        incumbent, others = rivals(self.study, race_setup.items)
        if incumbent is None:
            return None, None, None
        numbers = {"incumbent": incumbent.number, "others": [t.number for t in others]}
        return race_setup, race_setup.race(self.vector(incumbent), [self.vector(t) for t in others]), numbers

    def vector(self, trial: FrozenTrial) -> Vector:
        """A trial's item scores, (N,)."""
        assert self.race_setup is not None, "scores are put in the order of a race setup"
        if trial.number not in self.vectors:
            self.vectors[trial.number] = self.race_setup.vector(trial)
        return self.vectors[trial.number]


def next_baseline(study: SearchStudy, known: list[Baseline]) -> tuple[str, Point] | None:
    """The first baseline in the space that has no trial yet."""
    there = study.baselines
    return next(((b.name, b.point) for b in known if b.point is not None and b.name not in there), None)


def healthy(study: SearchStudy, known: list[Baseline]) -> Signs | None:
    """The signs that the parents set as normal."""
    trials = [study.of_baseline(b.name) for b in known if b.kind == "parent"]
    records = [record_of(t) for t in trials if t is not None and in_full(t)]
    return normal_signs([Signs(*r["signs"]) for r in records if "signs" in r])


def value_of(outcome: Outcome, task_set: TaskSet) -> float:
    """What the sampler is told of a candidate that was scored."""
    return outcome.estimate.value if outcome.estimate else task_set.mean(outcome.scores, "objective")


def describe(outcome: Outcome, task_set: TaskSet, items: str) -> dict[str, Any]:
    """What the study keeps of an outcome.  items: the name of the item ids."""
    scores = {t.name: {t.objective: pack(outcome.scores[t.name][t.objective])} for t in task_set.tasks}
    record: dict[str, Any] = {"items": items, "scores": scores}
    if outcome.signs:
        record["signs"] = [outcome.signs.entropy, outcome.signs.sameness]
    if outcome.estimate:
        record["partial"] = outcome.estimate.fraction
    return record
