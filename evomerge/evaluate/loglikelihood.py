"""Log-likelihoods of continuations: each distinct token computed once, the head only where a token is scored."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.evaluate.clock import Clock
from evomerge.evaluate.kv_cache import KeysValues, empty_cache, trunk_cache
from evomerge.evaluate.prefix_plan import Leaf, PackedRow, Tokens, by_trunk, choose_trunks, packed_rows

LOGITS = 2**27  # logits held at a time: 0.5 GB in float32


class NotFiniteScore(ArithmeticError):
    """A log-likelihood is NaN or infinite: the argmax of NaN would be choice 0, which looks like a score."""


@dataclass(frozen=True)
class Row:
    """tokens: context and continuation.  scored: how many tokens at the end are the continuation."""

    tokens: Tokens
    scored: int

    @property
    def leaf(self) -> Leaf:
        """What must be computed for it: all tokens but the last, with logits from `first` on."""
        return Leaf(self.tokens[:-1], len(self.tokens) - 1 - self.scored)


@dataclass
class Batch:
    """One forward.

    inputs: (B, W) token ids, padded on the right.  positions, ends: (B, W) each token's position and where its
    subtree ends (see `PackedRow`); None for rows of one sequence each.  trunk: the tokens before every row.
    keep: (K,) where in the flattened (B * W) the logits are needed.  node, target, owner: (M,) for each scored token
    its place in `keep`, its id and the request it belongs to.  tokens: those of `inputs` that are no padding.
    """

    inputs: Tensor
    positions: Tensor | None
    ends: Tensor | None
    trunk: Tokens
    keep: Tensor
    node: Tensor
    target: Tensor
    owner: Tensor
    tokens: int


@dataclass(frozen=True)
class Plan:
    """How rows become batches.

    budget: padded tokens per forward.  packs: whether sequences may share a row.  trunks: prefixes that may be
    computed before the rows; None chooses them.  vocabulary: bounds how many logits a forward holds.
    """

    budget: int
    device: torch.device
    vocabulary: int
    packs: bool = True
    trunks: Sequence[Tokens] | None = None


def plan_batches(rows: Sequence[Row], plan: Plan) -> list[Batch]:
    """Batches of near lengths, longest first; membership depends on the rows alone, so padding is everybody's.

    Rows with the same input (all but the last token) share it: the one-token choices of an item, for instance.
    """
    owners: dict[Tokens, list[int]] = {}
    leaves = [row.leaf for row in rows]
    for number, leaf in enumerate(leaves):
        owners.setdefault(leaf.tokens, []).append(number)
    if not plan.packs:
        alone = [single_row(tokens) for tokens in sorted(owners, key=lambda t: (-len(t), t))]
        return split(alone, (), owners, rows, plan)
    trunks = choose_trunks(leaves) if plan.trunks is None else plan.trunks
    batches = []
    for trunk, sequences in by_trunk(leaves, trunks).items():
        batches += split(packed_rows(sequences, len(trunk)), trunk, owners, rows, plan)
    return batches


def single_row(tokens: Tokens) -> PackedRow:
    return PackedRow(list(tokens), [], [], {tokens: list(range(len(tokens)))})


def split(
    packed: list[PackedRow], trunk: Tokens, owners: dict[Tokens, list[int]], rows: Sequence[Row], plan: Plan
) -> list[Batch]:
    """Rows, the longest first, as batches within the budget of tokens and of logits (at least one row each)."""
    batches = []
    while packed:
        count = max(1, plan.budget // len(packed[0].tokens))
        scored, fit = 0, 0
        for row in packed[:count]:
            scored += sum(rows[n].scored for tokens in row.paths for n in owners[tokens])
            if fit and scored * plan.vocabulary > LOGITS:
                break
            fit += 1
        batches.append(make_batch(packed[:fit], trunk, owners, rows, plan.device))
        packed = packed[fit:]
    return batches


def make_batch(
    packed: list[PackedRow],
    trunk: Tokens,
    owners: dict[Tokens, list[int]],
    rows: Sequence[Row],
    device: torch.device,
) -> Batch:
    width = len(packed[0].tokens)
    inputs = torch.zeros(len(packed), width, dtype=torch.long)  # (B, W)
    positions = torch.zeros_like(inputs)
    ends = torch.arange(1, width + 1).repeat(len(packed), 1)  # padding sees itself, or its softmax were over nothing
    nodes: dict[int, int] = {}  # place in the flattened batch -> place in `keep`
    entries: list[tuple[int, int, int]] = []  # (node, target token, request)
    for b, row in enumerate(packed):
        size = len(row.tokens)
        inputs[b, :size] = torch.tensor(row.tokens)
        if row.ends:
            positions[b, :size] = torch.tensor(row.positions)
            ends[b, :size] = torch.tensor(row.ends)
        for tokens, path in row.paths.items():
            for number in owners[tokens]:
                first = len(tokens) - rows[number].scored
                for k, target in enumerate(rows[number].tokens[first + 1 :]):
                    place = b * width + path[first + k - len(trunk)]
                    entries.append((nodes.setdefault(place, len(nodes)), target, number))
    keep = torch.tensor(list(nodes), dtype=torch.long).to(device)
    node, target, owner = (c.contiguous().to(device) for c in torch.tensor(entries, dtype=torch.long).T)
    real = sum(len(row.tokens) for row in packed)
    if not packed[0].ends:
        return Batch(inputs.to(device), None, None, trunk, keep, node, target, owner, real)
    return Batch(inputs.to(device), positions.to(device), ends.to(device), trunk, keep, node, target, owner, real)


@torch.inference_mode()
def score_batches(
    model: Any,
    batches: Sequence[Batch],
    requests: int,
    clock: Clock,
    trunks: dict[Tokens, KeysValues] | None = None,
) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy decoding gives the continuation) of every request.

    trunks: the keys and values of what this very candidate computed before; added to.  The softmax is in float32
    whatever the model's type.  NotFiniteScore if a log-likelihood is not finite.
    """
    device = model.device
    trunks = {} if trunks is None else trunks
    total = torch.zeros(requests, dtype=torch.float64, device=device)
    wrong = torch.zeros(requests, dtype=torch.long, device=device)
    for batch in batches:
        clock.check()
        with clock.time("forward"):
            if batch.trunk and batch.trunk not in trunks:
                trunks[batch.trunk] = run_trunk(model, batch.trunk)
                clock.counts.add(len(batch.trunk), len(batch.trunk))
            logits = kept_logits(model, batch, trunks.get(batch.trunk))  # (K, V)
        clock.counts.add(batch.tokens, batch.inputs.numel())
        with clock.time("score"):
            logits = logits.float()
            logprob = logits[batch.node, batch.target] - logits.logsumexp(1)[batch.node]  # (M,)
            total.index_add_(0, batch.owner, logprob.double())
            wrong.index_add_(0, batch.owner, (logits.argmax(1)[batch.node] != batch.target).long())
        clock.step()
    with clock.time("score"):
        scores, misses = total.tolist(), wrong.tolist()
    for score in scores:
        if not abs(score) < float("inf"):
            raise NotFiniteScore(f"a log-likelihood is {score}")
    return [(score, miss == 0) for score, miss in zip(scores, misses, strict=True)]


