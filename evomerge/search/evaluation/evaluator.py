"""The evaluator of one device: does a job, which is a recipe and the items to score, and returns the item scores.

Every job with a recipe takes these steps:

1. `materialise`: merge the recipe into the weights of the live model.
2. Of a trial only: the canary, a few prompts that show whether the model is broken.
3. The engine scores the items, all at once or, in a race, chunk by chunk until the race stops the candidate.
4. `score_checks`: a score that is not finite breaks the candidate.

Whatever goes wrong with the candidate on the way becomes the job's `Failure`.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from evomerge.config.schema import SearchConfig
from evomerge.device import free_memory, resolve_device, use
from evomerge.errors import EvomergeError
from evomerge.evaluate.answers import Answer, answers_of
from evomerge.evaluate.canary import Broken, canary_prompts, check_signs, measure_signs
from evomerge.evaluate.clock import Batches, Clock, Counts, forwards_of
from evomerge.evaluate.gradient import GradientMemory, backward
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.evaluate.python_task import TaskCodeFailed
from evomerge.evaluate.racing import Race
from evomerge.evaluate.signs import Signs
from evomerge.evaluate.tasks import Split
from evomerge.evaluate.workload import Workload
from evomerge.merge.bank.memory import Share
from evomerge.merge.gradient import KnobTaps
from evomerge.merge.live import candidate_model
from evomerge.merge.live_layers import LiveLayers
from evomerge.merge.materialise import NotFinite, materialise
from evomerge.merge.measure.prepare import Fingerprints, measure_sources
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.budget.meter import Meter
from evomerge.search.evaluation.jobs import Failure, GradientJob, Job, Outcome, RaceLooksJob, Result, TrialJob
from evomerge.search.evaluation.open_device import open_bank, open_engine, types_of
from evomerge.search.evaluation.race_setup import RaceSetup, choose_looks
from evomerge.search.evaluation.score_checks import checked, needed_scores
from evomerge.search.evaluation.split_workloads import SplitWorkloads
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.evaluation.trial_scorer import TrialScorer
from evomerge.search.models import model_folders, model_stamps, refuse_changed
from evomerge.sources.open_models import Models


class Evaluator:
    """Does jobs on one device.  It holds the bank, the live model, the engine and the prepared items.

    config: of the search; names device, types and token budget.
    models: base and sources, opened and checked.
    task_set: the tasks with their items.
    check: called between batches; may raise to interrupt the work.
    log: gets the lines that belong into the run's log.
    cache: the folder that keeps prepared items and measurements of the sources; None keeps nothing.
    progress: called with the number of batches of an `EvaluationJob` that are done, and their total.
    share: how many workers share the device and the machine; None if there is only this one.
    live: a live model of the same configuration that is loaded already, of which only the weights may differ.
    """

    def __init__(
        self,
        config: SearchConfig,
        models: Models,
        task_set: TaskSet,
        check: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = print,
        cache: Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        share: Share | None = None,
        live: Any = None,
    ) -> None:
        self.config = config
        self.cache = cache
        self.check = check
        self.progress = progress
        self.log = log
        self.task_set = task_set
        self.folders = model_folders(config)
        self.stamps = model_stamps(self.folders)
        device = resolve_device(config.device)
        use(device)
        self.language = any(not task.is_python for task in task_set.tasks)
        types = types_of(config, models)
        if live is not None and (live.dtype != types.held or live.device.type != device.type):
            live = None
        self.bank = open_bank(config, models, log, cache, share, types.held if live is None else None)
        self.model = candidate_model(self.bank, *types, self.language) if live is None else live
        self.live = LiveLayers(self.model, self.bank)
        self.taps = KnobTaps(self.model, *self.live.fitted)
        self.engine = open_engine(config, self.bank, self.model, self.language, log, cache)
        self.workloads = SplitWorkloads(self.engine, task_set, cache)
        self.trial_scorer = TrialScorer(self.engine, self.workloads)
        self.prompts: torch.Tensor | None = None
        self.gradient_memory: GradientMemory | None = None
        self.counts = Counts()

    def prepare(self, inputs: Fingerprints) -> None:
        """Do all that comes before the first recipe: prepare the search split's items, measure the sources.

        inputs: SHA-256 of the models' files, by model.  EvomergeError if an item does not fit the model.
        """
        self.workloads.whole("search")
        if self.config.vocabulary is not None:
            inputs = {name: {**files, "vocabulary": self.config.vocabulary} for name, files in inputs.items()}
        if self.cache is not None:
            for method in self.config.candidate_methods:
                measure_sources(self.bank, method, [s.name for s in self.config.sources], self.cache, inputs)

    def run(self, job: Job) -> Result:
        """Do a job; whatever goes wrong with the candidate is returned as a `Failure`.

        EvomergeError if the search itself cannot go on, or if a file of a model has been replaced: mapped memory may
        then hold half of the old file and half of the new one.
        """
        refuse_changed(self.stamps, model_stamps(self.folders))
        with Meter(self.counts, self.bank.live_device) as meter:
            result = self.attempt(job)
        refuse_changed(self.stamps, model_stamps(self.folders))
        return replace(result, used=meter.used)

    def attempt(self, job: Job) -> Result:
        """Do a job of any kind; errors of the candidate become a `Failure`.

        An error in the function of a Python task fails a trial.  It ends the search where base, parents or finalists
        are scored: there it is hardly the model that is wrong.
        """
        try:
            if isinstance(job, TrialJob):
                return self.score_trial(job.recipe, job.normal, job.race_setup, job.race)
            if isinstance(job, RaceLooksJob):
                return self.choose_looks(job.race_setup)
            if isinstance(job, GradientJob):
                return self.gradient(job)
            everything = job.everything or job.split != "search"  # generating answers takes long
            return self.evaluate(job.recipe, job.split, everything, job.only, job.canary)
        except TaskCodeFailed as error:
            if not isinstance(job, TrialJob):
                raise
            return Failure(reason(error), error.is_value, traceback="" if error.is_value else str(error))
        except EvomergeError:
            raise
        except (NotFinite, NotFiniteScore, Broken) as error:
            return Failure(reason(error), broken=True)
        except Exception as error:  # any bug of any library may cost this candidate, not the run
            free_memory(self.bank.live_device)
            return Failure(reason(error), traceback=traceback.format_exc())

    # --- The kinds of jobs ---

    def score_trial(
        self, recipe: Recipe, normal: Signs | None, race_setup: RaceSetup | None = None, race: Race | None = None
    ) -> Outcome:
        """Score a candidate on the search split, see `TrialJob`.

        NotFinite, NotFiniteScore or Broken if the candidate is broken.
        """
        work = self.workloads.whole("search")
        clock = Clock(self.check, counts=self.counts, device=self.bank.live_device)
        self.materialise(recipe, clock)
        seen = self.seen_by_canary(normal, clock)
        if race_setup is None or race is None:
            return Outcome(self.trial_scorer.score(work, clock), clock.seconds, seen)
        scores = self.trial_scorer.score_in_race(race_setup, race, clock)
        return Outcome(scores, clock.seconds, seen, race.estimate() if race.stopped else None)

    def evaluate(
        self,
        recipe: Recipe,
        split: Split,
        everything: bool,
        only: Mapping[str, Sequence[str]] | None = None,
        canary: bool = False,
    ) -> Outcome:
        """Score a recipe on a split, see `EvaluationJob`.

        everything: by every metric; else by what trials are scored by.
        NotFinite, NotFiniteScore or Broken if the candidate is broken.
        """
        work = self.workloads.chosen(split, everything, only)
        clock = Clock(self.check, Batches(work.steps, self.progress), self.counts, self.bank.live_device)
        self.materialise(recipe, clock)
        seen = self.seen_by_canary(None, clock) if canary else None
        found = zip(work.by_task, self.engine.score_parts(work, clock), strict=True)
        with clock.time("score"):
            scores = {part.task.name: needed_scores(part.task, metrics) for part, metrics in found}
        answers = self.answers(work) if split == "holdout" else {}
        return Outcome(scores, clock.seconds, seen, answers=answers)

    def choose_looks(self, race_setup: RaceSetup) -> Outcome:
        """Find out after which items races should look at a candidate, see `RaceLooksJob`."""
        work, goals = self.workloads.whole("search"), self.workloads.goals()
        whole = work if len(goals) == len(work.by_task) else self.engine.join(goals)
        return Outcome({}, {}, looks=choose_looks(race_setup, self.engine, goals, whole))

    def gradient(self, job: GradientJob) -> Outcome:
        """Compute the derivative of a mini-batch's objective by every coefficient, see `GradientJob`.

        NotFinite or NotFiniteScore if the candidate is broken.
        """
        wanted = {task: set(ids) for task, ids in job.items.items()}
        works = [
            part.pick([k for k, asked in enumerate(part.items) if asked.item.id in wanted[part.task.name]])
            for part in self.workloads.whole("search").by_task
            if part.task.name in wanted
        ]
        clock = Clock(self.check, counts=self.counts, device=self.bank.live_device)
        self.materialise(job.recipe, clock)
        weights = {work.task.name: [job.weights[work.task.name]] * len(work.items) for work in works}
        if self.gradient_memory is None:
            self.gradient_memory = GradientMemory.of(self.engine)
        with clock.time("forward"), forwards_of(self.model, self.counts), self.taps.watch(job.recipe) as found:
            values = backward(self.engine, works, weights, self.check, self.gradient_memory, found.reset)
        tasks = [work.task for work in works]
        scores = {t.name: {t.objective: checked(t, t.objective, values[t.name])} for t in tasks}
        gradient = {at: {c: (-v).tolist() for c, v in by.items()} for at, by in found.values.items()}
        return Outcome(scores, clock.seconds, gradient=gradient)

    # --- Merging and scoring ---

    def answers(self, work: Workload) -> dict[str, list[Answer]]:
        """What the model answered to a scored workload, by task, for the report; a report costs no result."""
        found = {}
        for part in work.by_task:
            try:
                found[part.task.name] = answers_of(self.engine, part)
            except Exception as error:  # a task's templates may raise whatever they like
                self.log(f"task {part.task.name}: its answers are not kept ({reason(error)})")
        return found

    def materialise(self, recipe: Recipe, clock: Clock) -> None:
        """Merge a recipe into the live model.  NotFinite if a merged weight is NaN or infinite."""
        with clock.time("merge"):
            materialise(recipe, *self.live.fit(recipe.slices), self.check)

    def seen_by_canary(self, normal: Signs | None, clock: Clock) -> Signs | None:
        """The signs of the candidate in the live model; None if no task asks a language model.

        Broken if they are not healthy beside the normal ones.
        """
        if not self.language:
            return None
        if self.prompts is None:
            self.prompts = canary_prompts(contexts(self.workloads.whole("search").by_task), self.bank.live_device)
        with clock.time("canary"), forwards_of(self.model, self.counts):
            seen = measure_signs(self.model, self.prompts, normal)
            check_signs(seen, normal)
        return seen


def contexts(work: Sequence[Workload]) -> list[tuple[int, ...]]:
    """Token ids before the answers of items: those of each task's first item, of each task's second item, and so on."""
    each = [[r.tokens[: -r.scored] for r in w.rows] or [p.context for p in w.prompts] for w in work]
    return [context for row in zip_longest(*each) for context in row if context]


def reason(error: Exception) -> str:
    """Why a candidate has no score, in one line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:500]
