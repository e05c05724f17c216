"""Greedy generation on the live model: batches by length, rows leave when they are done, stops as lm-eval has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.evaluate.clock import Clock


@dataclass(frozen=True)
class Prompt:
    """context: token ids.  until: stop strings (the end-of-text token's among them).  limit: new tokens at most."""

    context: tuple[int, ...]
    until: tuple[str, ...]
    limit: int


@dataclass
class GenerationBatch:
    """inputs, mask: (B, T) left-padded ids and 1 where a token is real.  owner: which prompts these are."""

    inputs: torch.Tensor
    mask: torch.Tensor
    owner: list[int]
    until: tuple[str, ...]
    limit: int


def plan_generation(prompts: Sequence[Prompt], budget: int, pad: int, device: torch.device) -> list[GenerationBatch]:
    """Batches of prompts with the same stops and limit, of near lengths, at most `budget` tokens when full."""
    batches = []
    groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault((prompt.until, prompt.limit), []).append(number)
    for (until, limit), members in groups.items():
        members.sort(key=lambda n: (-len(prompts[n].context), prompts[n].context))
        while members:
            width = len(prompts[members[0]].context)
            owner = members[: max(1, budget // (width + limit))]
            del members[: len(owner)]
            inputs = torch.full((len(owner), width), pad, dtype=torch.long)
            mask = torch.zeros(len(owner), width, dtype=torch.long)
            for b, number in enumerate(owner):
                context = prompts[number].context
                inputs[b, width - len(context) :] = torch.tensor(context)
                mask[b, width - len(context) :] = 1
            batches.append(GenerationBatch(inputs.to(device), mask.to(device), owner, until, limit))
    return batches


class Stops:
    """Tells when a row is finished: its text holds a stop string.

    Decoding every row at every step would cost more than a small model's forward, so a table built once tells
    which tokens can end a stop string; only rows that produced such a token are decoded.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: set[int]) -> None:
        self.tokenizer = tokenizer
        self.texts = [tokenizer.decode([i]) for i in range(vocabulary)]
        self.end_tokens = end_tokens
        self.tables: dict[tuple[str, ...], torch.Tensor] = {}

    def table(self, until: tuple[str, ...]) -> torch.Tensor:
        """(V,) bool: whether a token's text holds the last character of a stop string, or part of a character."""
        if until not in self.tables:
            last = {stop[-1] for stop in until if stop} | {"�"}
            self.tables[until] = torch.tensor(
                [i in self.end_tokens or any(c in text for c in last) for i, text in enumerate(self.texts)]
            )
        return self.tables[until]

    def finished(self, tokens: list[int], until: tuple[str, ...]) -> bool:
        if tokens[-1] in self.end_tokens:
            return True
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in until if stop)


@torch.inference_mode()
def generate(
    model: Any, batches: Sequence[GenerationBatch], requests: int, stops: Stops, clock: Clock
) -> list[list[int]]:
    """The new tokens of every prompt, up to and with the token that completed a stop."""
    answers: list[list[int]] = [[] for _ in range(requests)]
    for batch in batches:
        for number, tokens in zip(batch.owner, generate_batch(model, batch, stops, clock), strict=True):
            answers[number] = tokens
        clock.step()
    return answers


def generate_batch(model: Any, batch: GenerationBatch, stops: Stops, clock: Clock) -> list[list[int]]:
    from transformers import DynamicCache

    table = stops.table(batch.until).to(model.device)
    answers: list[list[int]] = [[] for _ in batch.owner]
    running = list(range(len(batch.owner)))  # rows of this batch that are still in the model's batch
    done: set[int] = set()
    mask = batch.mask  # (B, T so far)
    inputs = batch.inputs  # (B, T), then (B, 1)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)  # (B, T)
    cache = DynamicCache(config=model.config)
    for step in range(batch.limit):
        clock.check()
        with clock.time("forward"):
            logits = model(
                inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # (B, V)
            best = logits.float().argmax(1)  # (B,)
            chosen = best.tolist()
        with clock.time("score"):
            suspects = table[best].tolist()
            for row, token, suspect in zip(running, chosen, suspects, strict=True):
                if row not in done:
                    answers[row].append(token)
                    if suspect and stops.finished(answers[row], batch.until):
                        done.add(row)
        if len(done) == len(batch.owner) or step + 1 == batch.limit:
            break
        with clock.time("forward"):
            inputs, positions = best[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            waiting = [i for i, row in enumerate(running) if row not in done]
            if len(waiting) <= len(running) // 2:  # most are done: go on with the others alone
                keep = torch.tensor(waiting, device=mask.device)
                cache.batch_select_indices(keep)
                inputs, positions, mask = inputs[keep], positions[keep], mask[keep]
                running = [running[i] for i in waiting]
    return answers
