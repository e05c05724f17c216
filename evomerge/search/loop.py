"""The search: its phases in the order in which they happen.

    0  choice of the method                    only if the configuration lists several (space/choose_method.py)
    1  base, parents, baselines outside the    scored on all items of the search split; base and parents give the scale
       search space                            of all values (evaluation/settled_scale.py)
    2  baselines that are points of the space  the first trials
    3  race setup and greedy soup              what needs the baselines' scores
    4  learned start                           gradient steps, with the samplers `auto` and `learned`
    5  search                                  trials of the sampler, until the budget ends
    6  finals                                  finalists and baselines on the selection and the holdout split

One trial is in trial.py, the finals in verdict/finals.py.  A trial may fail, the search may not.
"""

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.search.budget.enough import too_short
from evomerge.search.budget.limits import now
from evomerge.search.budget.reserve import ReservedTime, export_seconds, step_seconds
from evomerge.search.evaluation.agreement import agreements, model_name, scored_models
from evomerge.search.evaluation.jobs import Failure, RaceLooksJob
from evomerge.search.evaluation.method_race import score_default_recipes
from evomerge.search.evaluation.race_policy import LOOKS, make_race_setup, must_choose_looks
from evomerge.search.evaluation.scale import with_first_objectives
from evomerge.search.evaluation.settled_dtype import settle_compute_dtype
from evomerge.search.evaluation.settled_scale import settle_scale
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.interrupt import StopSignal, stoppable
from evomerge.search.learned.learn import Learner, why_not
from evomerge.search.models import open_config_models
from evomerge.search.monitor.monitor import Monitor
from evomerge.search.opened import Opened
from evomerge.search.run import Run, claim
from evomerge.search.samplers.auto import CHOSEN, UNTIL, choose, front_trials
from evomerge.search.samplers.registry import sampler_kind
from evomerge.search.samplers.stages import stages_of
from evomerge.search.space.baselines import Baseline, base_alone, baselines
from evomerge.search.space.choose_method import (
    choose_method,
    must_choose_method,
    settle_method,
    tried_baselines,
)
from evomerge.search.space.greedy_soup import GreedySoup, greedy_soup
from evomerge.search.space.space import build_space
from evomerge.search.space.start_points import start_baselines
from evomerge.search.storage.database import Retry, open_study, storage_of
from evomerge.search.storage.method_choice import METHOD, DefaultRecipe, recorded_choice
from evomerge.search.storage.study import SearchStudy, in_full, rank, trial_seconds
from evomerge.search.storage.study_lease import acquire_lease
from evomerge.search.storage.trial_record import LEARNED
from evomerge.search.trial import Races, TrialRunner, next_baseline
from evomerge.search.verdict.finals import finish
from evomerge.search.verdict.verdict import ENOUGH_SEARCHED, Verdict
from evomerge.search.workers.make_workers import device_kind, make_workers
from evomerge.search.workers.pool import Pool, run_all
from evomerge.search.workers.worker_options import WorkerOptions

BEAT = 5.0  # seconds between two renewals of the study's lease
SEARCHING = "searching"
EVERY = 20  # finished trials after which the incumbent is scored by the metrics that trials are not scored by


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
    return asyncio.run(open_and_search(run, monitor, stop, worker_options, out, opened))


