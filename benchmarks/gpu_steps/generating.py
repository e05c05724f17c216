"""Greedy generation by the search's own loop, and by the ways that transformers offers."""

import random
from collections.abc import Callable, Iterator
from functools import partial

import torch
from evaluate import extend
from merge import SIZES, write_models
from stopwatch import timed
from transformers import GenerationConfig

from evomerge.evaluate.clock import Clock
from evomerge.evaluate.generation import Prompt, Stops, generate, plan_generation
from evomerge.evaluate.loglikelihood import Plan
from evomerge.merge.live import load_live_model
from evomerge.sources.tokenizer import open_tokenizer
from gpu_steps.bench import Bench
from gpu_steps.models import write_tokenizer

Answers = list[list[int]]
UNTIL = ("\x00\x00",)  # a stop string that never comes


def generating(bench: Bench) -> None:
    """Prompts of 30 to 60 tokens, continued by as many new tokens by each way: all in one batch."""
    for size in ["tiny"] if bench.small else ["135m", "1.5b"]:
        folder = write_models(bench.work / f"generating {size}", size, [], str(bench.device))["base"]
        write_tokenizer(folder)
        model = load_live_model(folder, torch.bfloat16, bench.device)
        extend(model)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        drawn = random.Random(0)
        letters = range(20, min(4096, SIZES[size][0]))
        count, new = (4, 4) if bench.small else (256, 64)
        prompts = [drawn.choices(letters, k=drawn.randint(30, 60)) for _ in range(count)]
        own: Answers | None = None
        seconds = 0.0
        for name, way in ways(model, open_tokenizer(folder), prompts, new):
            with bench.guarded(f"{size}: {name}"):
                first = timed(way, bench.device)
                found: list[Answers] = []
                least = min(timed(lambda w=way, f=found: f.append(w()), bench.device) for _ in range(2))
                own, seconds = (found[-1], least) if own is None else (own, seconds)
                same = sum(a == b for a, b in zip(own, found[-1], strict=True))
                text = f"{least / seconds:.2f} times evomerge's {seconds:.3f} s; first {first:.1f} s; {same} of {count}"
                bench.report(f"{size}: {name}; the same answers", text, ok=len(found[-1]) == count)


def ways(
    model: torch.nn.Module, tokenizer: object, prompts: list[list[int]], new: int
) -> Iterator[tuple[str, Callable[[], Answers]]]:
    """Each way by name, evomerge's first; those that can hang or compile for long come last."""
    vocabulary = int(model.config.vocab_size)
    asked = [Prompt(tuple(p), UNTIL, new) for p in prompts]
    stops = Stops(tokenizer, len(tokenizer), set())  # type: ignore[arg-type]
    stops.tables[UNTIL] = [False] * vocabulary  # a table of token texts, which random weights have not

    def ours(packs: bool) -> Answers:
        batches = plan_generation(asked, 0, Plan(1 << 16, model.device, vocabulary, packs))
        return generate(model, batches, len(asked), stops, Clock(device=model.device), packs)

    yield "evomerge", lambda: ours(True)
    yield "evomerge without packing", lambda: ours(False)
    width = max(map(len, prompts))
    inputs = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def theirs(**options: object) -> Answers:
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        return [row[width:] for row in out.tolist()]

    yield "generate", theirs
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def continuous() -> Answers:
        out = model.generate_batch(prompts, generation_config=config, progress_bar=False)
        return [list(out[f"req_{k}"].generated_tokens) for k in range(len(prompts))]

    if model.device.type == "cuda":
        yield "continuous batching", continuous
    yield "static cache", partial(theirs, cache_implementation="static")
