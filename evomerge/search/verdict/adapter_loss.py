"""What a merge loses as an adapter of low rank: both are scored on the selection split of the run that found it."""

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


Means = dict[str, dict[str, float]]
"""Task -> metric -> the mean over the items, first the metric of the verdict, then the search's objective."""


@dataclass(frozen=True)
class AdapterLoss:
    """Means on the selection split of the model and of the adapter."""

    model: Means
    adapter: Means

    def lines(self) -> list[str]:
        """What was measured, a line a task."""
        found = []
        for task, means in self.model.items():
            parts = [f"{m} {self.adapter[task][m]:.4g} as adapter, {mean:.4g} as model" for m, mean in means.items()]
            found.append(f"{task} on the selection split: {'; '.join(parts)}")
        return found


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
    means: list[Means] = []
    for what, candidate in (("model", recipe), ("adapter", alone)):
        found = evaluator.run(EvaluationJob(candidate, "selection"))
        if isinstance(found, Failure):
            raise EvomergeError(f"the {what} cannot be scored: {found.reason}")
        wanted = {task.name: dict.fromkeys((task.metric, task.objective)) for task in evaluator.task_set.tasks}
        means.append(
            {task: {m: float(np.mean(found.scores[task][m])) for m in metrics} for task, metrics in wanted.items()}
        )
    return AdapterLoss(*means)
