"""From a recipe to item scores: materialise it in the live model, run the engine, say where the time went."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evomerge.config.schema import SearchConfig
from evomerge.device import TORCH_DTYPES, resolve_device
from evomerge.errors import EvomergeError
from evomerge.evaluate.canary import Signs, check, prompts, signs
from evomerge.evaluate.clock import Clock, counter
from evomerge.evaluate.engine import Engine, Trunks, scores_of
from evomerge.evaluate.metrics import ItemMetrics
from evomerge.evaluate.prepared import ask
from evomerge.evaluate.racing import Estimate, Race
from evomerge.evaluate.tasks import Item, Split, Task, deal, open_tasks
from evomerge.evaluate.workload import Workload, together
from evomerge.merge.bank import Bank
from evomerge.merge.compiled import compiled_for
from evomerge.merge.gathered import open_gathered
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe import Recipe
from evomerge.search.race import Course
from evomerge.search.scores import rounded
from evomerge.search.verdict import mean_score
from evomerge.sources.locate import locate
from evomerge.sources.open import Models, open_models

Dealt = dict[str, dict[Split, list[Item]]]
"""Task -> split -> its items."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave.

    scores: task -> metric -> one score per item, the higher the better; NaN for items that were not evaluated.
    seconds: by part of the work.  signs: what the canary saw.  estimate: of a candidate that was stopped.
    """

    scores: dict[str, dict[str, list[float]]]
    seconds: dict[str, float]
    signs: Signs | None = None
    estimate: Estimate | None = None

    def of(self, tasks: list[Task], which: str) -> dict[str, list[float]]:
        """Item scores of every task's `objective` or `metric`."""
        return {t.name: self.scores[t.name][getattr(t, which)] for t in tasks}


def open_config_models(config: SearchConfig) -> Models:
    """The models of a configuration, opened and checked.  EvomergeError lists what does not fit."""
    return open_models(locate(config.base), {s.name: locate(s.path) for s in config.sources})


def deal_all(tasks: Sequence[Task], config: SearchConfig) -> Dealt:
    return {t.name: deal(t, config.splits, config.seed) for t in tasks}


def check_statistics(config: SearchConfig, models: Models, items: Dealt) -> None:
    """EvomergeError if a statistics file does not fit its source, or saw items that the search judges by."""
    kind = METHODS[config.method].statistics
    for number, source in enumerate(config.sources if kind else []):
        assert kind is not None
        origin = open_gathered(Path(str(source.statistics)), kind, source.name, models).origin
        for task, splits in items.items():
            seen = set(origin.items.get(task, ()))
            for split in ("holdout", "selection"):
                if count := sum(i.id in seen for i in splits[split]):
                    raise EvomergeError(
                        f"sources.{number}.statistics: was gathered on {count} items of {task} that belong to this "
                        f"search's {split} split; gather it with `evomerge statistics --search CONFIG`, which takes "
                        "items of the search split alone"
                    )


