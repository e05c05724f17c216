"""Which kinds of forwards a live model supports: packed rows, a shared trunk, generation with a cache.

Each kind is tried on a few random sequences, and its log-probabilities are compared with those of plain forwards of one
sequence each.  How much rounding may change them is not known beforehand (bfloat16 rounds coarsely).  The scale is the
error of a forward that is wrong on purpose: packed rows without mask and positions, where sequences attend to each
other.  A kind of forward is supported if its error is small compared with that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import first_line
from evomerge.evaluate.kv_cache import empty_cache_of
from evomerge.evaluate.loglikelihood import Plan, Row, kept_logits, plan_batches, run_trunk
from evomerge.evaluate.prefix_plan import Tokens

TRUNK, CONTEXTS, CHOICES = 5, 2, 3  # tokens of the probe's trunk, contexts, and choices of each context
ROUNDING = 1e-4  # a mean difference of log-probabilities that is rounding in any type
TOLERANCE = 0.1  # the part of the wrong forward's error that a supported kind may have


@dataclass(frozen=True)
class Capabilities:
    """What a model supports.

    packs: several sequences in one row.
    trunks: rows behind a prefix whose keys and values were computed before.
    steps: generation with a cache of keys and values, or of a hybrid's states.
    window: the tokens that a row may have for the first two, None for any number.
    """

    packs: bool
    trunks: bool
    steps: bool
    window: int | None

    def reaches(self, longest: int) -> bool:
        """Whether attention reaches from the last token of a row of `longest` tokens to the first."""
        return self.window is None or longest <= self.window


NONE = Capabilities(packs=False, trunks=False, steps=False, window=None)


def window_of(config: Any) -> int | None:
    """The smallest attention window of a model's layers in tokens, None if all layers attend to everything.

    config: of transformers.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    windows = [getattr(text, "attention_chunk_size", None)] if "chunked_attention" in kinds else []
    if "sliding_attention" in kinds and getattr(text, "use_sliding_window", True):
        windows.append(getattr(text, "sliding_window", None))
    return min((int(w) for w in windows if w), default=None)


@torch.inference_mode()
def probe(model: Any, vocabulary: int, log: Callable[[str], None] = lambda text: None) -> Capabilities:
    """Try every kind of forward on a few tokens.

    vocabulary: the number of token ids.
    log: gets one line for each kind that the model does not support.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Tokens:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    trunk = draw(TRUNK)
    contexts = [trunk + draw(2 + k) for k in range(CONTEXTS)]
    rows = [Row(c + choice, len(choice)) for c in contexts for choice in (draw(2 + k) for k in range(CHOICES))]
    plain = torch.cat([logprobs(model, [row], packs=False) for row in rows])  # (M,)

    def supported(
        problem: str, compute: Callable[[], Tensor], compute_wrong: Callable[[], Tensor], instead: str
    ) -> bool:
        try:
            error, scale = (float((found() - plain).abs().mean()) for found in (compute, compute_wrong))
            if error <= max(ROUNDING, TOLERANCE * scale):
                return True
            reason = f"differs by {error:.2g} from plain forwards"
        except Exception as failure:  # an architecture may fail in any way on arguments that it does not know
            reason = first_line(failure)[:200]
        log(f"note: {type(model).__name__} {problem} ({reason}); {instead}")
        return False

    def wrong() -> Tensor:
        return logprobs(model, rows, packs=True, masked=False)

    packs = supported(
        "does not take packed rows", lambda: logprobs(model, rows, packs=True), wrong, "one row a sequence"
    )
    trunks = packs and supported(
        "does not take a shared prefix",
        lambda: logprobs(model, rows, packs=True, trunks=[trunk]),
        wrong,
        "each row computes its own",
    )
    steps = supported(
        "does not generate from a cache of keys and values",
        lambda: torch.cat([stepped_logprobs(model, row) for row in rows]),
        wrong if packs else lambda: plain + 1.0,
        "lm-eval's own HFLM generates",
    )
    return Capabilities(packs, trunks, steps, window_of(model.config))


def logprobs(
    model: Any, rows: Sequence[Row], packs: bool, trunks: Sequence[Tokens] = (), masked: bool = True
) -> Tensor:
    """The log-probabilities of the rows' scored tokens, (M,).

    packs, trunks: see `Plan`.  masked: False leaves out mask and positions, so that sequences attend to each other.
    """
    plan = Plan(4096, model.device, 1, packs, trunks)
    found: list[tuple[int, Tensor]] = []
    for batch in plan_batches(rows, plan):
        if not masked:
            batch.positions = batch.ends = None
        logits = kept_logits(model, batch, run_trunk(model, batch.trunk) if batch.trunk else None).float()
        values = (logits.log_softmax(1)[batch.node, batch.target]).cpu()
        found += zip(batch.owner.tolist(), values, strict=True)
    return torch.stack([value for _, value in sorted(found, key=lambda pair: pair[0])])


def stepped_logprobs(model: Any, row: Row) -> Tensor:
    """The same for one row, (M,), padded on the left and computed token by token as in generation."""
    pad, tokens = 2, row.tokens
    first = len(tokens) - row.scored
    cache = empty_cache_of(model)
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
