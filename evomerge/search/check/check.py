"""Everything that a look before a search finds: `check_search`."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.config.schema import SearchConfig
from evomerge.device import free_memory, resolve_device
from evomerge.errors import EvomergeError
from evomerge.evaluate.item_values import MetricFailed
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.merge.compute_dtype import faster_type
from evomerge.merge.compute_dtype import measure as product_seconds
from evomerge.merge.materialise import NotFinite
from evomerge.merge.measure.distances import measure, strangers
from evomerge.merge.output.export import total_bytes
from evomerge.merge.recipe.recipe import Dtype
from evomerge.search.budget.limits import Limits
from evomerge.search.check.answers import task_concerns
from evomerge.search.check.concerns import (
    Concern,
    chat_concerns,
    doubt_concerns,
    forecast_concerns,
    guard_concerns,
    holdout_concern,
    least_gain,
    split_concerns,
    stranger_concerns,
)
from evomerge.search.check.first_token import first_token_concerns
from evomerge.search.check.forecast import Forecast, forecast
from evomerge.search.check.memory import Memory, measure_memory, memory_concerns
from evomerge.search.check.probe import Probe, probe, questions
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.models import shapes_of
from evomerge.search.opened import Opened
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
    memory: what it needs.
    gain: the least gain that the holdout items can show (`least_gain`).
    """

    probe: Probe
    concerns: list[Concern]
    forecast: Forecast
    memory: Memory
    gain: float | None

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        plan = asdict(self.forecast) | {"candidates": self.forecast.candidates}
        tasks = [asdict(task) for task in self.probe.tasks]
        concerns = [asdict(concern) for concern in self.concerns]
        least = {"memory": asdict(self.memory), "least_gain": self.gain}
        return {"tasks": tasks, "concerns": concerns, "forecast": plan | {"limit": finite(plan["limit"])}, **least}


def check_search(
    opened: Opened,
    items: int = ITEMS,
    log: Callable[[str], None] = lambda text: None,
    workers: int = 1,
    limits: Limits | None = None,
    keep: bool = False,
) -> Check:
    """Look at a search before it begins.

    opened: its models and tasks.
    items: of each task, that base and sources answer.
    log: gets lines about what happens.
    workers: how many the search will have.
    limits: that it will have; None is what the configuration says.
    keep: whether to leave the live model in `opened`, for a worker in this process.

    EvomergeError if a model cannot be scored, or does not fit into memory.
    """
    config, models, task_set = opened.config, opened.models, opened.task_set
    space = build_space(config, models)
    if space.keep:
        log(f"note: {', '.join(space.keep)}: every candidate has the base's; `components` under `space` searches them")
    config = config.model_copy(update={"compute_dtype": computing(config, models)})
    memory = measure_memory(config, models, workers)
    concerns = list(memory_concerns(memory))
    if memory.live > memory.free:
        raise EvomergeError(f"{concerns[0].what}; {concerns[0].mend}")
    evaluator = Evaluator(config, models, task_set, log=log)
    known = baselines(space)
    alone = [base_alone(space), *(b for b in known if b.kind == "parent")]
    try:
        found = probe(evaluator, alone, items, log)
        concerns += first_token_concerns(evaluator, alone[0])
    except (NotFinite, NotFiniteScore, MetricFailed) as error:
        raise EvomergeError(f"base and sources cannot be scored: {error}") from error
    inside = sum(b.point is not None for b in known)
    size = total_bytes(alone[0].recipe, evaluator.bank)
    plan = forecast(config, task_set, found, size, inside, workers, limits)
    differences = measure(models, layers={0, space.layers - 1}, sample=0)  # every layer of a stranger is strange
    concerns += doubt_concerns(models.compatibility.doubts)
    concerns += stranger_concerns(strangers(differences.distances))
    concerns += [concern for task in found.tasks for concern in task_concerns(task)]
    concerns += split_concerns(questions(task_set))
    templates = [n for n, m in {"base": models.base, **models.sources}.items() if chat_templates(m.path)]
    plainly = [t.name for t in task_set.tasks if not (t.chat or t.is_python or t.kind == "loglikelihood_rolling")]
    concerns += chat_concerns(templates, plainly)
    holdout = {t.name: len(task_set.items[t.name]["holdout"]) for t in task_set.tasks}
    gain = least_gain(found.tasks, holdout, task_set.weights)
    concerns += holdout_concern(gain)
    concerns += guard_concerns(task_set.guards, found.tasks, holdout)
    concerns += forecast_concerns(plan)
    if keep and config.space.layers is None:  # a search for layers takes some out of the model
        opened.live = evaluator.model
    device = evaluator.bank.live_device
    del evaluator
    free_memory(device)
    return Check(found, concerns, plan, memory, gain)


def computing(config: SearchConfig, models: Models) -> Dtype:
    """The type that forwards are computed in, as a search settles it."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return faster_type(
        config.dtype, product_seconds(config.dtype, resolve_device(config.device).type, shapes_of(models))
    )


def finite(number: float | None) -> float | None:
    """A number, or None for what JSON does not have."""
    return number if number is not None and math.isfinite(number) else None