def load_tokenizer(path: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


class Scorer:
    """One device's workshop: bank, live model, engine and prepared items."""

    def __init__(
        self,
        config: SearchConfig,
        models: Models,
        check: Callable[[], None],
        log: Callable[[str], None],
        cache: Path | None = None,
    ) -> None:
        self.config = config
        self.cache = cache
        self.check = check
        self.tasks = open_tasks(config.tasks)
        self.items = deal_all(self.tasks, config)
        check_statistics(config, models, self.items)
        device = resolve_device(config.device)
        self.bank = Bank(models, device, compiled=compiled_for(models.base.tensors, log), cache=cache)
        self.model = candidate_model(self.bank, TORCH_DTYPES[config.dtype])
        self.destinations = destinations(self.model, self.bank)
        self.engine = Engine(self.model, load_tokenizer(models.base.path), config.batch_tokens, log)
        self.workloads: dict[tuple[Split, bool], Workload] = {}
        self.prompts: torch.Tensor | None = None

    @property
    def weights(self) -> dict[str, float]:
        return {t.name: t.weight for t in self.tasks}

    def split(self, split: Split) -> dict[str, list[Item]]:
        """The items of a split by task."""
        return {t.name: self.items[t.name][split] for t in self.tasks}

    def prepared(self, split: Split, everything: bool) -> Workload:
        """The split's items as a workload, built once.  everything: all metrics, not the objective alone."""
        key = (split, everything)
        if key not in self.workloads:
            self.workloads[key] = self.joined(self.asked(split, everything))
        return self.workloads[key]

    def asked(self, split: Split, everything: bool) -> list[Workload]:
        """What each task asks on the split; kept in the run's folder."""
        if self.cache is None:
            return [self.engine.asked(t, self.items[t.name][split], everything) for t in self.tasks]
        folder = self.cache / "items"
        return [ask(self.engine, t, split, self.items[t.name][split], everything, folder) for t in self.tasks]

    def joined(self, works: Sequence[Workload]) -> Workload:
        """Workloads of single tasks as one."""
        whole = together(works)
        self.engine.plan(whole)
        return whole

    def evaluate(
        self,
        recipe: Recipe,
        split: Split,
        everything: bool,
        only: Mapping[str, Sequence[Item]] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Outcome:
        """Materialise and score.  NotFinite or NotFiniteScore if the candidate is broken.

        only: the items by task, if not all of the split.  progress: called with the batches done and their total.
        """
        if only is None or only == self.split(split):
            work = self.prepared(split, everything)
        else:
            work = self.joined([self.engine.asked(t, only[t.name], everything) for t in self.tasks if t.name in only])
        clock = Clock(self.check, counter(work.steps, progress))
        self.materialise(recipe, clock)
        found = zip(work.by_task, self.engine.score_parts(work, clock), strict=True)
        with clock.time("score"):
            return Outcome({part.task.name: item_scores(part.task, metrics) for part, metrics in found}, clock.seconds)

    def try_out(
        self,
        recipe: Recipe,
        normal: Signs | None,
        course: Course | None = None,
        race: Race | None = None,
    ) -> Outcome:
        """A trial: materialise, look whether it is broken, score the objective on the search split.

        normal: the signs of healthy models.  course, race: to stop it when it is surely worse than the incumbent;
        without a race it is scored in full.  NotFinite, NotFiniteScore or Broken if the candidate is broken.
        """
        work = self.prepared("search", everything=False)
        clock = Clock(self.check)
        self.materialise(recipe, clock)
        if self.prompts is None:
            self.prompts = prompts(contexts(work.by_task), self.bank.device)
        with clock.time("canary"):
            seen = signs(self.model, self.prompts, normal)
            check(seen, normal)
        if course is None or race is None:
            return Outcome(self.objectives(work, clock, None), clock.seconds, seen)
        trunks: Trunks = {}
        every = np.full(len(course.ceiling), np.nan)  # (N,)
        for heat in course.heats:
            found = self.objectives(heat.work, clock, trunks)
            with clock.time("race"):
                for metrics, where in zip(found.values(), heat.where, strict=True):
                    (every[where],) = metrics.values()
                if race.observe(every[heat.items]):
                    break
        own = course.by_task(every)
        scores = {t.name: {t.objective: own[t.name].tolist()} for t in self.tasks}
        return Outcome(scores, clock.seconds, seen, race.estimate() if race.stopped else None)

    def materialise(self, recipe: Recipe, clock: Clock) -> None:
        with clock.time("merge"):
            materialise(recipe, self.bank, self.destinations, self.check)

    def objectives(self, work: Workload, clock: Clock, trunks: Trunks | None) -> dict[str, dict[str, list[float]]]:
        """Task -> its objective -> item scores."""
        found = zip(work.by_task, self.engine.score_parts(work, clock, trunks), strict=True)
        with clock.time("score"):
            tasks = [(part.task, metrics) for part, metrics in found]
            return {t.name: {t.objective: rounded(scores_of(t, t.objective, metrics))} for t, metrics in tasks}

    def objective(self, outcome: Outcome) -> float:
        """The value that trials are told with: the weighted mean over tasks of the mean objective."""
        return mean_score(outcome.of(self.tasks, "objective"), self.weights)


def contexts(work: Sequence[Workload]) -> list[tuple[int, ...]]:
    """What the items of workloads say before their answers: the first of each task, the second of each, and so on."""
    each = [[r.tokens[: -r.scored] for r in w.rows] or [p.context for p in w.prompts] for w in work]
    return [context for row in zip_longest(*each) for context in row if context]


def item_scores(task: Task, found: ItemMetrics) -> dict[str, list[float]]:
    """Item scores of the metrics that the search uses or shows: objective, metric and the smooth ones."""
    wanted = dict.fromkeys(m for m in (task.objective, task.metric, "gold_logprob") if m in found)
    return {metric: rounded(scores_of(task, metric, found)) for metric in wanted}


def free_memory(device: torch.device) -> None:
    """Give cached blocks back after an out-of-memory error, so that the next trial starts clean."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
