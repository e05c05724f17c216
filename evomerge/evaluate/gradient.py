"""The gradient of the objective: one backward pass for some items on the live model.

Forwards are those of `loglikelihood.py`: packed rows where the model takes them, the head only at scored positions.
They keep their graph, so two things differ:

- No trunk is shared between forwards, because its keys and values would have to keep their graph, too.
- All rows of an item are in one forward, because the softmax over its choices joins them.  So batches are made of whole
  items, and their token budget is smaller, because the activations of every layer are kept.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from evomerge.device import double, free_memory
from evomerge.errors import EvomergeError
from evomerge.evaluate.answer_metrics import choices_of
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.formulas import TensorAnswer
from evomerge.evaluate.item_values import item_score
from evomerge.evaluate.loglikelihood import (
    LOGITS,
    Batch,
    NotFiniteScore,
    Plan,
    Row,
    entropies,
    kept_logits,
    plan_batches,
)
from evomerge.evaluate.metrics import Extra, Metric
from evomerge.evaluate.tasks import Task
from evomerge.evaluate.token_budget import LEAST
from evomerge.evaluate.workload import ItemRequests, Workload

SHARE = 4  # `auto` is the engine's token budget divided by this: the activations of all layers are kept
LM_EVAL = {"brier_score": "brier", "perplexity": "gold_logprob"}
"""Metric of lm-eval -> the metric of ours with the same item scores; for texts see `text_factor`."""
OF_TEXTS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""lm-eval's metrics of a text that are its log-likelihood times a number."""


