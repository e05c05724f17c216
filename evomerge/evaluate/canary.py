"""The canary: find out with one forward over a few prompts, before a candidate is scored, whether it is broken.

A merge can break a model in three ways: weights or logits are not finite; the next token is the same after every prompt
(the entropy has collapsed); or greedy text repeats itself without end.  What is normal differs between families of
models, so a candidate is compared with its parents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.device import double
from evomerge.evaluate.signs import Signs

WIDTH = 48  # the last tokens of a prompt that are used
PROMPTS = 4
WRITTEN = 16  # tokens that are generated to find a repetition
COLLAPSED = 0.05  # an entropy below this share of the parents' lowest one is broken
SUSPECT = 0.5  # text is generated if one token is more than this share of all predictions


class Broken(ArithmeticError):
    """A candidate is broken and is not scored; the message says why."""


def canary_prompts(contexts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The first PROMPTS contexts that are not empty, cut to one length from the left: (B, T) token ids."""
    chosen = [c for c in contexts if c][:PROMPTS]
    width = min([WIDTH, *map(len, chosen)])
    return torch.tensor([list(c)[-width:] for c in chosen], dtype=torch.long, device=device)


@torch.inference_mode()
def measure_signs(model: Any, tokens: Tensor, normal: Signs | None) -> Signs:
    """Measure a model.

    tokens: (B, T) of `canary_prompts`.
    normal: what is normal, see `normal_signs`.  Text is generated only from a model whose `sameness` is above SUSPECT
        and above the normal one, and never if there is no normal.

    Broken if a logit is not finite.
    """
    logits = model(tokens, use_cache=False).logits  # (B, T, V)
    if not bool(logits.isfinite().all()):
        raise Broken("a logit is not finite")
    # Row by row, because float32 copies of all logits are large.
    entropy = float(torch.stack([entropies(row) for row in logits]).mean())
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
    """The entropies in nats, (T,) float64, of the distributions with logits (T, V)."""
    logprob = logits.float().log_softmax(-1)
    return double(-(logprob.exp() * logprob).sum(-1))


def endless(tokens: Sequence[int], longest: int = 4) -> bool:
    """Whether a text repeats one unit of at most `longest` tokens from its beginning to its end."""
    return any(all(a == b for a, b in zip(tokens, tokens[n:], strict=False)) for n in range(1, longest + 1))


def normal_signs(parents: Sequence[Signs]) -> Signs | None:
    """The lowest entropy and the highest sameness of the parents; None without parents."""
    if not parents:
        return None
    return Signs(min(p.entropy for p in parents), max(p.sameness for p in parents))


def check_signs(found: Signs, normal: Signs | None) -> None:
    """Broken if the entropy is far below the normal one or the text repeats itself.  normal: None allows everything."""
    if normal is None:
        return
    if found.entropy < COLLAPSED * normal.entropy:
        raise Broken(f"the entropy of its next token is {found.entropy:.2g} nats; the parents' is {normal.entropy:.2g}")
    if found.repeats:
        raise Broken("it repeats itself without end")
