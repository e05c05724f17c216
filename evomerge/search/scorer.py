"""From a recipe to item scores: materialise it in the live model, run the engine, say where the time went."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.config.schema import SearchConfig
from evomerge.device import TORCH_DTYPES, resolve_device
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock, counter
from evomerge.evaluate.engine import Engine, Workload, scores_of
from evomerge.evaluate.metrics import ItemMetrics
from evomerge.evaluate.tasks import Item, Split, Task, deal, open_tasks
from evomerge.merge.bank import Bank
from evomerge.merge.compiled import compiled_for
from evomerge.merge.gathered import open_gathered
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe import Recipe
from evomerge.search.verdict import mean_score
from evomerge.sources.locate import locate
from evomerge.sources.open import Models, open_models

Dealt = dict[str, dict[Split, list[Item]]]
"""Task -> split -> its items."""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave.

    scores: task -> metric -> one score per item, the higher the better.  seconds: by part of the work.
    """

    scores: dict[str, dict[str, list[float]]]
    seconds: dict[str, float]

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
        self.check = check
        self.tasks = open_tasks(config.tasks)
        self.items = deal_all(self.tasks, config)
        check_statistics(config, models, self.items)
        device = resolve_device(config.device)
        self.bank = Bank(models, device, compiled=compiled_for(models.base.tensors, log), cache=cache)
        self.model = candidate_model(self.bank, TORCH_DTYPES[config.dtype])
        self.destinations = destinations(self.model, self.bank)
        self.engine = Engine(self.model, load_tokenizer(models.base.path), config.batch_tokens)
        self.workloads: dict[tuple[Split, bool], list[Workload]] = {}

    @property
    def weights(self) -> dict[str, float]:
        return {t.name: t.weight for t in self.tasks}

    def prepared(self, split: Split, everything: bool) -> list[Workload]:
        """The split's items as workloads, built once.  everything: all metrics, not the objective alone."""
        key = (split, everything)
        if key not in self.workloads:
            self.workloads[key] = [self.engine.prepare(t, self.items[t.name][split], everything) for t in self.tasks]
        return self.workloads[key]

    def evaluate(
        self,
        recipe: Recipe,
        split: Split,
        everything: bool,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Outcome:
        """Materialise and score.  NotFinite or NotFiniteScore if the candidate is broken.

        progress: called with the batches done and their total.
        """
        work = self.prepared(split, everything)
        clock = Clock(self.check, counter(sum(w.steps for w in work), progress))
        with clock.time("merge"):
            materialise(recipe, self.bank, self.destinations, self.check)
        scores = {}
        for workload in work:
            found = self.engine.score(workload, clock)
            with clock.time("score"):
                scores[workload.task.name] = item_scores(workload.task, found)
        return Outcome(scores, clock.seconds)

    def objective(self, outcome: Outcome) -> float:
        """The value that trials are told with: the weighted mean over tasks of the mean objective."""
        return mean_score(outcome.of(self.tasks, "objective"), self.weights)


def item_scores(task: Task, found: ItemMetrics) -> dict[str, list[float]]:
    """Item scores of the metrics that the search uses or shows: objective, metric and the smooth ones."""
    wanted = dict.fromkeys(m for m in (task.objective, task.metric, "gold_logprob") if m in found)
    return {metric: scores_of(task, metric, found) for metric in wanted}


def free_memory(device: torch.device) -> None:
    """Give cached blocks back after an out-of-memory error, so that the next trial starts clean."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