@dataclass
class GradientMemory:
    """What a forward may keep for its backward pass; both are changed for the rest of a run when memory is short.

    tokens: padded tokens per forward; an item that has more is computed alone.
    checkpointed: whether only the input of each layer is kept and the rest is computed a second time (Chen et al.
        2016), which costs about one more forward.
    """

    tokens: int
    checkpointed: bool = False

    @classmethod
    def of(cls, engine: Engine, tokens: int | Literal["auto"] = "auto") -> "GradientMemory":
        """For the model of an engine.  tokens: `auto` is a quarter of the engine's budget."""
        return cls(max(LEAST, engine.batch_tokens // SHARE) if tokens == "auto" else tokens)

    def shrink(self) -> bool:
        """Use less memory: half the tokens, and from the least number of tokens on checkpoints.  False if no less."""
        if self.tokens > LEAST:
            self.tokens = max(LEAST, self.tokens // 2)
        elif not self.checkpointed:
            self.checkpointed = True
        else:
            return False
        return True


class RowTensors(NamedTuple):
    """What the model says about the T scored tokens of a row.

    logprobs: (T,) their log-probabilities in nats.
    entropies: (T,) the entropies in nats of the distributions that they are drawn from, None if no objective asks.
    """

    logprobs: Tensor
    entropies: Tensor | None


@dataclass(frozen=True)
class ItemObjective:
    """The objective of one item, or a term of it that may be computed apart from the others.

    task, place: the task's name and the item's place in its workload.
    weight: the item's weight in the loss.
    rows: the rows that it needs.
    value: from these rows to the item score, the higher the better, or to the term: a scalar tensor.
    extra: what `value` reads beside the log-probabilities.
    """

    task: str
    place: int
    weight: float
    rows: list[Row]
    value: Callable[[Sequence[RowTensors]], Tensor]
    extra: Extra | None = None


def backward(
    engine: Engine,
    works: Sequence[Workload],
    weights: Mapping[str, Sequence[float]],
    check: Callable[[], None] = lambda: None,
    memory: GradientMemory | None = None,
    restart: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Add the gradient of -sum(weight * objective) to the parameters of the engine's model that require one.

    works: the items, one workload for each task (`Engine.workload`, `Workload.pick`); they need no batches.
    weights: task name -> the weight of each of its items.
    check: called between batches; it may raise to interrupt the work.
    memory: None is `GradientMemory.of(engine)`.
    restart: called when the memory did not suffice, before all items are computed again; it must forget the gradients
        that came so far.

    Returns the item scores of the objective by task, the higher the better, as `scores_of` gives them.

    EvomergeError if an objective has no derivative.  NotFiniteScore if a log-probability is NaN or infinite; the
    gradients of earlier batches stay.  torch.OutOfMemoryError if no batch is small enough.
    """
    memory = GradientMemory.of(engine) if memory is None else memory
    items = [
        term
        for work in works
        for place, (asked, weight) in enumerate(zip(work.items, weights[work.task.name], strict=True))
        for term in objectives_of(work.task, asked, place, float(weight))
    ]
    while True:
        found: dict[str, list[float]] = {work.task.name: [0.0] * len(work.items) for work in works}
        try:
            with checkpointed_layers(engine.model, memory.checkpointed):
                for chosen, batch in batches_of_items(engine, items, memory.tokens):
                    check()
                    for item, score in zip(chosen, backward_batch(engine.model, chosen, batch), strict=True):
                        found[item.task][item.place] += score
            return found
        except torch.OutOfMemoryError:
            if not memory.shrink():
                raise
        engine.log(
            f"note: out of memory; from now on {memory.tokens} tokens a batch for gradients"
            + (", activations are computed a second time" if memory.checkpointed else "")
        )
        free_memory(engine.model.device)
        restart()


def backward_batch(model: Any, items: Sequence[ItemObjective], batch: Batch) -> list[float]:
    """Forward and backward of one batch, which has the rows of `items` in their order.  Returns the item scores."""
    with torch.enable_grad():
        logits = kept_logits(model, batch)  # (K, V)
        rows = iter(row_tensors(logits, batch, items))
        scores = torch.stack([item.value([next(rows) for _ in item.rows]) for item in items])  # (n,)
        loss = -(scores * scores.new_tensor([item.weight for item in items])).sum()
    del logits, rows  # the graph keeps what it needs
    loss.backward()  # type: ignore[no-untyped-call]
    return [float(score) for score in scores.detach().tolist()]


def row_tensors(logits: Tensor, batch: Batch, items: Sequence[ItemObjective]) -> list[RowTensors]:
    """What the model says about the rows of `items`, one item after another, in float64.

    logits: (K, V).  The softmax is in float32, or in the model's type if that is wider.

    NotFiniteScore if a log-probability is NaN or infinite.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprob = double(logits[batch.node, batch.target] - logits.logsumexp(1)[batch.node])  # (M,)
    if not bool(logprob.detach().isfinite().all()):
        raise NotFiniteScore("a log-probability is not finite")
    # Row by row; `make_batch` has the tokens of a row in their order.
    in_order = batch.owner.to(logprob.device).argsort(stable=True)
    lengths = [row.scored for item in items for row in item.rows]
    columns: list[Sequence[Tensor | None]] = [torch.split(logprob[in_order], lengths), [None] * len(lengths)]
    if any(item.extra == "entropies" for item in items):
        columns[1] = torch.split(double(entropies(logits)[batch.node])[in_order], lengths)
    return list(map(RowTensors, *columns))


def batches_of_items(
    engine: Engine, items: Sequence[ItemObjective], tokens: int
) -> Iterator[tuple[list[ItemObjective], Batch]]:
    """Items of similar lengths as batches, the longest first, with the items of each batch.

    tokens: padded tokens per forward; a batch has at least one item.
    """
    ordered = sorted(items, key=lambda item: -max(len(row.tokens) for row in item.rows))
    kinds: dict[bool, list[ItemObjective]] = {True: [], False: []}  # whether sequences may share a row -> the items
    for item in ordered:
        fits = all(engine.capabilities.reaches(len(row.tokens)) for row in item.rows)
        kinds[fits and engine.capabilities.packs].append(item)

    def divide(chosen: list[ItemObjective], packs: bool) -> Iterator[tuple[list[ItemObjective], Batch]]:
        # A plan without bounds is one batch.
        plan = Plan(sys.maxsize, engine.model.device, 1, packs, trunks=[])
        (batch,) = plan_batches([row for item in chosen for row in item.rows], plan)
        parts = max(
            math.ceil(batch.inputs.numel() / tokens),
            math.ceil(len(batch.keep) * engine.vocabulary * SHARE / LOGITS),
        )
        parts = min(parts, len(chosen))
        if parts == 1:
            yield chosen, batch
            return
        for k in range(parts):
            yield from divide(chosen[k * len(chosen) // parts : (k + 1) * len(chosen) // parts], packs)

    for packs, alike in kinds.items():
        if alike:
            yield from divide(alike, packs)


def objectives_of(task: Task, asked: ItemRequests, place: int, weight: float) -> list[ItemObjective]:
    """The objective of one item; that of a text as one term for each of its windows.

    EvomergeError if it has no derivative.
    """
    if task.kind == "loglikelihood_rolling":
        factor = text_factor(task, asked)

        def product(rows: Sequence[RowTensors]) -> Tensor:
            return factor * rows[0].logprobs.sum()

        return [ItemObjective(task.name, place, weight, [row], product) for row in asked.rows]
    metric = differentiable_metric(task)
    if metric is None or metric.differentiable is None or asked.gold is None:
        raise no_derivative(task)
    formula, sign = metric.differentiable, 1.0 if metric.higher_is_better else -1.0
    numbers, gold = [asked.gold], 0
    lengths: list[int] = []
    if metric.needs == "choices":
        numbers, lengths = choices_of(task, asked)
        gold = numbers.index(asked.gold)

    def value(rows: Sequence[RowTensors]) -> Tensor:
        sums = torch.stack([row.logprobs.sum() for row in rows])  # (C,), or (1,)
        chosen = rows[gold]
        choices = sums if metric.needs == "choices" else sums[:0]
        answer = TensorAnswer(
            sums[gold], chosen.logprobs, choices, gold, asked.gold_bytes, lengths, token_entropies=chosen.entropies
        )
        return sign * formula(answer)

    return [ItemObjective(task.name, place, weight, [asked.rows[n] for n in numbers], value, metric.extra)]


def has_derivative(task: Task) -> bool:
    """Whether gradient steps can climb a task's objective."""
    if task.kind == "loglikelihood_rolling" and task.objective in OF_TEXTS:
        return True
    return differentiable_metric(task) is not None


def differentiable_metric(task: Task) -> Metric | None:
    """The metric of ours that gives a task's objective its derivative, None if there is none."""
    metric = task.own.get(LM_EVAL.get(task.objective, task.objective))
    return metric if metric is not None and metric.differentiable is not None else None


def text_factor(task: Task, asked: ItemRequests) -> float:
    """The number by which a text's log-likelihood is multiplied in its item score: lm-eval's words or bytes divide it.

    EvomergeError if the objective is not such a product.
    """

    def score(loglikelihood: float) -> float:
        return item_score(
            task, task.objective, task.lm.process_results(asked.item.doc, [loglikelihood])[task.objective]
        )

    factor = score(1.0)
    if not math.isclose(score(-100.0), -100.0 * factor):
        raise no_derivative(task)
    return factor


def no_derivative(task: Task) -> EvomergeError:
    """The error for an objective that has no derivative; it lists those of the task that have one."""
    known = sorted(name for name, metric in task.own.items() if metric.differentiable is not None)
    return EvomergeError(
        f"task {task.name}: the objective {task.objective!r} has no derivative; these have one: {', '.join(known)}"
    )


@contextmanager
def checkpointed_layers(model: Any, wanted: bool) -> Iterator[None]:
    """Within the context, each layer keeps only its input for the backward pass and is computed a second time there.

    transformers' own switch works only in training mode, which also switches dropout on.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
    for layer in layers:
        # No random numbers are drawn in evaluation mode, so their state need not be kept.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own one is found again
