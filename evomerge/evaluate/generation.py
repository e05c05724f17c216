"""From prompts to generated answers: batches of prompts, greedy decoding on the live model, lm-eval's stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.evaluate.clock import Clock, Counts
from evomerge.evaluate.kv_cache import KeysValues, empty_cache_of, generation_cache
from evomerge.evaluate.loglikelihood import Plan, head_only_at, run_trunk
from evomerge.evaluate.prefix_plan import ALONE, Leaf, Tokens, choose_trunks, group_by_trunk

LEAVE = 0.8  # finished rows are dropped once at most this share of the rows still runs: dropping copies the others
SIMILAR, FILLED = 0.85, 512  # a forward over prompts of FILLED tokens takes only prompts of similar length: this share
SHORTEST_TRUNK = 32  # rows of different trunks cannot decode together; a shorter trunk saves less than that costs
CACHED = 4  # cached tokens for each token of the budget: keys and values are small beside a forward's activations


@dataclass(frozen=True)
class Prompt:
    """A prompt to be continued.

    context: its token ids.
    until: the stop strings, that of the end-of-text token included.
    limit: the greatest number of new tokens.
    """

    context: Tokens
    until: tuple[str, ...]
    limit: int

    @property
    def leaf(self) -> Leaf:
        """What must be computed: all tokens, with logits at the last one."""
        return Leaf(self.context, len(self.context) - 1)


@dataclass
class GenerationBatch:
    """Prompts that are continued together.

    inputs: (B, W) the token ids behind the trunk, padded on the left.
    mask: (B, W) 1 where a token is not padding.
    trunk: the tokens before every row.
    parts: for each forward over prompts, its rows and the column where the longest of them begins.
    lengths: the tokens of each row without padding.
    owner: the numbers of the prompts.
    until, limit: those of all the prompts, see `Prompt`.
    """

    inputs: Tensor
    mask: Tensor
    trunk: Tokens
    parts: list[tuple[slice, int]]
    lengths: list[int]
    owner: list[int]
    until: tuple[str, ...]
    limit: int


def plan_generation(prompts: Sequence[Prompt], pad: int, plan: Plan) -> list[GenerationBatch]:
    """Batches of prompts with the same stop strings, limit and trunk, the longest first; forwards keep to the budget.

    pad: the token id of padding.
    """
    batches = []
    groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((prompt.until, prompt.limit), []).append(number)
    for (until, limit), numbers in groups.items():
        owners: dict[Tokens, list[int]] = {}
        for number in numbers:
            owners.setdefault(prompts[number].context, []).append(number)
        leaves = [prompts[own[0]].leaf for own in owners.values()]
        trunks: Sequence[Tokens] = ()
        if plan.packs:
            trunks = choose_trunks(leaves, ALONE) if plan.trunks is None else plan.trunks
            trunks = [t for t in trunks if len(t) >= SHORTEST_TRUNK]
        for trunk, contexts in group_by_trunk(leaves, trunks).items():
            members = [n for c in sorted(contexts, key=lambda c: (-len(c), c)) for n in owners[c]]
            while members:
                width = len(prompts[members[0]].context) - len(trunk)
                budget = plan.budget * CACHED if plan.packs else plan.budget
                owner = members[: max(1, budget // (width + limit))]
                del members[: len(owner)]
                rests = [prompts[number].context[len(trunk) :] for number in owner]
                batches.append(make_batch(rests, trunk, owner, until, limit, pad, plan))
    return batches


def make_batch(
    rests: list[Tokens], trunk: Tokens, owner: list[int], until: tuple[str, ...], limit: int, pad: int, plan: Plan
) -> GenerationBatch:
    """One batch of prompts.

    rests: the tokens of each prompt behind the trunk, the longest first.  The others: see `GenerationBatch`.
    """
    rows, width = len(rests), len(rests[0])
    inputs = torch.full((rows, width), pad, dtype=torch.long)
    mask = torch.zeros(rows, width, dtype=torch.long)
    for b, rest in enumerate(rests):
        inputs[b, width - len(rest) :] = torch.tensor(rest)
        mask[b, width - len(rest) :] = 1
    parts = []
    start = 0
    while start < rows:
        longest = len(rests[start])
        end = min(rows, start + max(1, plan.budget // longest)) if plan.packs else rows
        similar = sum(len(rest) >= SIMILAR * longest for rest in rests[start:end])  # they are sorted by length
        if plan.packs and similar * longest >= FILLED:
            end = start + similar
        parts.append((slice(start, end), width - longest))
        start = end
    lengths = [len(rest) for rest in rests]
    return GenerationBatch(inputs.to(plan.device), mask.to(plan.device), trunk, parts, lengths, owner, until, limit)


class Stops:
    """Finds out when a row is finished: when its text contains a stop string.

    Decoding every row at every step would cost more than a small model's forward.  So a table, built once, has the
    tokens that can end a stop string; only when a row gets such a token, its last tokens are decoded.

    tokenizer: the model's.
    vocabulary: V.
    end_tokens: the ids that end every text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: set[int]) -> None:
        self.tokenizer = tokenizer
        self.texts = [tokenizer.decode([i]) for i in range(vocabulary)]
        self.end_tokens = end_tokens
        self.tables: dict[tuple[str, ...], list[bool]] = {}

    def table(self, until: tuple[str, ...]) -> list[bool]:
        """Token id -> whether its text contains a stop string's last character, or only a part of a character."""
        if until not in self.tables:
            last = {stop[-1] for stop in until if stop} | {"�"}
            self.tables[until] = [
                i in self.end_tokens or any(c in text for c in last) for i, text in enumerate(self.texts)
            ]
        return self.tables[until]

    def finished(self, tokens: list[int], until: tuple[str, ...]) -> bool:
        """Whether a stop string ends in the last token.

        tokens: the new tokens of a row; each has at least one byte of text, which bounds how many must be decoded.
        """
        if tokens[-1] in self.end_tokens:
            return True
        reach = max(len(stop.encode("utf-8")) for stop in until) + 2  # decoding may drop the space of the first token
        text = self.tokenizer.decode(tokens[-reach:], skip_special_tokens=False)
        return any(stop in text for stop in until if stop)


