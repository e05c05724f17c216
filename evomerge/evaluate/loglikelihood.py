"""Log-likelihoods of continuations: rows built once, each distinct input computed once, the head only where needed."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.evaluate.clock import Clock

HEAD_ROWS = 4096  # positions whose logits are held at a time: 4096 x 50,000 x 4 bytes = 0.8 GB


class NotFiniteScore(ArithmeticError):
    """A log-likelihood is NaN or infinite: the argmax of NaN would be choice 0, which looks like a score."""


@dataclass(frozen=True)
class Row:
    """tokens: context and continuation.  scored: how many tokens at the end are the continuation."""

    tokens: tuple[int, ...]
    scored: int


@dataclass
class Batch:
    """One forward.

    inputs: (B, T) right-padded token ids.  keep: (K,) positions whose logits any row needs, contiguous.
    row, column: (M,) where each scored token's logits are in (B, K).  target: (M,) the scored token.
    owner: (M,) which of the requests the scored token belongs to.
    """

    inputs: torch.Tensor
    keep: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor
    owner: torch.Tensor


def plan_batches(rows: Sequence[Row], budget: int, device: torch.device) -> list[Batch]:
    """Batches of at most `budget` padded tokens (at least one row each), longest first.

    Rows with the same input (all but the last token) share one forward: the one-token choices of an item, for
    instance.  Membership depends on the rows alone, so every candidate sees the same padding.
    """
    owners: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        owners.setdefault(row.tokens[:-1], []).append(number)
    inputs = sorted(owners, key=lambda tokens: (-len(tokens), tokens))
    batches = []
    start = 0
    while start < len(inputs):
        count = max(1, budget // len(inputs[start]))
        batches.append(make_batch(inputs[start : start + count], owners, rows, device))
        start += count
    return batches


def make_batch(
    inputs: list[tuple[int, ...]],
    owners: dict[tuple[int, ...], list[int]],
    rows: Sequence[Row],
    device: torch.device,
) -> Batch:
    width = len(inputs[0])
    padded = torch.zeros(len(inputs), width, dtype=torch.long)  # (B, T)
    entries = []  # (row in batch, position of the logits, target token, request)
    for b, tokens in enumerate(inputs):
        padded[b, : len(tokens)] = torch.tensor(tokens)
        for number in owners[tokens]:
            row = rows[number]
            first = len(tokens) - row.scored
            entries += [(b, first + k, row.tokens[first + 1 + k], number) for k in range(row.scored)]
    at = torch.tensor(entries, dtype=torch.long)  # (M, 4)
    low, high = int(at[:, 1].min()), int(at[:, 1].max()) + 1
    columns = (padded, torch.arange(low, high), at[:, 0], at[:, 1] - low, at[:, 2], at[:, 3])
    return Batch(*(c.contiguous().to(device) for c in columns))


@torch.inference_mode()
def score_batches(model: Any, batches: Sequence[Batch], requests: int, clock: Clock) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy decoding gives the continuation) of every request.

    The softmax is in float32 whatever the model's type.  NotFiniteScore if a log-likelihood is not finite.
    """
    device = model.device
    total = torch.zeros(requests, dtype=torch.float64, device=device)
    wrong = torch.zeros(requests, dtype=torch.long, device=device)
    for batch in batches:
        clock.check()
        with clock.time("forward"):
            logits = kept_logits(model, batch)  # (B, K, V)
        with clock.time("score"):
            for start in range(0, len(batch.target), HEAD_ROWS):
                part = slice(start, start + HEAD_ROWS)
                chosen = logits[batch.row[part], batch.column[part]].float()  # (m, V)
                target, owner = batch.target[part], batch.owner[part]
                logprob = chosen.gather(1, target[:, None])[:, 0] - chosen.logsumexp(1)  # (m,)
                total.index_add_(0, owner, logprob.double())
                wrong.index_add_(0, owner, (chosen.argmax(1) != target).long())
        clock.step()
    with clock.time("score"):
        scores, misses = total.tolist(), wrong.tolist()
    for score in scores:
        if not abs(score) < float("inf"):
            raise NotFiniteScore(f"a log-likelihood is {score}")
    return [(score, miss == 0) for score, miss in zip(scores, misses, strict=True)]


def kept_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits at the positions `batch.keep`, (B, K, V); the head is not computed elsewhere if the model can skip it."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: torch.Tensor = model(batch.inputs, use_cache=False, logits_to_keep=batch.keep).logits
        return logits
    full: torch.Tensor = model(batch.inputs, use_cache=False).logits
    return full[:, batch.keep]
