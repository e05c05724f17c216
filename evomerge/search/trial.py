"""One trial of a search, from its proposal to its record in the database.

SearchStudy.begin   a point of the search space, in the database before the work begins
job_of              its recipe, and the race that it runs in
Pool.run            item scores, or why there are none
store               the trial's value and record, in the database and in the sampler
"""

import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

from evomerge.errors import EvomergeError
from evomerge.evaluate.canary import normal_signs
from evomerge.evaluate.signs import Signs
from evomerge.search.evaluation.evaluator import reason
from evomerge.search.evaluation.jobs import Failure, Outcome, Result, TrialJob
from evomerge.search.evaluation.race_policy import Races
from evomerge.search.evaluation.scale import Scale
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.failures import stop_after_failures
from evomerge.search.monitor.incumbent import coefficients_of, means, task_scores
from evomerge.search.monitor.monitor import remark
from evomerge.search.run import Run
from evomerge.search.space.baselines import Baseline, base_alone
from evomerge.search.space.space import Point
from evomerge.search.storage.item_scores import pack, trial_scores
from evomerge.search.storage.study import Begun, LearnedPoint, SearchStudy, in_full
from evomerge.search.storage.trial_record import RaceRecord, Seconds, TrialRecord, record_of


class TrialRunner:
    """Runs trials; as many at the same time as there are calls of `run`.

    run: the run folder, for its log.
    study: proposes points and stores results.
    evaluations: item scores of recipes that are in the study already; has the workers, which do the jobs, and the
        monitor, which is told of every finished trial.
    """

    def __init__(self, run: Run, study: SearchStudy, evaluations: Evaluations) -> None:
        self.log = run.log
        self.study = study
        self.evaluations = evaluations
        self.pool = evaluations.pool
        self.monitor = evaluations.monitor
        self.storing = 0.0  # seconds that it took to store the last trial

    async def run(
        self, baselines: Sequence[Baseline], races: Races | None, learned: LearnedPoint | None = None
    ) -> None:
        """Run one trial: an interrupted one, else the next baseline, else a learned point, else a proposal.

        baselines: all that are known so far.
        races: None if candidates do not race, or not yet.
        learned: the point that gradient steps led to; None lets the sampler propose.

        An error inside the trial becomes the trial's recorded reason.  Raises EvomergeError if the search itself is at
        fault, or when too many trials in a row have failed.
        """
        started = time.perf_counter()
        trial = self.study.begin(next_baseline(self.study, baselines), learned)
        proposed = time.perf_counter()
        self.log(f"trial {trial.number} begins")
        work, race = self.job_of(trial, baselines, races)
        if isinstance(work, TrialJob):
            work = await self.pool.run(work, f"trial {trial.number}", trial=trial.number)
        self.store(trial, work, race, started, proposed)
        stop_after_failures(self.study)

    def job_of(
        self, trial: Begun, baselines: Sequence[Baseline], races: Races | None
    ) -> tuple[TrialJob | Result, RaceRecord | None]:
        """The trial's job, or its result where no worker is needed; and the race that it runs in, for its record."""
        try:
            recipe = self.study.space.recipe(trial.params)
            # Parents were scored for the scale, the greedy soup to be found, other recipes to choose the method.
            known = self.evaluations.stored("search", recipe) if trial.baseline else None
            if known:
                return Outcome(known, {}, self.evaluations.signs("search", recipe)), None
            if trial.baseline:
                return TrialJob(recipe, None), None
            if self.study.space.assembly and (same := self.study.at(trial.params)) is not None:
                scores = {t: {m: x.tolist() for m, x in by.items()} for t, by in trial_scores(same).items()}
                return Outcome(scores, {}, record_of(same).signs), None  # choices are often drawn again
            races = races if trial.learned is None else None
            race, setup, record = races.next(trial.weights) if races else (None, None, RaceRecord(None))
            signs = parent_signs(self.study, baselines)
            return TrialJob(recipe, signs, setup if race else None, race), record
        except EvomergeError:
            raise
        except Exception as error:  # a bug in making the recipe costs this trial
            return Failure(reason(error), traceback=traceback.format_exc()), None

    def store(self, trial: Begun, result: Result, race: RaceRecord | None, started: float, proposed: float) -> None:
        """Store a trial's value and record, and tell the sampler and the monitor.

        race: the race that it ran in; None for a baseline.
        started, proposed: seconds of `time.perf_counter` at which the trial began and had its point.

        A broken candidate has the value of the worst, so that samplers learn from it.  A finished trial cannot be
        written to, so the time of its storing is in the record of the next one.
        """
        value = None
        if isinstance(result, Outcome):
            value = value_of(result, self.evaluations.scale)
            record = describe(result, self.evaluations.task_set, self.evaluations.items("search"))
        elif result.broken:
            value = self.study.penalty
            record = TrialRecord(broken=result.reason)
        else:
            record = TrialRecord(reason=result.reason)
            self.log(f"trial {trial.number}: {result.traceback}")
        scored = time.perf_counter()
        total = scored - started + self.storing
        record = replace(
            record,
            race=race,
            compute_dtype=self.study.space.config.compute_dtype,
            seconds=replace(record.seconds, propose=proposed - started, store=self.storing, total=total),
            used=replace(result.used, seconds=total),
            elapsed=self.monitor.stopwatch.elapsed,
        )
        state = self.study.finish(trial, value, record)
        self.log(f"trial {trial.number} {state.name.lower()} value={value} {remark(record)}".rstrip())
        self.storing = time.perf_counter() - scored
        self.monitor.trial(trial.number, value, record, trial.baseline)
        self.track(trial, value, record)
        if self.monitor.progress.best_number == trial.number:
            self.show_incumbent(trial.number)

    def track(self, trial: Begun, value: float | None, record: TrialRecord) -> None:
        """Log a finished trial to the programs of `log_to`."""
        if not self.monitor.trackers:
            return
        progress, in_full = self.monitor.progress, value is not None and record.in_full
        evaluated = 1.0 if in_full else record.partial or 0.0
        scores = means(record.scores) if in_full else {}
        coefficients = coefficients_of(trial.params, self.study.space)
        seconds = record.seconds.total
        self.monitor.trackers.trial(
            progress.trials, trial.number, value, progress.best, evaluated, seconds, scores, coefficients
        )

    def show_incumbent(self, number: int) -> None:
        """Show the scores and coefficients of the best trial.  number: -1 if there is none yet."""
        found = next((t for t in self.study.complete if t.number == number), None)
        if found is None:
            return
        space, attributes = self.study.space, self.study.stored.user_attrs
        parents = [source.name for source in space.config.sources]
        scores = task_scores(found, attributes, self.evaluations.scale, base_alone(space).name, parents)
        self.monitor.incumbent(scores, coefficients_of(found.params, space))