async def open_and_search(
    run: Run,
    monitor: Monitor,
    stop: StopSignal,
    worker_options: WorkerOptions,
    out: Path | None,
    opened: Opened | None,
) -> Verdict:
    """Open models, tasks, study and workers, run the phases of the search, and close what was opened."""
    config = run.config()
    sampler_kind(config.sampler.name)  # an unknown sampler is an error before anything is opened
    if opened is not None and opened.config != config:
        opened.take_live()
        opened = None
    if opened is None:
        monitor.phase("opening the models")
        models = open_config_models(config)
    else:
        models = opened.models
    for note in models.compatibility.notes:
        run.log(f"note: {note}")
    retry = Retry(stop.check, run.log)
    monitor.phase("opening the study")
    stored = open_study(run.storage_url(config), config.name, create=not run.has_begun(), retry=retry)
    storage_of(stored).refuse_damage()
    first = with_first_objectives(stored, config)
    if opened is None or first != config:
        monitor.phase("opening the tasks")
        task_set = open_task_set(first)
    else:
        task_set = opened.task_set
    config = first
    holder = acquire_lease(stored, BEAT, stop.check)

    def show_life() -> None:
        monitor.refresh()
        holder.beat_in_time()

    try:
        claim(stored, run)
        if out and monitor.limits.timed:
            monitor.phase("measuring the disk, for the export at the end")
        export = export_seconds(config, models, out) if out and monitor.limits.timed else 0.0
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

        def driver_of(study: SearchStudy) -> Driver:
            tried = tried_baselines(study.space.config, models, recorded_choice(stored.user_attrs))
            return Driver(run, study, evaluations, pool, monitor, export, tried)

        driver = driver_of(study)
        try:
            await stoppable(stop, pool.open(), monitor.refresh)
            if must_choose_method(config, study):
                await stoppable(stop, driver.settle_scale(), show_life)
                monitor.phase("choosing the method")
                choice = await stoppable(stop, choose_method(config, models, driver.score_default_recipes), show_life)
                monitor.say(choice.sentence)
                stored.set_user_attr(METHOD, choice.to_json())
                config = settle_method(run, config, stored, monitor)
                driver = driver_of(SearchStudy(stored, build_space(config, models), len(workers), monitor.say))
            return await stoppable(stop, driver.search(), show_life)
        finally:
            await pool.close()
    finally:
        holder.release()


@dataclass
class SearchState:
    """What the phases of a search hand on to the later ones.

    baselines: recipes that the search did not find; phase 3 adds the greedy soup.
    preparing: whether a slot has begun phase 3.
    races: how candidates race; None before phase 3, and where races do not pay.
    soup: None before the end of phase 3.
    checked: how many times EVERY trials had finished when the incumbent was last scored by every metric.
    """

    baselines: list[Baseline]
    preparing: bool = False
    races: Races | None = None
    soup: GreedySoup | None = None
    checked: int = 0


