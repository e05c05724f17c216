"""From rows to log-likelihoods: batches of packed rows and their forwards.

No token is computed twice, and the head is computed only at the positions whose next token is scored.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evomerge.device import double, merging_device
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.kv_cache import KeysValues, empty_cache, trunk_cache
from evomerge.evaluate.metrics import Extra
from evomerge.evaluate.prefix_plan import Leaf, PackedRow, Tokens, choose_trunks, group_by_trunk, packed_rows

LOGITS = 2**27  # the greatest number of logits of one forward: 0.5 GB in float32


class NotFiniteScore(ArithmeticError):
    """A log-likelihood is NaN or infinite.  The argmax of NaN would be choice 0, which looks like a valid score."""


@dataclass(frozen=True)
class Row:
    """A context with its continuation.

    tokens: the token ids of both.
    scored: the number of tokens at the end that are the continuation.
    """

    tokens: Tokens
    scored: int

    @property
    def leaf(self) -> Leaf:
        """What must be computed: all tokens but the last, with logits from `first` on."""
        return Leaf(self.tokens[:-1], len(self.tokens) - 1 - self.scored)


class RowScore(NamedTuple):
    """What the model says about the continuation of one row, whose T tokens are scored.

    logprob: its log-likelihood in nats.
    greedy: whether greedy decoding gives it.
    token_logprobs, token_margins, token_entropies: (T,), see `Answer` (`formulas.py`).
    """

    logprob: float
    greedy: bool
    token_logprobs: Sequence[float] = ()
    token_margins: Sequence[float] = ()
    token_entropies: Sequence[float] = ()


@dataclass
class Batch:
    """One forward.

    inputs: (B, W) token ids, padded on the right.
    positions, ends: (B, W) the position of each token and the end of its subtree (see `PackedRow`); None where every
        row is one sequence.
    trunk: the tokens before every row.
    keep: (K,) where in the flattened (B * W) inputs the logits are needed.
    node, target, owner: (M,) for each scored token its index in `keep`, its id, and the number of the row that it
        belongs to.
    tokens: how many of the inputs are not padding.
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

    budget: padded tokens per forward.
    device: the device of the batches' tensors.
    vocabulary: V, with which the number of a forward's logits is bounded.
    packs: whether several sequences may share a row.
    trunks: the prefixes that may be computed before the rows; None chooses them.
    """

    budget: int
    device: torch.device
    vocabulary: int
    packs: bool = True
    trunks: Sequence[Tokens] | None = None


def plan_batches(rows: Sequence[Row], plan: Plan) -> list[Batch]:
    """Batches of rows of similar lengths, the longest first.

    Which rows share a batch depends only on the rows, not on the model, so the padding is the same for all candidates
    and their scores are comparable to the bit.  Rows with the same input (all tokens but the last) share it, for
    instance the choices of an item that have one token.
    """
    owners: dict[Tokens, list[int]] = {}
    leaves = [row.leaf for row in rows]
    for number, leaf in enumerate(leaves):
        owners.setdefault(leaf.tokens, []).append(number)
    if not plan.packs:
        single = [single_row(tokens) for tokens in sorted(owners, key=lambda t: (-len(t), t))]
        return split(single, (), owners, rows, plan)
    trunks = choose_trunks(leaves) if plan.trunks is None else plan.trunks
    batches = []
    for trunk, sequences in group_by_trunk(leaves, trunks).items():
        batches += split(packed_rows(sequences, len(trunk)), trunk, owners, rows, plan)
    return batches


def single_row(tokens: Tokens) -> PackedRow:
    """A row of one sequence; positions and ends are empty."""
    return PackedRow(list(tokens), [], [], {tokens: list(range(len(tokens)))})


def split(
    packed: list[PackedRow], trunk: Tokens, owners: dict[Tokens, list[int]], rows: Sequence[Row], plan: Plan
) -> list[Batch]:
    """Rows, the longest first, as batches within the budget of tokens and of logits (at least one row each).

    owners: sequence -> the numbers of the `rows` that have it as their input.
    """
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
    """One batch of packed rows, the longest first; the other arguments are those of `split`."""
    width = len(packed[0].tokens)
    inputs = torch.zeros(len(packed), width, dtype=torch.long)  # (B, W)
    positions = torch.zeros_like(inputs)
    ends = torch.arange(1, width + 1).repeat(len(packed), 1)  # padding attends to itself: a softmax over nothing is NaN
    nodes: dict[int, int] = {}  # index in the flattened batch -> index in `keep`
    entries: list[tuple[int, int, int]] = []  # (node, target token, row)
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
    extras: Collection[Extra] = (),
) -> list[RowScore]:
    """The score of every row.

    requests: the number of rows.
    trunks: the keys and values of the trunks that the same candidate computed before; new ones are added.
    extras: what is computed for each token beside its log-probability.

    The softmax is in float32, whatever the model's type.  NotFiniteScore if a log-likelihood is not finite.
    """
    device = model.device
    trunks = {} if trunks is None else trunks
    total = torch.zeros(requests, dtype=torch.float64, device=merging_device(device))
    wrong = torch.zeros(requests, dtype=torch.long, device=device)
    tokens = TokenValues()
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
            total.index_add_(0, batch.owner.to(total.device), double(logprob))
            wrong.index_add_(0, batch.owner, (logits.argmax(1)[batch.node] != batch.target).long())
            tokens.owner.append(batch.owner)
            tokens.logprob.append(logprob)
            if "margins" in extras:
                tokens.margin.append(margins(logits, batch))
            if "entropies" in extras:
                tokens.entropy.append(entropies(logits)[batch.node])
        clock.batches.add()
    with clock.time("score"):
        scores, misses = total.tolist(), wrong.tolist()
        for score in scores:
            if not abs(score) < float("inf"):
                raise NotFiniteScore(f"a log-likelihood is {score}")
        by_row = tokens.by_row(requests)
    return [RowScore(score, miss == 0, *each) for score, miss, each in zip(scores, misses, by_row, strict=True)]


@dataclass
class TokenValues:
    """Values of scored tokens batch by batch, each (M,): the row that a token belongs to, and see `RowScore`."""

    owner: list[Tensor] = field(default_factory=list)
    logprob: list[Tensor] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)

    def by_row(self, rows: int) -> list[tuple[Sequence[float], ...]]:
        """For each row the log-probabilities, margins and entropies of its tokens, in their order."""
        owner = torch.cat(self.owner)
        order = owner.argsort(stable=True)  # a row lies in one batch, its tokens in their order
        ends = torch.bincount(owner, minlength=rows).cumsum(0).tolist()
        columns = [torch.cat(c)[order].tolist() if c else [] for c in (self.logprob, self.margin, self.entropy)]
        spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        return [tuple(column[span] for column in columns) for span in spans]


def margins(logits: Tensor, batch: Batch) -> Tensor:
    """The logit of each scored token minus that of the best other token, (M,).  logits: (K, V)."""
    best, which = logits.topk(2, dim=1)  # (K, 2)
    other = torch.where(which[batch.node, 0] == batch.target, best[batch.node, 1], best[batch.node, 0])
    return logits[batch.node, batch.target] - other


def entropies(logits: Tensor) -> Tensor:
    """The entropy in nats of each row's softmax, (K,).  logits: (K, V)."""
    logprobs = logits.log_softmax(1)
    return -(logprobs.exp() * logprobs).nansum(1)  # a token that cannot come has 0 * -inf


