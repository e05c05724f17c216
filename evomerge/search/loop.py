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
from evomerge.search.baselines import Baseline, baselines
from evomerge.search.board import Board, told
from evomerge.search.computing import settle
from evomerge.search.course import LOOKS, make_course, may_race, must_survey, rivals
from evomerge.search.exam import Exam, open_exam
from evomerge.search.failures import FAILURES_IN_A_ROW, explain_failures, failures_in_a_row
from evomerge.search.finals import finish, search_score
from evomerge.search.jobs import Failure, Outcome, Result, Survey, Tryout
from evomerge.search.lease import Lease, lease
from evomerge.search.ledger import Ledger
from evomerge.search.limits import now
from evomerge.search.race import Course
from evomerge.search.reserve import SPLITS, ReservedTime, export_seconds
from evomerge.search.run import Run, claim
from evomerge.search.scorer import open_config_models, reason
from evomerge.search.scores import pack
from evomerge.search.soup import GREEDY, GreedySoup, greedy_soup
from evomerge.search.space import Point, build_space
from evomerge.search.stop import StopSignal, stoppable
from evomerge.search.storage import Patience, open_study
from evomerge.search.study import Begun, SearchStudy, in_full, record_of
from evomerge.search.usage import stored_usage
from evomerge.search.verdict import Verdict
from evomerge.search.workers.crew import Crew, device_kind, make_workers
from evomerge.search.workers.pool import Pool, together

BEAT = 5.0  # seconds between signs of life in the study


def search(run: Run, board: Board, stop: StopSignal, crew: Crew, out: Path | None = None) -> Verdict:
    """Run or go on with a search until its limits, then judge the finalists and write the verdict.

    out: where the model will be written afterwards, which takes its time too.  Interrupted if the user stops it:
    everything finished is in the study.  EvomergeError on wrong input, or when ten trials in a row fail.
    """
    return asyncio.run(drive(run, board, stop, crew, out))


async def drive(run: Run, board: Board, stop: StopSignal, crew: Crew, out: Path | None) -> Verdict:
    config = run.config()
    board.phase("opening the models")
    models = open_config_models(config)
    for note in models.compatibility.notes:
        run.log(f"note: {note}")
    exam = open_exam(config)
    patience = Patience(stop.check, run.log)
    stored = open_study(run.storage_url(config), config.name, create=True, patience=patience)
    holder = lease(stored, BEAT, stop.check)
    try:
        claim(stored, run)
        study = SearchStudy(stored, build_space(config, models))
        board.restore(study.trials, stored.user_attrs)
        export = export_seconds(config, models, out) if out and board.limits.timed else 0.0
        config = settle(stored, config, models, device_kind(crew, config), board.say)
        board.compute_dtype = config.compute_dtype
        workers = make_workers(crew, run, config, models, exam, stop.check, board.phase)
        if len(workers) > 1:
            board.phase(f"starting {len(workers)} workers")
        study.workers = len(workers)
        pool = Pool(workers, run.log, config.workers.stuck, config.workers.trial)
        board.workers = pool.states
        board.stopwatch.hold(len(workers))
        driver = Driver(run, study, Ledger(stored, exam, pool, board), pool, board, export)
        try:
            await stoppable(stop, pool.open(), board.beat)
            return await stoppable(stop, driver.search(), lambda: signs_of_life(board, holder))
        finally:
            await pool.close()
    finally:
        holder.release()


def signs_of_life(board: Board, holder: Lease) -> None:
    """For people, and for other drivers that would like the study."""
    board.beat()
    holder.beat_in_time()


