"""A worker's evaluator: bank, live model and engine.  From a recipe to item scores, and where the time went."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from evomerge.config.schema import SearchConfig
from evomerge.device import TORCH_DTYPES, resolve_device, use
from evomerge.errors import EvomergeError
from evomerge.evaluate.canary import Broken, Signs, canary_prompts, check_signs, measure_signs
from evomerge.evaluate.clock import Clock, Counts, counter, forwards_of
from evomerge.evaluate.engine import Engine, Trunks, scores_of
from evomerge.evaluate.item_values import ItemMetrics
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.evaluate.prepared_items import prepared_workload
from evomerge.evaluate.racing import Race
from evomerge.evaluate.tasks import Item, Split, Task
from evomerge.evaluate.token_budget import token_budget
from evomerge.evaluate.workload import Workload, join_workloads
from evomerge.merge.bank.bank import Bank
from evomerge.merge.bank.memory import Share
from evomerge.merge.compute_dtype import faster_type, measure
from evomerge.merge.kernels.compiled import compiled_for
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import NotFinite, materialise
from evomerge.merge.measure.prepare import Fingerprints, measure_sources
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.budget.meter import Meter
from evomerge.search.evaluation.jobs import Failure, Job, Outcome, RaceLooksJob, Result, TrialJob
from evomerge.search.evaluation.race_setup import RaceChunk, RaceSetup, build_race_chunks, choose_looks
from evomerge.search.evaluation.task_set import Scores, TaskSet
from evomerge.search.models import model_folders, refuse_changed, shapes_of, stamps
from evomerge.search.storage.item_scores import rounded
from evomerge.sources.open_models import Models
from evomerge.sources.tokenizer import open_tokenizer


class Evaluator:
    """One device's evaluator: bank, live model, engine and prepared items.

    check: called between batches, may raise to interrupt the work.  progress: called with the batches of an
    full evaluation that are done, and their total.  share: who else uses the device and the machine.
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
    ) -> None:
        self.config = config
        self.cache = cache
        self.check = check
        self.progress = progress
        self.log = log
        self.task_set = task_set
        self.folders = model_folders(config)
        self.stamps = stamps(self.folders)
        device = resolve_device(config.device)
        use(device)
        computing = config.compute_dtype
        if computing == "auto":  # a driver settles it; who opens an evaluator by itself has no study to keep it in
            computing = faster_type(config.dtype, measure(config.dtype, device.type, shapes_of(models)))
        dtype, held = TORCH_DTYPES[config.dtype], TORCH_DTYPES[computing]
        compiled = compiled_for(models.base.tensors, device, log)
        self.bank = Bank(models, device, compiled=compiled, cache=cache, live=held, share=share)
        self.model = candidate_model(self.bank, dtype, held)
        self.destinations = destinations(self.model, self.bank)
        budget = token_budget(config.batch_tokens, self.model, self.bank.room.left, cache)
        self.engine = Engine(self.model, open_tokenizer(models.base.path), budget, log)
        self.workloads: dict[tuple[Split, bool], Workload] = {}
        self.race_chunks: dict[str, list[RaceChunk]] = {}
        self.prompts: torch.Tensor | None = None
        self.counts = Counts()

    def prepare(self, inputs: Fingerprints) -> None:
        """Do all that comes before the first recipe.  EvomergeError if an item does not fit the model."""
        self.prepared("search", everything=False)
        if self.cache is not None:
            measure_sources(self.bank, self.config.method, [s.name for s in self.config.sources], self.cache, inputs)

    def prepared(self, split: Split, everything: bool) -> Workload:
        """The split's items as a workload, built once.  everything: all metrics, not the objective alone."""
        key = (split, everything)
        if key not in self.workloads:
            self.workloads[key] = self.joined(self.asked(split, everything))
        return self.workloads[key]

    def asked(self, split: Split, everything: bool) -> list[Workload]:
        """What each task asks on the split; kept in the run's folder."""
        items = self.task_set.split(split)
        if self.cache is None:
            return [self.engine.workload(t, items[t.name], everything) for t in self.task_set.tasks]
        folder = self.cache / "items"
        tasks = self.task_set.tasks
        return [prepared_workload(self.engine, t, split, items[t.name], everything, folder) for t in tasks]

    def joined(self, works: Sequence[Workload]) -> Workload:
        """Workloads of single tasks as one."""
        whole = join_workloads(works)
        self.engine.plan(whole)
        return whole

    def run(self, job: Job) -> Result:
        """Do a job; whatever goes wrong with the candidate is its result.

        EvomergeError if the search is at fault, or a model's file has been replaced: what lies in mapped memory may
        then be half the old and half the new one.
        """
        refuse_changed(self.stamps, stamps(self.folders))
        with Meter(self.counts, self.bank.device) as meter:
            result = self.attempt(job)
        refuse_changed(self.stamps, stamps(self.folders))
        return replace(result, used=meter.used)

    def attempt(self, job: Job) -> Result:
        try:
            if isinstance(job, TrialJob):
                return self.score_trial(job.recipe, job.normal, job.race_setup, job.race)
            if isinstance(job, RaceLooksJob):
                return self.choose_looks(job.race_setup)
            everything = job.split != "search"  # there only objectives are compared, and generating answers takes long
            return self.evaluate(job.recipe, job.split, everything, only=self.chosen(job.split, job.only))
        except EvomergeError:
            raise
        except (NotFinite, NotFiniteScore, Broken) as error:
            return Failure(reason(error), broken=True)
        except Exception as error:  # any bug of any library may cost this candidate, not the run
            free_memory(self.bank.device)
            return Failure(reason(error), traceback=traceback.format_exc())

    def chosen(self, split: Split, ids: Mapping[str, Sequence[str]] | None) -> dict[str, list[Item]] | None:
        """The items of a split with these ids, None for all."""
        if ids is None:
            return None
        wanted = {task: set(names) for task, names in ids.items()}
        found = {t: [i for i in items if i.id in wanted.get(t, ())] for t, items in self.task_set.split(split).items()}
        return {task: items for task, items in found.items() if items}

    def evaluate(
        self, recipe: Recipe, split: Split, everything: bool, only: Mapping[str, Sequence[Item]] | None = None
    ) -> Outcome:
        """Materialise and score.  NotFinite or NotFiniteScore if the candidate is broken.

        only: the items by task, if not all of the split.
        """
        if only is None or only == self.task_set.split(split):
            work = self.prepared(split, everything)
        else:
            tasks = [t for t in self.task_set.tasks if t.name in only]
            work = self.joined([self.engine.workload(t, only[t.name], everything) for t in tasks])
        clock = Clock(self.check, counter(work.steps, self.progress), self.counts, self.bank.device)
        self.materialise(recipe, clock)
        found = zip(work.by_task, self.engine.score_parts(work, clock), strict=True)
        with clock.time("score"):
            return Outcome({part.task.name: item_scores(part.task, metrics) for part, metrics in found}, clock.seconds)

    def score_trial(
        self, recipe: Recipe, normal: Signs | None, race_setup: RaceSetup | None = None, race: Race | None = None
    ) -> Outcome:
        """A trial, see `TrialJob`.  NotFinite, NotFiniteScore or Broken if the candidate is broken."""
        work = self.prepared("search", everything=False)
        clock = Clock(self.check, counts=self.counts, device=self.bank.device)
        self.materialise(recipe, clock)
        if self.prompts is None:
            self.prompts = canary_prompts(contexts(work.by_task), self.bank.device)
        with clock.time("canary"), forwards_of(self.model, self.counts):
            seen = measure_signs(self.model, self.prompts, normal)
            check_signs(seen, normal)
        if race_setup is None or race is None:
            return Outcome(self.objectives(work, clock, None), clock.seconds, seen)
        if race_setup.name not in self.race_chunks:
            self.race_chunks = {race_setup.name: build_race_chunks(race_setup, self.engine, work.by_task)}
        trunks: Trunks = {}
        every = np.full(len(race_setup.ceiling), np.nan)  # (N,)
        for race_chunk in self.race_chunks[race_setup.name]:
            found = self.objectives(race_chunk.work, clock, trunks)
            with clock.time("race"):
                for metrics, where in zip(found.values(), race_chunk.where, strict=True):
                    (every[where],) = metrics.values()
                if race.observe(every[race_chunk.items]):
                    break
        own = race_setup.by_task(every)
        scores = {t.name: {t.objective: own[t.name].tolist()} for t in self.task_set.tasks}
        return Outcome(scores, clock.seconds, seen, race.estimate() if race.stopped else None)

    def choose_looks(self, race_setup: RaceSetup) -> Outcome:
        """See `RaceLooksJob`."""
        work = self.prepared("search", everything=False)
        return Outcome({}, {}, looks=choose_looks(race_setup, self.engine, work.by_task, work))

    def materialise(self, recipe: Recipe, clock: Clock) -> None:
        with clock.time("merge"):
            materialise(recipe, self.bank, self.destinations, self.check)

    def objectives(self, work: Workload, clock: Clock, trunks: Trunks | None) -> Scores:
        """Task -> its objective -> item scores."""
        found = zip(work.by_task, self.engine.score_parts(work, clock, trunks), strict=True)
        with clock.time("score"):
            tasks = [(part.task, metrics) for part, metrics in found]
            return {t.name: {t.objective: finite(t, t.objective, metrics)} for t, metrics in tasks}


