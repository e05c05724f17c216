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
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.item_values import item_score
from evomerge.evaluate.loglikelihood import LOGITS, Batch, NotFiniteScore, Plan, Row, kept_logits, plan_batches
from evomerge.evaluate.tasks import Task
from evomerge.evaluate.token_budget import LEAST
from evomerge.evaluate.workload import ItemRequests, Workload

SHARE = 4  # `auto` is the engine's token budget divided by this: the activations of all layers are kept
LM_EVAL = {"brier_score": "brier", "perplexity": "gold_logprob"}
"""Metric of lm-eval -> the metric of ours with the same item score; the perplexities of texts have `text_objective`."""


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


@dataclass(frozen=True)
class ItemObjective:
    """The objective of one item as a function of log-probabilities.

    task, place: the task's name and the item's place in its workload.
    weight: the item's weight in the loss.
    rows: the rows that the objective needs.
    value: from the log-probabilities of each row's scored tokens, (T,) each, to the item score, a scalar tensor, the
        higher the better.
    """

    task: str
    place: int
    weight: float
    rows: list[Row]
    value: Callable[[Sequence[Tensor]], Tensor]


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
        item_objective(work.task, asked, place, float(weight))
        for work in works
        for place, (asked, weight) in enumerate(zip(work.items, weights[work.task.name], strict=True))
    ]
    while True:
        found: dict[str, list[float]] = {work.task.name: [math.nan] * len(work.items) for work in works}
        try:
            with checkpointed_layers(engine.model, memory.checkpointed):
                for chosen, batch in batches_of_items(engine, items, memory.tokens):
                    check()
                    for item, score in zip(chosen, backward_batch(engine.model, chosen, batch), strict=True):
                        found[item.task][item.place] = score
            return found
        except torch.OutOfMemoryError:
            if not memory.shrink():
                raise
        engine.log(
            f"note: out of memory; from now on {memory.tokens} tokens a batch for gradients"
            + (", activations are computed a second time" if memory.checkpointed else "")
        )
        if engine.model.device.type == "cuda":
            torch.cuda.empty_cache()
        restart()


def backward_batch(model: Any, items: Sequence[ItemObjective], batch: Batch) -> list[float]:
    """Forward and backward of one batch, which has the rows of `items` in their order.  Returns the item scores."""
    rows = [row for item in items for row in item.rows]
    with torch.enable_grad():
        logprobs = iter(token_logprobs(kept_logits(model, batch), batch, rows))
        scores = torch.stack([item.value([next(logprobs) for _ in item.rows]) for item in items])  # (n,)
        loss = -(scores * scores.new_tensor([item.weight for item in items])).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return [float(score) for score in scores.detach().tolist()]


def token_logprobs(logits: Tensor, batch: Batch, rows: Sequence[Row]) -> list[Tensor]:
    """The log-probabilities of each row's scored tokens, (T,) each, in float64.

    logits: (K, V).  The softmax is in float32, or in the model's type if that is wider.

    NotFiniteScore if one of them is NaN or infinite.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprob = (logits[batch.node, batch.target] - logits.logsumexp(1)[batch.node]).double()  # (M,)
    if not bool(logprob.detach().isfinite().all()):
        raise NotFiniteScore("a log-probability is not finite")
    in_order = batch.owner.argsort(stable=True)  # row by row; `make_batch` has the tokens of a row in order
    return list(torch.split(logprob[in_order], [row.scored for row in rows]))


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


def item_objective(task: Task, asked: ItemRequests, place: int, weight: float) -> ItemObjective:
    """The objective of one item.  EvomergeError if it has no derivative."""
    name = task.objective
    metric = task.own.get(name) or task.own.get(LM_EVAL.get(name, ""))
    if task.kind == "loglikelihood_rolling":
        return ItemObjective(task.name, place, weight, asked.rows, text_objective(task, asked))
    if metric is None or metric.name not in FORMULAS or asked.gold is None:
        raise EvomergeError(f"task {task.name}: the objective {name!r} has no derivative")
    formula = FORMULAS[metric.name]
    sign = 1.0 if metric.higher_is_better else -1.0
    rows, gold = [asked.rows[asked.gold]], 0
    if metric.needs == "choices":
        rows = [asked.rows[span.start] for span in asked.spans]
        gold = asked.spans.index(range(asked.gold, asked.gold + 1))

    def value(logprobs: Sequence[Tensor]) -> Tensor:
        sums = torch.stack([row.sum() for row in logprobs])
        answer = TensorAnswer(sums[gold], logprobs[gold], sums, gold, asked.gold_bytes)
        return sign * formula(answer)

    return ItemObjective(task.name, place, weight, rows, value)


def text_objective(task: Task, asked: ItemRequests) -> Callable[[Sequence[Tensor]], Tensor]:
    """The objective of a text: its log-likelihood, the sum over all windows, times a constant.

    The constant is lm-eval's, whose metrics divide by the number of words or bytes.  EvomergeError if the metric is not
    such a product.
    """

    def score(loglikelihood: float) -> float:
        values = task.lm.process_results(asked.item.doc, [loglikelihood])
        return item_score(task, task.objective, values[task.objective])

    factor = score(1.0)
    if not math.isclose(score(-100.0), -100.0 * factor):
        raise EvomergeError(f"task {task.name}: the objective {task.objective!r} has no derivative")
    return lambda logprobs: factor * torch.cat(list(logprobs)).sum()


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


# Until `Metric.differentiable` exists.


@dataclass(frozen=True)
class TensorAnswer:
    gold_logprob: Tensor
    token_logprobs: Tensor
    logprobs: Tensor
    gold: int
    gold_bytes: int


def _margin(a: TensorAnswer) -> Tensor:
    others = [x for k, x in enumerate(a.logprobs) if k != a.gold]
    return a.logprobs[a.gold] - (torch.stack(others).max() if others else a.logprobs[a.gold])


def _brier(a: TensorAnswer) -> Tensor:
    p = a.logprobs.softmax(0)
    onehot = torch.zeros_like(p)
    onehot[a.gold] = 1.0
    return ((p - onehot) ** 2).sum()


FORMULAS: dict[str, Callable[[TensorAnswer], Tensor]] = {
    "gold_logprob": lambda a: a.gold_logprob,
    "gold_prob": lambda a: a.gold_logprob.clamp(max=0).exp(),
    "bits_per_byte": lambda a: -a.gold_logprob / math.log(2) / max(1, a.gold_bytes),
    "margin": _margin,
    "brier": _brier,
}