class Driver:
    """Owns study and sampler: proposes, sends recipes to the pool, takes scores as they come, decides.

    There are as many slots as workers, each with one thing in hand: a trial, or for a while the greedy soup.  So a
    free worker always gets a trial, and with one worker everything happens in one order.
    """

    def __init__(self, run: Run, study: SearchStudy, ledger: Ledger, pool: Pool, board: Board, export: float) -> None:
        """export: seconds that writing the model will take."""
        self.run = run
        self.study = study
        self.ledger = ledger
        self.exam = ledger.exam
        self.pool = pool
        self.board = board
        self.known = baselines(study.space)
        items = {split: sum(map(len, self.exam.split(split).values())) for split in SPLITS}
        self.reserved = ReservedTime(study, self.known, items, export)
        self.failures = failures_in_a_row(study)
        self.soup: GreedySoup | None = None
        self.cooking = False
        self.course: Course | None = None
        self.vectors: dict[int, Vector] = {}  # item scores of finished trials, unpacked
        self.storing = 0.0  # seconds that it took to store the last trial

    async def search(self) -> Verdict:
        outside = [b for b in self.known if b.point is None]
        await together(*(search_score(self.study, self.ledger, b) for b in outside))
        self.board.phase("searching")
        await together(*(self.slot() for _ in range(self.pool.size)))
        soup = self.soup or await self.make_soup()  # the budget ended among the baselines
        self.board.phase("judging the finalists")
        return await finish(self.run, self.study, self.ledger, self.known, soup)

    async def slot(self) -> None:
        """One trial after the other, until the budget ends."""
        while (end := self.ended()) is None:
            if not self.cooking and self.baselines_are_done():
                self.cooking = True
                self.course = await self.make_course()
                self.soup = await self.make_soup()
            else:
                await self.trial()
        self.run.log(f"no more trials: {end}")

    def ended(self) -> str | None:
        """Why no trial may begin any more, None if one may."""
        limits, board = self.board.limits, self.board
        board.reserved = self.reserved.seconds(self.pool.size) if limits.timed else 0.0
        in_hand = self.study.count - board.progress.trials
        return limits.reached(board.progress, board.stopwatch.elapsed.seconds, now(), board.reserved, in_hand)

    def baselines_are_done(self) -> bool:
        return all(b.point is None or self.study.of_baseline(b.name) is not None for b in self.known)

    async def make_course(self) -> Course | None:
        """The course of this search's races, None if looking at candidates early does not pay.

        Where races look is found out once and kept with the study: it decides on batches, and so on bits.
        """
        course = make_course(self.study, self.known, self.ledger)
        if course is None or not must_survey(self.study, course.items):
            return course
        result = await self.pool.run(Survey(course), "where races look")
        if isinstance(result, Failure):
            self.run.log(f"candidates are not raced in this session: {result.reason}")
            return None
        assert result.looks is not None, "a survey places looks"
        self.study.stored.set_user_attr(LOOKS, {"items": course.items, **asdict(result.looks)})
        self.run.log(f"races look after {', '.join(map(str, result.looks.ends))} items")
        return make_course(self.study, self.known, self.ledger)

    async def make_soup(self) -> GreedySoup:
        """The greedy soup, added to the baselines unless it is one of them."""
        soup = await greedy_soup(self.study.space, self.known, lambda b: search_score(self.study, self.ledger, b))
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
            value = value_of(result, self.exam)
            record |= describe(result, self.exam, self.ledger.items("search"))
            seconds = result.seconds
        elif result.broken:
            record["broken"] = result.reason
            value = self.study.penalty
        else:
            record["reason"] = result.reason
            self.run.log(f"trial {trial.number}: {result.traceback}")
        record["compute_dtype"] = self.board.compute_dtype
        scored = time.perf_counter()
        total = scored - started + self.storing
        times = {"propose": proposed - started, "store": self.storing, "total": total}
        record["seconds"] = {**seconds, **times}
        record |= stored_usage(replace(result.used, seconds=total), self.board.stopwatch)
        state = self.study.finish(trial, value, record)
        self.run.log(f"trial {trial.number} {state.name.lower()} value={value} {told(record)}".rstrip())
        self.storing = time.perf_counter() - scored
        self.board.trial(trial.number, value, record, trial.baseline)
        self.failures = self.failures + 1 if isinstance(result, Failure) else 0
        if self.failures >= FAILURES_IN_A_ROW:
            raise EvomergeError(explain_failures(self.study))

    async def result_of(self, trial: Begun, record: dict[str, Any]) -> Result:
        """The trial's scores; the race it ran in goes into the record, so that it can be run again alone."""
        try:
            recipe = self.study.space.recipe(trial.params)
            known = self.ledger.stored("search", recipe) if trial.baseline == GREEDY else None
            if known:  # it was scored to be found
                return Outcome(known, {})
            job = Tryout(recipe, None)
            if not trial.baseline:
                course, race, record["race"] = self.race()
                job = Tryout(recipe, healthy(self.study, self.known), course, race)
        except EvomergeError:
            raise
        except Exception as error:  # a bug in making the recipe costs this trial
            return Failure(reason(error), traceback=traceback.format_exc())
        return await self.pool.run(job, f"trial {trial.number}", trial=trial.number)

    def race(self) -> tuple[Course | None, Race | None, dict[str, Any] | None]:
        """A race against the incumbent, and who ran in it; None before there is one on these items."""
        course = self.course
        if course is None or not may_race(self.study, course):
            return None, None, None
        incumbent, others = rivals(self.study, course.items)
        if incumbent is None:
            return None, None, None
        numbers = {"incumbent": incumbent.number, "others": [t.number for t in others]}
        return course, course.race(self.vector(incumbent), [self.vector(t) for t in others]), numbers

    def vector(self, trial: FrozenTrial) -> Vector:
        """A trial's item scores, (N,)."""
        assert self.course is not None, "scores are put in the order of a course"
        if trial.number not in self.vectors:
            self.vectors[trial.number] = self.course.vector(trial)
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


def value_of(outcome: Outcome, exam: Exam) -> float:
    """What the sampler is told of a candidate that was scored."""
    return outcome.estimate.value if outcome.estimate else exam.mean(outcome.scores, "objective")


def describe(outcome: Outcome, exam: Exam, items: str) -> dict[str, Any]:
    """What the study keeps of an outcome.  items: the name of the item ids."""
    scores = {t.name: {t.objective: pack(outcome.scores[t.name][t.objective])} for t in exam.tasks}
    record: dict[str, Any] = {"items": items, "scores": scores}
    if outcome.signs:
        record["signs"] = [outcome.signs.entropy, outcome.signs.sameness]
    if outcome.estimate:
        record["partial"] = outcome.estimate.fraction
    return record
