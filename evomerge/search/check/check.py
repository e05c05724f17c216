"""Everything that a look before a search finds: `check_search`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.item_values import MetricFailed
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.merge.materialise import NotFinite
from evomerge.merge.measure.distances import measure, strangers
from evomerge.merge.output.export import total_bytes
from evomerge.search.check.concerns import (
    Concern,
    chat_concerns,
    forecast_concerns,
    holdout_concern,
    split_concerns,
    stranger_concerns,
    task_concerns,
)
from evomerge.search.check.forecast import Forecast, forecast
from evomerge.search.check.probe import Probe, probe, questions
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.space.baselines import base_alone, baselines
from evomerge.search.space.space import build_space
from evomerge.sources.open_models import Models
from evomerge.sources.tokenizer import chat_templates

ITEMS, BRIEF = 16, 8  # of each task; before a search fewer, for a quick look


@dataclass(frozen=True)
class Check:
    """What was found.

    probe: what base and sources answer.
    concerns: what may be wrong.
    forecast: what the search will take.
    """

    probe: Probe
    concerns: list[Concern]
    forecast: Forecast

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        plan = asdict(self.forecast) | {"candidates": self.forecast.candidates}
        tasks = [asdict(task) for task in self.probe.tasks]
        return {"tasks": tasks, "concerns": [asdict(concern) for concern in self.concerns], "forecast": plan}


def check_search(
    config: SearchConfig,
    models: Models,
    task_set: TaskSet,
    items: int = ITEMS,
    log: Callable[[str], None] = lambda text: None,
) -> Check:
    """Look at a search before it begins.

    config: with the versions of its models pinned.
    models, task_set: its models and tasks, opened and checked.
    items: of each task, that base and sources answer.
    log: gets lines about what happens.

    EvomergeError if a model cannot be scored.
    """
    space = build_space(config, models)
    evaluator = Evaluator(config, models, task_set, log=log)
    alone = [base_alone(space), *(b for b in baselines(space) if b.kind == "parent")]
    try:
        found = probe(evaluator, alone, items, log)
    except (NotFinite, NotFiniteScore, MetricFailed) as error:
        raise EvomergeError(f"base and sources cannot be scored: {error}") from error
    plan = forecast(config, task_set, found, total_bytes(alone[0].recipe, evaluator.bank))
    distances, _ = measure(models, layers={0, space.layers - 1})  # every layer of a stranger is strange
    concerns = list(stranger_concerns(strangers(distances)))
    concerns += [concern for task in found.tasks for concern in task_concerns(task)]
    concerns += split_concerns(questions(task_set))
    templates = [n for n, m in {"base": models.base, **models.sources}.items() if chat_templates(m.path)]
    plainly = [t.name for t in task_set.tasks if not t.chat and t.kind != "loglikelihood_rolling"]
    concerns += chat_concerns(templates, plainly)
    holdout = {t.name: len(task_set.items[t.name]["holdout"]) for t in task_set.goals}
    concerns += holdout_concern(found.tasks, holdout, task_set.weights)
    concerns += forecast_concerns(plan)
    return Check(found, concerns, plan)