class Driver:
    """Owns study and sampler, and takes a search through its phases.

    Phases 2 to 5 run in as many slots as there are workers, and a slot does one thing at a time.  So a free worker
    always gets a trial, also while another slot is in phase 3; and with one worker everything happens in one order.

    run: the run folder.
    study: proposes points and stores results.
    evaluations: scores recipes outside of trials.
    pool: the workers.
    monitor: is told what happens; it has the limits.
    export: seconds that writing the model will take.
    tried: the best recipe of each method that the search could choose.
    """

    def __init__(
        self,
        run: Run,
        study: SearchStudy,
        evaluations: Evaluations,
        pool: Pool,
        monitor: Monitor,
        export: float,
        tried: Sequence[Baseline],
    ) -> None:
        self.run = run
        self.study = study
        self.evaluations = evaluations
        self.pool = pool
        self.monitor = monitor
        self.trials = TrialRunner(run, study, evaluations, pool, monitor)
        self.kind = sampler_kind(study.space.config.sampler.name)
        first = start_baselines(study.stored, study.space, run.log)
        self.state = SearchState(baselines(study.space, first, tried))
        self.reserved = ReservedTime(study, self.state.baselines, evaluations.task_set.item_counts, export)

    async def search(self) -> Verdict:
        """Run all phases and return the verdict."""
        self.monitor.steps_to_come = self.kind.learned_start
        await self.settle_scale()
        await self.score_outside_baselines()
        self.show_incumbent()
        self.say_if_too_short()
        inside = sum(b.point is not None and self.study.of_baseline(b.name) is None for b in self.state.baselines)
        if inside:
            self.monitor.phase("trying the baselines", inside, "baselines")
        if self.kind.learned_start:
            await self.run_slots(self.run_given_trials)
            await self.prepare_search()
            await self.run_given_trials()  # the greedy soup
            await self.learn()
        await self.run_slots(self.run_slot)
        return await self.judge_finalists()

    async def run_slots(self, slot: Callable[[], Awaitable[None]]) -> None:
        """Run something in every slot, and wait for all of them."""
        await run_all(*(slot() for _ in range(self.pool.size)))

    async def run_slot(self) -> None:
        """Phases 2 to 5 in one slot, as far as they have not been done."""
        await self.run_baseline_trials()
        await self.prepare_search()
        await self.run_search_trials()

    async def settle_scale(self) -> None:
        """Phase 1, first half: base and parents by every metric, and the scale that they give."""
        await settle_scale(self.study, self.evaluations, self.state.baselines, self.monitor)

    async def score_default_recipes(self, recipes: list[Baseline]) -> list[DefaultRecipe]:
        """Phase 0: the results of default recipes on the search split."""
        parents = [b for b in self.state.baselines if b.kind == "parent"]
        known = [base_alone(self.study.space), *parents]
        return await score_default_recipes(recipes, known, self.evaluations, self.study.space.config)

    async def score_outside_baselines(self) -> None:
        """Phase 1, second half: every baseline that is no point of the space."""
        outside = [b for b in self.state.baselines if b.point is None]
        self.monitor.phase("scoring the baselines outside the space", len(outside))
        await run_all(*(self.objective_of(b) for b in outside))

    async def run_baseline_trials(self) -> None:
        """Phase 2: trials until every baseline in the space has a result.

        A slot that finds none left to begin, while others still run, gets trials of the sampler.
        """
        while not self.baselines_are_done() and self.ended() is None:
            await self.trials.run(self.state.baselines, self.state.races)

    async def run_given_trials(self) -> None:
        """Trials that have begun before, or whose points are baselines, until none is left to begin."""
        while self.study.interrupted or next_baseline(self.study, self.state.baselines):
            if self.ended() is not None:
                return
            await self.trials.run(self.state.baselines, self.state.races)

    async def learn(self) -> None:
        """Phase 4: gradient steps from the best baseline, and the choice of the sampler that follows."""
        study, space = self.study, self.study.space
        self.monitor.steps_to_come = False
        if (reason := why_not(space, self.evaluations.task_set, self.evaluations.scale)) is not None:
            if space.config.sampler.name == "learned":
                raise EvomergeError(f"sampler: the coefficients cannot be learned: {reason}")
            self.monitor.say(f"no learned start: {reason}")
        else:
            learner = Learner(study, self.evaluations, self.pool, self.monitor, self.trials, self.state.baselines)
            self.monitor.steps_to_come = True
            await learner.learn(self.ended)
            self.monitor.steps_to_come = False
        if space.config.sampler.name == "auto" and CHOSEN not in study.stored.user_attrs:
            limit = self.monitor.limits.trials
            left = None if limit is None else limit - study.count
            learned = any(LEARNED in trial.user_attrs for trial in study.finished)
            coarser = bool(stages_of([*space.distributions], [space.pairs, space.ties], space.config.sampler.coarse))
            chosen = choose(len(space.distributions), left, self.pool.size, learned, coarser)
            if learned and space.config.goals == "pareto":
                scored = [trial_seconds(t) for t in study.complete if LEARNED in t.user_attrs]
                seconds = statistics.median(scored) if scored else 0.0
                first = front_trials(len(self.evaluations.scale.tasks), seconds, self.pool.size)
                study.stored.set_user_attr(UNTIL, study.count + first)
            study.stored.set_user_attr(CHOSEN, chosen)

    async def prepare_search(self) -> None:
        """Phase 3, in the first slot that comes to it: how candidates race, then the greedy soup."""
        if self.state.preparing or not self.baselines_are_done() or self.ended() is not None:
            return
        self.state.preparing = True
        self.monitor.phase("choosing where races look, and making the greedy soup")
        self.state.races = await self.find_races()
        self.state.soup = await self.find_soup()
        self.log_agreement()

    async def run_search_trials(self) -> None:
        """Phase 5: the greedy soup's trial, if it is a point of the space, and trials of the sampler."""
        if self.study.space.config.sampler.name == "learned":
            return
        while (end := self.ended()) is None:
            if self.monitor.current_phase != SEARCHING:
                self.monitor.phase(SEARCHING)
            await self.score_incumbent()
            await self.trials.run(self.state.baselines, self.state.races)
        self.run.log(f"no more trials: {end}")

    async def score_incumbent(self) -> None:
        """Score the incumbent by every metric on the search items whenever EVERY more trials have finished.

        Where trials are scored by the objective alone, this shows whether it still ranks models as the metric does, and
        it finds the finalist that is best by the metric.  The count decides, never the time.
        """
        task_set, due = self.evaluations.task_set, len(self.study.finished) // EVERY
        if due <= self.state.checked:
            return
        self.state.checked = due
        best = max(filter(in_full, self.study.finished[: due * EVERY]), key=rank, default=None)
        if best is None or all(t.metric in task_set.wanted(t, "search") for t in task_set.tasks):
            return
        try:
            recipe = self.study.space.recipe(best.params)
            await self.evaluations.score("search", recipe, model_name(best), everything=True)
        except (ArithmeticError, RuntimeError) as error:
            self.run.log(f"trial {best.number} cannot be scored by every metric: {error}")
            return
        self.show_incumbent()
        self.log_agreement()

    def log_agreement(self) -> None:
        """Write down how alike objective and metric rank models; say where they disagree."""
        attributes = self.study.stored.user_attrs
        for found in agreements(scored_models(self.study.trials, attributes), attributes):
            (self.monitor.say if found.disagrees else self.run.log)(found.sentence)

    async def judge_finalists(self) -> Verdict:
        """Phase 6: the verdict, written to the run folder."""
        self.say_if_too_short()
        if self.state.soup is None:
            self.monitor.phase("making the greedy soup")
        soup = self.state.soup or await self.find_soup()  # not found yet if the budget ended in phase 2
        self.log_agreement()
        self.monitor.judge()
        return await finish(self.run, self.study, self.evaluations, self.state.baselines, soup)

    def say_if_too_short(self) -> None:
        """Say so if the time limit leaves room for hardly any candidate."""
        limits, monitor = self.monitor.limits, self.monitor
        seconds = step_seconds(self.study.trials, self.study.stored.user_attrs) if limits.timed else None
        if seconds is None:
            return
        elapsed, proposed = monitor.stopwatch.elapsed.seconds, len(monitor.progress.sampled)
        if limits.trials is not None and limits.trials - monitor.progress.trials < ENOUGH_SEARCHED:
            return  # the user wants no more
        left, workers = max(0.0, limits.seconds_left(elapsed, now())), self.pool.size
        baselines = sum(b.point is not None and self.study.of_baseline(b.name) is None for b in self.state.baselines)
        reserve = self.reserved.seconds(workers)
        if said := too_short(left, reserve, seconds.trial, workers, baselines, proposed, elapsed):
            monitor.say(f"note: {said}")

    def show_incumbent(self) -> None:
        """Show the best trial of earlier sessions."""
        self.trials.show_incumbent(self.monitor.progress.best_number)

    def baselines_are_done(self) -> bool:
        """Whether every baseline in the space has a finished trial."""
        return all(b.point is None or self.study.of_baseline(b.name) is not None for b in self.state.baselines)

    def ended(self) -> str | None:
        """Why no trial may begin any more; None if one may."""
        limits, monitor = self.monitor.limits, self.monitor
        monitor.reserve(self.reserved.seconds(self.pool.size))
        running = self.study.count - monitor.progress.trials
        return limits.reached(monitor.progress, monitor.stopwatch.elapsed.seconds, now(), monitor.reserved, running)

    async def find_races(self) -> Races | None:
        """How this search's candidates race; None if looking at their scores early does not pay.

        Where races look is chosen once and kept with the study: it decides on batches, and so on the scores' last bits.
        """
        setup = make_race_setup(self.study, self.state.baselines, self.evaluations)
        if setup is not None and must_choose_looks(self.study, setup.items):
            result = await self.pool.run(RaceLooksJob(setup), "choosing where races look")
            if isinstance(result, Failure):
                self.run.log(f"candidates do not race in this session: {result.reason}")
                return None
            assert result.looks is not None, "a RaceLooksJob gives looks"
            self.study.stored.set_user_attr(LOOKS, {"items": setup.items, **asdict(result.looks)})
            self.run.log(f"races look after {', '.join(map(str, result.looks.ends))} items")
            setup = make_race_setup(self.study, self.state.baselines, self.evaluations)
        return None if setup is None else Races(self.study, setup)

    async def find_soup(self) -> GreedySoup:
        """The greedy soup, added to the baselines unless it is one of them."""
        soup = await greedy_soup(self.study.space, self.state.baselines, self.objective_of)
        if soup.baseline not in self.state.baselines:
            self.state.baselines.append(soup.baseline)
        self.run.log(soup.sentence)
        return soup

    async def objective_of(self, baseline: Baseline) -> float:
        """A baseline's value: its trial's, else that of a full evaluation on the search split.

        Minus infinity if the model is broken: a failed trial, a score that is not finite.
        """
        if baseline.point is not None and (trial := self.study.of_baseline(baseline.name)) is not None:
            return -float("inf") if trial.value is None else trial.value
        try:
            scores = await self.evaluations.score("search", baseline.recipe, baseline.name)
        except ArithmeticError:
            return -float("inf")
        return self.evaluations.scale.value(scores)
