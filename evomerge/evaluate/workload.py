"""What a live model is asked: items with their requests, token ids and batches, of one task or of several."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from evomerge.evaluate.generation import GenerationBatch, Prompt
from evomerge.evaluate.loglikelihood import Batch, Row
from evomerge.evaluate.prefix_plan import Tokens
from evomerge.evaluate.tasks import Item, Task

T = TypeVar("T")


@dataclass
class Workload:
    """A task's items, ready to be scored any number of times.

    metrics: whether lm-eval's metrics are computed, or only the gold answer's log-probability.
    instances: per item, lm-eval's requests.  spans: per item and request, its range among all rows.
    gold: per item, the row of its gold answer, -1 if there is none.  gold_bytes: the answer's length in UTF-8.
    own_rows, own_prompts: per item, its range among all rows and all prompts.
    shared: prefixes that batches may stand on; None lets them choose.  budget: the one the batches are made for.
    packs: whether sequences may share rows.  parts: see `together`.
    """

    task: Task
    items: list[Item]
    metrics: bool
    instances: list[list[Any]] = field(default_factory=list)
    spans: list[list[range]] = field(default_factory=list)
    gold: list[int] = field(default_factory=list)
    gold_bytes: list[int] = field(default_factory=list)
    own_rows: list[range] = field(default_factory=list)
    own_prompts: list[range] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    shared: list[Tokens] | None = None
    budget: int = 0
    packs: bool = False
    batches: list[Batch] = field(default_factory=list)
    generations: list[GenerationBatch] = field(default_factory=list)
    parts: list["Workload"] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many batches an evaluation of this workload runs."""
        return len(self.batches) + len(self.generations)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max([len(r.tokens) for r in self.rows] + [len(p.context) + p.limit for p in self.prompts])

    @property
    def by_task(self) -> list["Workload"]:
        """One workload for each task."""
        return self.parts or [self]

    def pick(self, chosen: Sequence[int]) -> "Workload":
        """Some of the items, in this order, without batches."""
        found = Workload(self.task, [self.items[i] for i in chosen], self.metrics)
        for i in chosen:
            shift = len(found.rows) - self.own_rows[i].start
            found.instances.append(self.instances[i])
            found.spans.append([range(s.start + shift, s.stop + shift) for s in self.spans[i]])
            found.gold.append(self.gold[i] + shift if self.gold[i] >= 0 else -1)
            found.gold_bytes.append(self.gold_bytes[i])
            found.own_rows.append(taken(self.rows, self.own_rows[i], found.rows))
            found.own_prompts.append(taken(self.prompts, self.own_prompts[i], found.prompts))
        return found


def taken(every: list[T], own: range, kept: list[T]) -> range:
    """Add a range of one list to another; where it stands there."""
    kept += every[own.start : own.stop]
    return range(len(kept) - len(own), len(kept))


def join_workloads(parts: Sequence[Workload]) -> Workload:
    """Workloads that run in the same batches, without batches yet.

    It holds their rows, prompts and requests one after another; what belongs to single items is in `parts`.
    """
    if len(parts) == 1:
        return parts[0]
    whole = Workload(parts[0].task, [i for p in parts for i in p.items], any(p.metrics for p in parts))
    whole.instances = [group for p in parts for group in p.instances]
    whole.rows = [row for p in parts for row in p.rows]
    whole.prompts = [prompt for p in parts for prompt in p.prompts]
    whole.parts = list(parts)
    return whole