def contexts(work: Sequence[Workload]) -> list[tuple[int, ...]]:
    """What the items of workloads say before their answers: the first of each task, the second of each, and so on."""
    each = [[r.tokens[: -r.scored] for r in w.rows] or [p.context for p in w.prompts] for w in work]
    return [context for row in zip_longest(*each) for context in row if context]


def item_scores(task: Task, found: ItemMetrics) -> dict[str, list[float]]:
    """Item scores of the metrics that the search uses or shows: objective, metric and the smooth ones.

    NotFiniteScore: see `finite`.
    """
    wanted = dict.fromkeys(m for m in (task.objective, task.metric, "gold_logprob") if m in found)
    return {metric: finite(task, metric, found) for metric in wanted}


def finite(task: Task, metric: str, found: ItemMetrics) -> list[float]:
    """The item scores of one metric.  NotFiniteScore if one is NaN or infinite: a study keeps NaN for items that were
    not scored, and neither a race nor a mean can tell what such a score is worth."""
    with np.errstate(over="ignore"):
        scores = rounded(scores_of(task, metric, found))
    if not np.isfinite(scores).all():
        wrong = next(s for s in scores if not np.isfinite(s))
        raise NotFiniteScore(f"task {task.name}: the {metric} of an item is {wrong}")
    return scores


def free_memory(device: torch.device) -> None:
    """Give cached blocks back after an out-of-memory error, so that the next trial starts clean."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Why there is no score, in one line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:500]
