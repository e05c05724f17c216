"""One free prompt, answered by the live model with the search's own greedy decoding."""

from collections.abc import Callable

import torch

from evomerge.errors import EvomergeError
from evomerge.evaluate.bounds import within_bounds
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.generation import Prompt, generate, plan_generation
from evomerge.evaluate.loglikelihood import Plan


def prompt_of(engine: Engine, text: str, chat: bool, stop: str, limit: int) -> Prompt:
    """The prompt that a text becomes; one that is too long for the model loses its first tokens.

    chat: whether it is put into the tokenizer's chat template, as the words of the user.
    stop: the answer ends before this text; empty: only at the end-of-text token.
    limit: the greatest number of new tokens.

    EvomergeError if there is no text, no template, no room for the answer, or if the template takes too much.
    """
    if not text.strip():
        raise EvomergeError("write a prompt first")
    if chat and engine.tokenizer.chat_template is None:
        raise EvomergeError("the tokenizer of these models has no chat template")
    longest = int(engine.lm.max_length) - limit
    if longest < 1:
        raise EvomergeError(f"{limit} new tokens leave no room for the prompt: the model takes {engine.lm.max_length}")
    with within_bounds("the tokens of a prompt"):
        tokens = engine.lm.tok_encode(in_chat(engine, text) if chat else text)[-longest:]
    if not tokens:
        raise EvomergeError("this prompt has no tokens")
    end = engine.lm.tok_decode(engine.lm.eot_token_id, skip_special_tokens=False)
    return Prompt(tuple(tokens), tuple(filter(None, (stop, end))), limit)


def in_chat(engine: Engine, text: str) -> str:
    """The text as the words of the user in the tokenizer's chat template, up to where the model answers."""
    return str(engine.lm.apply_chat_template([{"role": "user", "content": text}]))


def answer(engine: Engine, prompt: Prompt, check: Callable[[], None]) -> tuple[str, bool]:
    """What the live model writes, cut at the first stop text, and whether it was cut at the limit.

    check: called before each token; may raise to stop.
    """
    if not engine.capabilities.steps:
        tokens = without_cache(engine, prompt, check)
    else:
        packs = engine.capabilities.packs and engine.capabilities.reaches(len(prompt.context) + prompt.limit)
        plan = Plan(engine.batch_tokens, engine.model.device, engine.vocabulary, packs, [])
        batches = plan_generation([prompt], engine.tokenizer.pad_token_id or 0, plan)
        (tokens,) = generate(engine.model, batches, 1, engine.stops, Clock(check), packs)
    text = engine.text(tokens, prompt.until)
    ended = engine.stops.finished(tokens, prompt.until)
    return text, not ended and len(tokens) >= prompt.limit


@torch.inference_mode()
def without_cache(engine: Engine, prompt: Prompt, check: Callable[[], None]) -> list[int]:
    """The new tokens of a model that cannot keep keys and values: every step computes all tokens again."""
    tokens: list[int] = []
    while len(tokens) < prompt.limit and not (tokens and engine.stops.finished(tokens, prompt.until)):
        check()
        seen = torch.tensor([[*prompt.context, *tokens]], device=engine.model.device)
        tokens.append(int(engine.model(seen, use_cache=False).logits[0, -1].argmax()))
    return tokens