def next_baseline(study: SearchStudy, baselines: Sequence[Baseline]) -> tuple[str, Point] | None:
    """The first baseline in the space that has no trial yet."""
    there = study.baselines
    return next(((b.name, b.point) for b in baselines if b.point is not None and b.name not in there), None)


def parent_signs(study: SearchStudy, baselines: Sequence[Baseline]) -> Signs | None:
    """What the canary saw of the parents: the signs of a healthy model.  None if no parent has been evaluated."""
    trials = [study.of_baseline(b.name) for b in baselines if b.kind == "parent"]
    records = [record_of(t) for t in trials if t is not None and in_full(t)]
    return normal_signs([r.signs for r in records if r.signs is not None])


def value_of(outcome: Outcome, scale: Scale) -> float:
    """The value that the sampler is told: the estimate of a stopped candidate, else the mean value of the items."""
    return outcome.estimate.value if outcome.estimate else scale.value(outcome.scores)


def describe(outcome: Outcome, task_set: TaskSet, items: str) -> TrialRecord:
    """What the study keeps of an outcome.  items: the name of the item ids."""
    return TrialRecord(
        items=items,
        scores={
            t.name: {metric: pack(outcome.scores[t.name][metric]) for metric in task_set.wanted(t, "search")}
            for t in task_set.tasks
        },
        signs=replace(outcome.signs, repeats=False) if outcome.signs else None,  # the record has no place for it
        partial=outcome.estimate.fraction if outcome.estimate else None,
        seconds=Seconds(**outcome.seconds),
    )