def kept_logits(model: Any, batch: Batch, trunk: KeysValues | None = None) -> Tensor:
    """The logits at the positions `batch.keep`, (K, V).  trunk: keys and values of the tokens before the rows."""
    options: dict[str, Any] = {"use_cache": False}
    if batch.ends is not None:
        depth = len(batch.trunk)
        options["position_ids"] = batch.positions
        options["attention_mask"] = tree_mask(batch.ends, depth, model.dtype)
        if trunk is not None:
            options |= {"past_key_values": trunk_cache(trunk), "use_cache": True}
    with head_only_at(model, batch.keep):
        logits: Tensor = model(batch.inputs, **options).logits
    if logits.shape[:2] == batch.inputs.shape:  # the model has no separate head module, so it computed all logits
        return logits.flatten(0, 1)[batch.keep]
    return logits[0]


def tree_mask(ends: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """The attention mask (B, 1, W, depth + W): 0 where a token (third axis) attends to another one (last axis), else
    the lowest number of the type.

    ends: (B, W) see `Batch`.  depth: tokens of the trunk, to which all tokens attend.
    """
    place = torch.arange(ends.shape[1], device=ends.device)
    seen = (place[:, None] >= place) & (place[:, None] < ends[:, None, None, :])  # (B, 1, W, W)
    mask = torch.zeros(*seen.shape[:3], depth + ends.shape[1], dtype=dtype, device=ends.device)
    mask[..., depth:].masked_fill_(~seen, torch.finfo(dtype).min)
    return mask


@contextmanager
def head_only_at(model: Any, keep: Tensor) -> Iterator[None]:
    """Within the context, the head is computed only at the positions `keep` of the flattened batch: (1, K, V).

    What a model does to its logits afterwards (soft caps, scales) is unchanged.
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
    """The keys and values of every layer for a trunk.  tokens: its T token ids."""
    cache = empty_cache()
    inputs = torch.tensor([tokens], device=model.device)
    with head_only_at(model, torch.zeros(1, dtype=torch.long, device=model.device)):
        model(inputs, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]
