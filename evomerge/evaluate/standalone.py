"""Score one model on whole tasks as `lm_eval` does, for `evomerge evaluate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import EvomergeError
from evomerge.evaluate.answers import Answer, answers_of
from evomerge.evaluate.clock import Batches, Clock
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.item_values import ItemMetrics, MetricFailed, aggregate
from evomerge.evaluate.tasks import Task, items_of


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    items: how many items were scored.
    metrics: each metric over all items, by lm-eval's own aggregation.
    raw: each metric's value for every item.
    answers: to every item.
    """

    task: str
    items: int
    metrics: dict[str, float]
    raw: ItemMetrics
    answers: list[Answer]


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    batch_tokens: int | Literal["auto"],
    limit: int | None,
    clock: Clock,
    progress: Callable[[int, int], None] = lambda done, total: None,
    open_processor: Callable[[], Any] | None = None,
) -> list[TaskResult]:
    """Every metric of every task on the items that lm-eval evaluates.

    batch_tokens: see `Engine`.
    limit: the greatest number of items of a task, None for all.
    progress: called with the number of batches done and their total.
    open_processor: see `Engine`.

    EvomergeError if a task cannot be scored.
    """
    language = any(not task.is_python for task in tasks)
    engine = Engine(model, tokenizer, batch_tokens, language=language, open_processor=open_processor)
    prepared = []
    for task in tasks:
        items = items_of(task, task.docs)[:limit]
        prepared.append((task, items, engine.prepare(task, items, everything=True)))
    clock.batches = Batches(sum(work.steps for _, _, work in prepared), progress)
    results = []
    for task, items, work in prepared:
        try:
            found = engine.score(work, clock)
            metrics = {metric: aggregate(task, metric, values) for metric, values in found.items()}
        except MetricFailed as error:
            raise EvomergeError(str(error)) from error
        results.append(TaskResult(task.name, len(items), metrics, found, answers_of(engine, work)))
    return results
