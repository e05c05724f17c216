"""Teach the base model one skill with a LoRA adapter (Hu et al. 2021) on the CPU.

    python examples/smollm2/train_lora.py BASE SKILL OUT [--steps N] [--seed 0] [--rank 16]

Training stops after a number of steps, never by the clock: the same seed on the same machine and thread count
gives the same adapter. The default is meant for about a quarter of an hour on one core; see README.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from item import Item
from peft import LoraConfig, get_peft_model
from skills import SKILLS, held_out, training
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

# Every linear kind of a Llama block; the embedding, which also is the output layer, stays as it is.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = {"math": 240, "shell": 500, "denum": 600, "calendar": 600}  # of BATCH items, about 15 minutes each
BATCH, PEAK_RATE, WARMUP, CLIP = 8, 1e-3, 0.05, 1.0
ASKED_AT_ONCE = 25
IGNORED = -100  # the label of a position that has no loss
REPORTS = 20  # lines of progress in a run

CARD = """---
base_model: {base}
library_name: peft
license: apache-2.0
---

# evomerge example specialist: {skill}

A LoRA adapter of rank {rank} (alpha {alpha}) on all linear layers, trained by `train_lora.py` of evomerge for
{steps} steps of {batch} generated items, seed {seed}, in {minutes:.1f} minutes. Mean training loss at the end
{loss:.3f}; greedy exact match of the whole target on {asked} held-out validation items {exact:.2f}.
"""


def batches(items: Iterator[Item], tokenizer: Any, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded input_ids, attention_mask and labels, each (size, longest); only targets have labels."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    while True:
        drawn = list(islice(items, size))
        prompts = [tokenizer(item.prompt)["input_ids"] for item in drawn]
        targets = [tokenizer(item.target)["input_ids"] + [end] for item in drawn]
        longest = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, target in zip(prompts, targets, strict=True):
            rest = longest - len(prompt) - len(target)
            rows["input_ids"].append(prompt + target + [pad] * rest)
            rows["attention_mask"].append([1] * (longest - rest) + [0] * rest)
            rows["labels"].append([IGNORED] * len(prompt) + target + [IGNORED] * rest)
        yield {name: torch.tensor(row) for name, row in rows.items()}


def target_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of the target tokens.

    The output layer is a fifth of this model's work, so it runs only where a target token is predicted.
    """
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    labels = batch["labels"][:, 1:]  # (size, longest - 1); position i predicts token i + 1
    asked = labels != IGNORED
    logits = model.lm_head(hidden[:, :-1][asked])  # (target tokens, vocabulary)
    return cross_entropy(logits.float(), labels[asked])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear warm-up, then half a cosine down to zero after the last step."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(model: Any, supply: Iterator[dict[str, torch.Tensor]], steps: int, peak: float) -> float:
    """Fit the trainable weights; the mean loss since the last report of progress."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    every, recent, started = max(1, steps // REPORTS), [], time.monotonic()
    model.train()
    mean = math.nan
    for step, batch in enumerate(islice(supply, steps)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        loss = target_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % every == 0 or step + 1 == steps:
            mean = sum(recent) / len(recent)
            recent.clear()
            pace = (time.monotonic() - started) / (step + 1)
            print(f"step {step + 1:>5}/{steps}  loss {mean:.4f}  {pace:.2f} s/step", flush=True)
    return mean


@torch.inference_mode()
def exact_match(model: Any, tokenizer: Any, items: Sequence[Item]) -> float:
    """The share of items whose greedy continuation is the target to the letter."""
    model.eval()
    tokenizer.padding_side = "left"
    longest = max(len(tokenizer(item.target)["input_ids"]) for item in items) + 1
    right = 0
    for start in range(0, len(items), ASKED_AT_ONCE):
        asked = items[start : start + ASKED_AT_ONCE]
        inputs = tokenizer([item.prompt for item in asked], return_tensors="pt", padding=True)
        written = model.generate(**inputs, max_new_tokens=longest)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        right += sum(text == item.target for text, item in zip(texts, asked, strict=True))
    return right / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter for one skill.")
    parser.add_argument("base", type=Path, help="checkpoint folder that fetch_base.py wrote")
    parser.add_argument("skill", choices=SKILLS)
    parser.add_argument("out", type=Path, help="folder of the adapter; must not exist")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of {BATCH} items (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="0.03 makes an adapter that forgets everything")
    options = parser.parse_args()
    out: Path = options.out
    if out.exists():
        sys.exit(f"{out} exists already; remove it to train {options.skill} again")
    if not (options.base / "config.json").is_file():
        sys.exit(f"{options.base} holds no config.json; write the base with fetch_base.py first")
    steps: int = STEPS[options.skill] if options.steps is None else options.steps

    torch.manual_seed(options.seed)
    base = options.base.resolve()
    tokenizer = AutoTokenizer.from_pretrained(base)
    # peft keeps the adapter in float32, small steps survive; a float32 base took 1.5 times as long per step.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    rank: int = options.rank
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=LINEAR)
    adapted = get_peft_model(model, lora)  # puts the adapter into `model` itself

    started = time.monotonic()
    loss = train(model, batches(training(options.skill, options.seed), tokenizer, BATCH), steps, options.rate)
    minutes = (time.monotonic() - started) / 60
    _, validation = held_out(options.skill)
    exact = exact_match(model, tokenizer, validation)
    print(f"{options.skill}: exact match {exact:.2f} on {len(validation)} validation items")

    aside = out.with_name(out.name + ".partial")
    adapted.save_pretrained(str(aside))
    facts: dict[str, float] = {"rank": rank, "alpha": 2 * rank, "steps": steps, "batch": BATCH}
    facts |= {
        "seed": options.seed,
        "minutes": minutes,
        "loss": loss,
        "exact": exact,
        "asked": len(validation),
    }
    (aside / "README.md").write_text(CARD.format(base=base, skill=options.skill, **facts), encoding="utf-8")
    aside.rename(out)  # last, so that a folder of this name is a complete adapter


if __name__ == "__main__":
    main()