def kept_logits(model: Any, batch: Batch, trunk: KeysValues | None = None) -> Tensor:
    """Logits at the places `batch.keep`, (K, V).  trunk: keys and values of the tokens before the rows."""
    options: dict[str, Any] = {"use_cache": False}
    if batch.ends is not None:
        depth = len(batch.trunk)
        options["position_ids"] = batch.positions
        options["attention_mask"] = tree_mask(batch.ends, depth, model.dtype)
        if trunk is not None:
            options |= {"past_key_values": trunk_cache(trunk), "use_cache": True}
    with head_only_at(model, batch.keep):
        logits: Tensor = model(batch.inputs, **options).logits
    if logits.shape[:2] == batch.inputs.shape:  # the head is out of reach
        return logits.flatten(0, 1)[batch.keep]
    return logits[0]


def tree_mask(ends: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, W, depth + W), 0 where a token (third) may see another (last), else the least number of the type."""
    place = torch.arange(ends.shape[1], device=ends.device)
    seen = (place[:, None] >= place) & (place[:, None] < ends[:, None, None, :])  # (B, 1, W, W)
    mask = torch.zeros(*seen.shape[:3], depth + ends.shape[1], dtype=dtype, device=ends.device)
    mask[..., depth:].masked_fill_(~seen, torch.finfo(dtype).min)
    return mask


@contextmanager
def head_only_at(model: Any, keep: Tensor) -> Iterator[None]:
    """While this lasts, the head is computed at the places `keep` of the flattened batch alone: (1, K, V).

    What a model does to its logits (soft caps, scales) goes on as it is.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def gather(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, -2)[keep][None], *inputs[1:])  # (1, K, H)

    handle = head.register_forward_pre_hook(gather, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def run_trunk(model: Any, tokens: Tokens) -> KeysValues:
    """The keys and values of every layer for a sequence."""
    cache = empty_cache()
    inputs = torch.tensor([tokens], device=model.device)
    with head_only_at(model, torch.zeros(1, dtype=torch.long, device=model.device)):
        model(inputs, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]
