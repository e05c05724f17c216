"""What a merge loses as an adapter of low rank: both are scored on the selection split of the run that found it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evomerge.config.schema import SourceConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import Recipe, RecipeSource
from evomerge.search.agreements import refuse_task_code
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import EvaluationJob, Failure
from evomerge.search.evaluation.scale import with_first_objectives
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.run import Run
from evomerge.search.storage.study import recorded_type

NAME = "written-adapter"  # of the adapter as a source


@dataclass(frozen=True)
class AdapterLoss:
    """Mean metrics on the selection split.

    model, adapter: by task.
    metrics: task -> the name of its metric.
    """

    model: Mapping[str, float]
    adapter: Mapping[str, float]
    metrics: Mapping[str, str]

    def lines(self) -> list[str]:
        """What was measured, a line a task."""
        return [
            f"{task}, {self.metrics[task]} on the selection split: {self.adapter[task]:.4g} as adapter, "
            f"{self.model[task]:.4g} as model"
            for task in self.model
        ]


def adapter_loss(run: Run, recipe: Recipe, adapter: Path) -> AdapterLoss:
    """Score a recipe and the adapter that was written of it.

    EvomergeError if one of them cannot be scored, or the models or tasks of the run cannot be opened.
    """
    study = run.study()
    config = with_first_objectives(study, run.config())
    refuse_task_code(run, config)
    config = config.model_copy(
        update={
            "compute_dtype": recorded_type(study.user_attrs) or config.dtype,
            "sources": [*config.sources, SourceConfig(name=NAME, path=str(adapter.resolve()))],
        }
    )
    evaluator = Evaluator(
        config, open_config_models(config), open_task_set(config), log=run.log, cache=run.folder / "cache"
    )
    source = RecipeSource(name=NAME, path=str(adapter.resolve()))
    alone = Recipe(method="passthrough", dtype=recipe.dtype, base=recipe.base, sources=[source])
    tasks = {task.name: task.metric for task in evaluator.task_set.tasks}
    means: list[dict[str, float]] = []
    for what, candidate in (("model", recipe), ("adapter", alone)):
        found = evaluator.run(EvaluationJob(candidate, "selection"))
        if isinstance(found, Failure):
            raise EvomergeError(f"the {what} cannot be scored: {found.reason}")
        means.append({task: float(np.mean(found.scores[task][metric])) for task, metric in tasks.items()})
    return AdapterLoss(means[0], means[1], tasks)
