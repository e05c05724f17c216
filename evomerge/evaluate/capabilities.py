"""What a live model can be asked for, found out by asking: packed rows, a shared trunk, generation step by step.

Every answer is compared with plain forwards of one sequence each.  How far two roads may differ is not known
beforehand (a bfloat16 model rounds coarsely), so the measure is how far a road goes astray on which sequences see
each other: a road is taken if its error is small beside that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import first_line
from evomerge.evaluate.kv_cache import empty_cache
from evomerge.evaluate.loglikelihood import Plan, Row, kept_logits, plan_batches, run_trunk
from evomerge.evaluate.prefix_plan import Tokens

TRUNK, CONTEXTS, CHOICES = 5, 2, 3  # lengths and counts of the probe's sequences
ROUNDING = 1e-4  # mean difference of log-probabilities that is rounding in any type
ASTRAY = 0.1  # the part of the wrong road's error that a right one may have


@dataclass(frozen=True)
class Capabilities:
    """packs: sequences may share a row.  trunks: and stand on a prefix computed before.  steps: a cache of keys and
    values serves generation.  window: tokens that a row may have for the first two, None if any number."""

    packs: bool
    trunks: bool
    steps: bool
    window: int | None

    def reaches(self, longest: int) -> bool:
        """Whether attention goes back to the start of a row of `longest` tokens."""
        return self.window is None or longest <= self.window


def window_of(config: Any) -> int | None:
    """The least window of a model whose attention does not reach back to the start, None if all does."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    windows = [getattr(text, "attention_chunk_size", None)] if "chunked_attention" in kinds else []
    if "sliding_attention" in kinds and getattr(text, "use_sliding_window", True):
        windows.append(getattr(text, "sliding_window", None))
    return min((int(w) for w in windows if w), default=None)


@torch.inference_mode()
def probe(model: Any, vocabulary: int, log: Callable[[str], None] = lambda text: None) -> Capabilities:
    """Try every road on a few tokens.  log: gets a line for each that does not lead where plain forwards do."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tokens:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    trunk = draw(TRUNK)
    contexts = [trunk + draw(2 + k) for k in range(CONTEXTS)]
    rows = [Row(c + choice, len(choice)) for c in contexts for choice in (draw(2 + k) for k in range(CHOICES))]
    plain = torch.cat([logprobs(model, [row], packs=False) for row in rows])  # (M,)

    def right(name: str, road: Callable[[], Tensor], wrong: Callable[[], Tensor], instead: str) -> bool:
        try:
            error, astray = (float((found() - plain).abs().mean()) for found in (road, wrong))
            if error <= max(ROUNDING, ASTRAY * astray):
                return True
            reason = f"differs by {error:.2g} from plain forwards"
        except Exception as failure:  # whatever an architecture makes of arguments that it does not know
            reason = first_line(failure)[:200]
        log(f"note: {type(model).__name__} {name} ({reason}); {instead}")
        return False

    astray = lambda: logprobs(model, rows, packs=True, blind=True)  # noqa: E731
    packs = right("does not take packed rows", lambda: logprobs(model, rows, packs=True), astray, "one row a sequence")
    trunks = packs and right(
        "does not take a shared prefix",
        lambda: logprobs(model, rows, packs=True, trunks=[trunk]),
        astray,
        "each row computes its own",
    )
    steps = right(
        "does not generate from a cache of keys and values",
        lambda: torch.cat([stepped_logprobs(model, row) for row in rows]),
        astray if packs else lambda: plain + 1.0,
        "lm-eval's own HFLM generates",
    )
    return Capabilities(packs, trunks, steps, window_of(model.config))


def logprobs(
    model: Any, rows: Sequence[Row], packs: bool, trunks: Sequence[Tokens] = (), blind: bool = False
) -> Tensor:
    """(M,) log-probabilities of the rows' scored tokens.  blind: without mask and positions, which is wrong."""
    plan = Plan(4096, model.device, 1, packs, trunks)
    found: list[tuple[int, Tensor]] = []
    for batch in plan_batches(rows, plan):
        if blind:
            batch.positions = batch.ends = None
        logits = kept_logits(model, batch, run_trunk(model, batch.trunk) if batch.trunk else None).float()
        values = (logits.log_softmax(1)[batch.node, batch.target]).cpu()
        found += zip(batch.owner.tolist(), values, strict=True)
    return torch.stack([value for _, value in sorted(found, key=lambda pair: pair[0])])


def stepped_logprobs(model: Any, row: Row) -> Tensor:
    """(M,) the same for one row, left-padded and one token at a time, as generation runs."""
    pad, tokens = 2, row.tokens
    first = len(tokens) - row.scored
    cache = empty_cache()
    inputs = torch.tensor([(0,) * pad + tokens[:first]], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * first], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    found = []
    for target in tokens[first:]:
        logits = model(
            inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[0, -1]
        found.append(logits.float().log_softmax(0)[target])
        inputs, positions = inputs.new_tensor([[target]]), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
    return torch.stack(found).cpu()
