"""What a model is asked: the requests of each item as token ids, and the batches that answer them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evomerge.evaluate.generation import GenerationBatch, Prompt
from evomerge.evaluate.loglikelihood import Batch, Row
from evomerge.evaluate.prefix_plan import Tokens
from evomerge.evaluate.tasks import Item, Task


@dataclass(frozen=True)
class ItemRequests:
    """What a model is asked about one item.

    item: the item.
    instances: lm-eval's requests for it.
    rows: the sequences whose log-likelihoods are computed: those of the requests and of the gold answer.
    spans: for each log-likelihood request, which of `rows` belong to it; a rolling request has several.
    prompts: one for each generation request.
    gold: which of `rows` is the gold answer, None if there is none.
    gold_bytes: the length of the gold answer in UTF-8.
    """

    item: Item
    instances: list[Any]
    rows: list[Row]
    spans: list[range]
    prompts: list[Prompt]
    gold: int | None
    gold_bytes: int


@dataclass
class Workload:
    """The items of one task, or of several (`parts`), with the batches that answer their requests.

    task: the task; of several the first.
    items: what the model is asked about each item; of several tasks one task after another.
    complete: whether all requests are answered, or only the gold answer's log-likelihood is computed.
    parts: one workload for each task, if there are several.
    shared: the trunks that batches may begin with; None lets the planner choose them.
    budget: the padded tokens per forward that the batches are made for.
    packs: whether several sequences share a row.
    batches, generations: the forwards, empty before `Engine.plan`.
    calls: of the functions of Python tasks, also of each part's: the places of the items that each call gets.
    """

    task: Task
    items: list[ItemRequests]
    complete: bool
    parts: list["Workload"] = field(default_factory=list)
    shared: list[Tokens] | None = None
    budget: int = 0
    packs: bool = False
    batches: list[Batch] = field(default_factory=list)
    generations: list[GenerationBatch] = field(default_factory=list)
    calls: list[range] = field(default_factory=list)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of all items, one item after another."""
        return [row for asked in self.items for row in asked.rows]

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of all items, one item after another."""
        return [prompt for asked in self.items for prompt in asked.prompts]

    @property
    def steps(self) -> int:
        """The number of batches."""
        return len(self.batches) + len(self.generations) + sum(len(part.calls) for part in self.by_task)

    @property
    def asks(self) -> bool:
        """Whether there is a sequence or a prompt, and not only calls."""
        return bool(self.rows or self.prompts)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max([len(r.tokens) for r in self.rows] + [len(p.context) + p.limit for p in self.prompts])

    @property
    def by_task(self) -> list["Workload"]:
        """One workload for each task."""
        return self.parts or [self]

    def pick(self, chosen: Sequence[int]) -> "Workload":
        """The items at these places, in this order, without batches."""
        return Workload(self.task, [self.items[i] for i in chosen], self.complete)


def join_workloads(parts: Sequence[Workload]) -> Workload:
    """Workloads of single tasks as one that runs in the same batches, without batches yet."""
    if len(parts) == 1:
        return parts[0]
    items = [asked for part in parts for asked in part.items]
    return Workload(parts[0].task, items, any(part.complete for part in parts), list(parts))