@torch.inference_mode()
def generate(
    model: Any,
    batches: Sequence[GenerationBatch],
    requests: int,
    stops: Stops,
    clock: Clock,
    packs: bool,
    trunks: dict[Tokens, KeysValues] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, the token that completes a stop string included.

    requests: the number of prompts.
    packs: whether the model takes masks of four dimensions; others get masks of two and transformers' own cache.
    trunks: the keys and values of the trunks that the same candidate computed before; new ones are added.
    """
    answers: list[list[int]] = [[] for _ in range(requests)]
    trunks = {} if trunks is None else trunks
    for batch in batches:
        if batch.trunk and batch.trunk not in trunks:
            with clock.time("forward"):
                trunks[batch.trunk] = run_trunk(model, batch.trunk)
                clock.counts.add(len(batch.trunk), len(batch.trunk))
        run = Decoding(model, batch, packs, trunks.get(batch.trunk))
        for number, tokens in zip(batch.owner, generate_batch(run, batch, stops, clock), strict=True):
            answers[number] = tokens
        clock.batches.add()
    return answers


class Decoding:
    """The model's state while it continues one batch: keys and values, masks and positions of the rows that still run.

    model, packs: see `generate`.
    batch: the prompts.
    trunk: the keys and values of the batch's trunk.
    """

    def __init__(self, model: Any, batch: GenerationBatch, packs: bool, trunk: KeysValues | None) -> None:
        self.model = model
        self.packs = packs
        self.batch = batch
        depth = len(batch.trunk)
        self.seen = depth + batch.inputs.shape[1]  # tokens of every row so far, padding included
        self.positions = depth + (batch.mask.cumsum(1) - 1).clamp_(min=0)  # (B, W), then (B, 1)
        self.real = torch.nn.functional.pad(batch.mask, (depth, batch.limit), value=1).bool()  # (B, capacity)
        self.low = torch.finfo(model.dtype).min
        self.newest = batch.inputs[:, -1:]  # (B, 1)
        if packs:
            layers = model.config.get_text_config().num_hidden_layers
            self.cache = generation_cache(layers, len(self.real), self.real.shape[1], trunk)
            self.hidden = torch.zeros_like(self.real, dtype=model.dtype).masked_fill_(~self.real, self.low)
        else:
            self.cache = empty_cache_of(model)

    def first(self) -> Tensor:
        """Run the forwards over the prompts; the most probable next token of each, (B,)."""
        found = []
        depth = len(self.batch.trunk)
        for part, skipped in self.batch.parts:
            inputs, positions = self.batch.inputs[part, skipped:], self.positions[part, skipped:]
            if self.packs:
                place = torch.arange(self.seen, device=inputs.device)
                own = place[depth + skipped :, None]  # (W, 1)
                mask = self.hidden[part, None, None, : self.seen].masked_fill(place > own, self.low)
                mask.masked_fill_(place == own, 0)  # padding attends to itself: a softmax over nothing is NaN
                self.write(part, depth + skipped)
            else:
                mask = self.real[:, : self.seen].long()
            found.append(self.likeliest(inputs, positions, mask))
        return self.advance(torch.cat(found))

    def next(self) -> Tensor:
        """Run a forward over each row's newest token; the most probable next token of each, (B,)."""
        if self.packs:
            mask = self.hidden[:, None, None, : self.seen + 1]
            self.write(slice(None), self.seen)
        else:
            mask = self.real[:, : self.seen + 1].long()
        best = self.likeliest(self.newest, self.positions, mask)
        self.seen += 1
        return self.advance(best)

    def advance(self, best: Tensor) -> Tensor:
        """Make (B,) tokens the newest ones and return them."""
        self.newest, self.positions = best[:, None], self.positions[:, -1:] + 1
        return best

    def write(self, part: slice, column: int) -> None:
        """Set where the next keys and values are written."""
        for layer in self.cache.layers:
            layer.part, layer.column = part, column

    def likeliest(self, inputs: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Run one forward; the most probable token after the last column, (B,).

        inputs, positions: (B, W).  mask: (B, 1, W, tokens so far) numbers, or (B, tokens so far) of 0 and 1.
        """
        rows, width = inputs.shape
        last = torch.arange(1, rows + 1, device=inputs.device) * width - 1
        with head_only_at(self.model, last):
            logits: Tensor = self.model(
                inputs, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
            ).logits
        reached = logits.shape[:2] == (1, rows)  # else (rows, width): the model has no separate head module
        return (logits[0] if reached else logits[:, -1]).argmax(1)

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all other rows.  rows: indices among those that still run."""
        keep = torch.tensor(rows, device=self.newest.device)
        for layer in self.cache.layers:
            layer.keep_rows(keep) if self.packs else layer.reorder_cache(keep)
        self.newest, self.positions, self.real = self.newest[keep], self.positions[keep], self.real[keep]
        if self.packs:
            self.hidden = self.hidden[keep]


def generate_batch(run: Decoding, batch: GenerationBatch, stops: Stops, clock: Clock) -> list[list[int]]:
    """The new tokens of every prompt of one batch."""
    table = stops.table(batch.until)
    answers: list[list[int]] = [[] for _ in batch.owner]
    running = list(range(len(batch.owner)))  # rows of this batch that are still in the model's batch
    done: set[int] = set()
    for step in range(batch.limit):
        clock.check()
        with clock.time("forward"):
            chosen = (run.next() if step else run.first()).tolist()
        count_forwards(clock.counts, batch, step, len(running))
        with clock.time("score"):
            for row, token in zip(running, chosen, strict=True):
                if row not in done:
                    answers[row].append(token)
                    if table[token] and stops.finished(answers[row], batch.until):
                        done.add(row)
        if len(done) == len(batch.owner) or step + 1 == batch.limit:
            break
        waiting = [i for i, row in enumerate(running) if row not in done]
        if len(waiting) <= LEAVE * len(running):
            with clock.time("forward"):
                run.keep_rows(waiting)
            running = [running[i] for i in waiting]
    return answers


def count_forwards(counts: Counts, batch: GenerationBatch, step: int, rows: int) -> None:
    """Count the forwards of one step: step 0 runs over the prompts, part by part; later ones over a token a row.

    rows: how many rows still run.
    """
    if step:
        counts.add(rows, rows)
        return
    for part, skipped in batch.parts:
        lengths = batch.lengths[part]
        counts.add(sum(lengths), len(lengths) * (batch.inputs.shape[1] - skipped))
