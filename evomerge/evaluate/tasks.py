"""A task with its settings, and its documents as items."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from evomerge.evaluate.metrics import KINDS, METRICS, Metric
from evomerge.evaluate.python_task import PYTHON

Split = Literal["search", "selection", "holdout"]
SPLITS: tuple[Split, ...] = ("holdout", "selection", "search")  # in the order in which they are dealt
FEWSHOT_SEED = 1234  # lm-eval's default, so that few-shot prompts are those of lm-eval


@dataclass(frozen=True)
class Item:
    """One document of a task.

    id: a hash of the task's name and the document.
    doc: the document, as lm-eval's task gives it.
    """

    id: str
    doc: dict[str, Any]


@dataclass
class Task:
    """A task with its settings in a configuration.

    name: lm-eval's name of the task.
    weight: the task's share in the score.
    objective: the metric that the search maximises (or minimises).
    metric: the metric that the verdict compares.
    gold: a Jinja template of the gold answer of a generation task, if it is not `doc_to_target`.
    lm: lm-eval's own task object, which builds prompts, filters answers and scores them; or a `PythonSource`.
    chat: whether prompts go through the chat template.
    multiturn: whether the chat template gets few-shot examples as turns of their own.
    limit: the greatest number of documents, None for all.
    code: whether the task runs Python code of the user's (the configuration allows it).
    added: the metrics of other packages that the objective or the metric names.
    auto: whether the configuration leaves the choice of the objective to evomerge (`auto` or `auto_mean`).
    origin: the file or name that the configuration gives, of a group for each of its tasks.
    """

    name: str
    weight: float
    objective: str
    metric: str
    gold: str | None
    lm: Any
    chat: bool = False
    multiturn: bool = False
    limit: int | None = None
    code: bool = False
    added: dict[str, Metric] = field(default_factory=dict)
    auto: bool = False
    origin: str = ""

    @property
    def kind(self) -> str:
        """lm-eval's `output_type`: multiple_choice, generate_until, loglikelihood, loglikelihood_rolling; or PYTHON."""
        return str(self.lm.OUTPUT_TYPE)

    @property
    def is_python(self) -> bool:
        """Whether a Python function of the user's scores it, and not the answers to prompts."""
        return self.kind == PYTHON

    @property
    def metrics(self) -> list[str]:
        """The names of the task's metrics in lm-eval, in the order of the task file."""
        return list(self.lm._metric_fn_list)

    @cached_property
    def own(self) -> dict[str, Metric]:
        """The metrics that evomerge computes for this kind of task, by name: those with a formula."""
        return {m.name: m for m in METRICS.values() if self.kind in KINDS.get(m.needs, ())} | self.added

    @property
    def docs(self) -> Iterable[dict[str, Any]]:
        """The documents that lm-eval evaluates, `limit` at most."""
        return islice(self.lm.eval_docs, self.limit)

    @property
    def filters(self) -> list[str]:
        """The names of lm-eval's filters, in the order in which they are applied."""
        return [f.name for f in self.lm._filters]

    def higher_is_better(self, metric: str) -> bool:
        """The direction of a metric.

        Metrics with a formula have that of the table; others that of the task, or if it gives none, of the table.
        """
        if metric in self.own:
            return self.own[metric].higher_is_better
        plain = metric.split(",")[0]
        default = METRICS[plain].higher_is_better if plain in METRICS else True
        return bool(self.lm.higher_is_better().get(plain, default))


def items_of(task: Task, docs: Iterable[dict[str, Any]]) -> list[Item]:
    """Documents as items in the order of the data; of equal documents only the first."""
    found: dict[str, Item] = {}
    for doc in docs:
        content = json.dumps(doc, sort_keys=True, default=str, ensure_ascii=False)
        item = Item(hashlib.sha256(f"{task.name}\0{content}".encode()).hexdigest()[:16], doc)
        found.setdefault(item.id, item)
    return list(found.values())
