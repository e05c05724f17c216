"""A cheap look first: is a candidate's language broken?  One forward over a few prompts, before it is scored.

Merges break in three ways: weights or logits are not finite; the next token is always the same whatever was said
(the entropy has collapsed); or greedy text repeats itself without end.  What is normal differs from family to family,
so the signs of candidates are compared with those of the parents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WIDTH = 48  # tokens of a prompt, its last
PROMPTS = 4
WRITTEN = 16  # tokens that a suspect writes
COLLAPSED = 0.05  # of the parents' lowest entropy
SUSPECT = 0.5  # of all predictions are one token


class Broken(ArithmeticError):
    """A candidate is not worth scoring; the message says why."""


@dataclass(frozen=True)
class Signs:
    """entropy: nats of the next token, mean over all positions.  sameness: the share of positions whose likeliest next
    token is the commonest of all.  repeats: whether every prompt was continued by a repetition without end."""

    entropy: float
    sameness: float
    repeats: bool = False


def prompts(contexts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A few contexts cut to one length, (B, T) token ids; those of other tasks before more of the same."""
    chosen = [c for c in contexts if c][:PROMPTS]
    width = min([WIDTH, *map(len, chosen)])
    return torch.tensor([list(c)[-width:] for c in chosen], dtype=torch.long, device=device)


@torch.inference_mode()
def signs(model: Any, tokens: Tensor, normal: Signs | None) -> Signs:
    """Look at a model.  tokens: (B, T) of `prompts`.  normal: the parents'; who is no suspect writes nothing.

    Broken if a logit is not finite.
    """
    logits = model(tokens, use_cache=False).logits  # (B, T, V)
    if not bool(logits.isfinite().all()):
        raise Broken("a logit is not finite")
    entropy = float(torch.stack([entropies(row) for row in logits]).mean())  # row by row, as V may be large
    counts = logits.argmax(-1).flatten().bincount()
    found = Signs(entropy, float(counts.max()) / float(counts.sum()))
    if normal is None or found.sameness <= max(SUSPECT, normal.sameness):
        return found
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
        pad_token_id=0,
    )[:, tokens.shape[1] :]
    return Signs(found.entropy, found.sameness, all(endless(row) for row in written.tolist()))


def entropies(logits: Tensor) -> Tensor:
    """(T,) float64 nats of the distributions that logits (T, V) stand for."""
    logprob = logits.float().log_softmax(-1)
    return -(logprob.exp() * logprob).sum(-1).double()


def endless(tokens: Sequence[int], longest: int = 4) -> bool:
    """Whether a text is one unit of at most `longest` tokens over and over."""
    return any(all(a == b for a, b in zip(tokens, tokens[n:], strict=False)) for n in range(1, longest + 1))


def normal_signs(parents: Sequence[Signs]) -> Signs | None:
    """What is still normal where these are, None if there is none to tell."""
    if not parents:
        return None
    return Signs(min(p.entropy for p in parents), max(p.sameness for p in parents))


def check_signs(found: Signs, normal: Signs | None) -> None:
    """Broken if the signs are far outside what is normal."""
    if normal is None:
        return
    if found.entropy < COLLAPSED * normal.entropy:
        raise Broken(f"the entropy of its next token is {found.entropy:.2g} nats; the parents' is {normal.entropy:.2g}")
    if found.repeats:
        raise Broken("it repeats itself without end")
