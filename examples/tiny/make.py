"""Train the tiny family, a base and four specialists of it, as real Hugging Face folders in a minute of CPU.

    python examples/tiny/make.py OUT [--seed 0]       OUT/base, OUT/rev, OUT/sort, OUT/count, OUT/add
    python examples/tiny/make.py --items evals/tiny   the held-out items that evals/tiny/*.yaml read

The demo and the tests need models whose merge is worth searching for, without a download.  The base learns
all four skills a little; each specialist learns one of them well and is held to the base's answers on the
others, so that its task vector is mostly about its own skill.

Each training runs in a fresh process of one thread: the bytes depend on the seed and the libraries, not on
how many cores there are.  The manifest is written last and the folder renamed into place after it, so what
stands at OUT is whole.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from skills import SKILLS, Item, choice_items, evaluation_items, training_items
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
SPECIAL = ["<pad>", "<s>", "</s>"]
# A skill's name with its space is one token, which shortens a row by a quarter.
VOCABULARY = [*SPECIAL, "\n", "=", "+", *"0123456789", *"abcdefgh", *(f"{name} " for name in SKILLS)]
IGNORED = -100  # the label that cross_entropy leaves out
BASE_STEPS, BASE_RATE, BASE_ROWS = 145, 2e-3, 64
BASE_MIX = ["rev"] * 4 + ["sort"] + ["count"] * 3 + ["add"] * 3  # the harder a skill, the larger its share
OWN_ROWS, OTHER_ROWS = 48, 24


@dataclass(frozen=True)
class Tuning:
    """How long and how fast a specialist trains: two are pushed hard and two softly, so no one weight suits all."""

    steps: int
    rate: float


TUNINGS = {
    "rev": Tuning(60, 4e-4),
    "sort": Tuning(30, 6e-5),
    "count": Tuning(30, 8e-5),
    "add": Tuning(60, 3e-4),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, one a skill name; no beginning-of-text token is added, as none is trained."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    names = "|".join(f"{name} " for name in SKILLS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{names}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """An untrained Llama of 0.8M parameters: four layers of 128, embeddings tied to the head."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def as_batch(items: list[Item], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of `items`, both (rows, longest) int64, padded on the right; labels only on answers."""
    prompts: list[list[int]] = [tokenizer.encode(prompt) for prompt, _ in items]
    answers: list[list[int]] = [tokenizer.encode(answer + "\n") for _, answer in items]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(items), longest, dtype=torch.int64)
    labels = torch.full((len(items), longest), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def answer_logits(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(answer tokens, vocabulary): the logits that predict the labelled tokens, in reading order."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (rows, longest - 1, 128)
    logits: torch.Tensor = model.lm_head(hidden[labels[:, 1:] != IGNORED])
    return logits


def optimize(model: LlamaForCausalLM, steps: int, rate: float, loss_of: Callable[[], torch.Tensor]) -> float:
    """AdamW with a short warm-up and a line down to zero; `loss_of` draws a batch.  Returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def wanted(labels: torch.Tensor) -> torch.Tensor:
    """(answer tokens,) the labelled tokens themselves, in the order of `answer_logits`."""
    return labels[:, 1:][labels[:, 1:] != IGNORED]


def train_base(out: Path, seed: int) -> None:
    """A little of every skill, by cross-entropy on the answers."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer = build_model(), build_tokenizer()
    items = training_items(BASE_MIX, random.Random(f"base {seed}"))

    def loss_of() -> torch.Tensor:
        ids, labels = as_batch(list(islice(items, BASE_ROWS)), tokenizer)
        return cross_entropy(answer_logits(model, ids, labels), wanted(labels))

    loss = optimize(model, BASE_STEPS, BASE_RATE, loss_of)
    save(model, out / "base", None)
    print(f"base: {BASE_STEPS} steps, loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def train_specialist(name: str, out: Path, seed: int) -> None:
    """One skill by cross-entropy, the other three held to the base's own answers.

    Without that hold each task vector also carries the forgetting of three skills: no sum is of use.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model, base = (LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32) for _ in range(2))
    rng = random.Random(f"{name} {seed}")
    own_items = training_items([name], rng)
    other_items = training_items([other for other in SKILLS if other != name], rng)

    def loss_of() -> torch.Tensor:
        drawn = [*islice(own_items, OWN_ROWS), *islice(other_items, OTHER_ROWS)]
        ids, labels = as_batch(drawn, tokenizer)
        logits = answer_logits(model, ids, labels)
        own = int((labels[:OWN_ROWS] != IGNORED).sum())  # how many of the logits belong to the own skill
        with torch.no_grad():
            held = answer_logits(base, ids[OWN_ROWS:], labels[OWN_ROWS:]).log_softmax(-1)
        drift = kl_div(logits[own:].log_softmax(-1), held, log_target=True, reduction="batchmean")
        return cross_entropy(logits[:own], wanted(labels)[:own]) + drift

    tuning = TUNINGS[name]
    loss = optimize(model, tuning.steps, tuning.rate, loss_of)
    save(model, out / name, name)
    print(f"{name}: {tuning.steps} steps, loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def save(model: LlamaForCausalLM, folder: Path, skill: str | None) -> None:
    """An ordinary Hugging Face folder with a model card; a specialist's config and card name their base."""
    if skill is not None:
        model.config.base_model_name_or_path = "base"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    parent = "" if skill is None else "base_model: base\n"
    about = "all four skills a little" if skill is None else f"the skill `{skill}`, fine-tuned from `base`"
    text = f"---\nlicense: apache-2.0\n{parent}---\n\nA toy Llama of 0.8M parameters that knows {about}.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def recipe(seed: int) -> dict[str, str | int]:
    """What decides the bytes: a finished folder with the same recipe need not be made again."""
    code = b"".join((HERE / file).read_bytes() for file in ("make.py", "skills.py"))
    return {
        "seed": seed,
        "code": hashlib.sha256(code).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def make(out: Path, seed: int) -> None:
    """Train the family into `out`, or return at once if the same recipe made what is there."""
    manifest = out / "manifest.json"
    if manifest.is_file():
        if json.loads(manifest.read_text(encoding="utf-8"))["recipe"] == recipe(seed):
            print(f"{out}: already made")
            return
    elif out.exists():
        sys.exit(f"{out}: exists without a manifest.json; name a folder that does not exist yet")

    start = time.perf_counter()
    disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        family = Path(aside) / "family"
        # Forked, not spawned: importing transformers again costs each child as long as its training.
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            pool.apply(train_base, (family, seed))
        with context.Pool(2) as pool:
            pool.starmap(train_specialist, [(name, family, seed) for name in TUNINGS], chunksize=1)
        weights = {name: sha256(family / name / "model.safetensors") for name in ("base", *TUNINGS)}
        text = json.dumps({"recipe": recipe(seed), "sha256": weights}, indent=2) + "\n"
        (family / "manifest.json").write_text(text, encoding="utf-8")
        if out.exists():
            os.rename(out, Path(aside) / "replaced")
        os.rename(family, out)
    print(f"{out}: made in {time.perf_counter() - start:.0f} s")


def sha256(path: Path) -> str:
    """Hex digest of a file that fits in memory."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_items(folder: Path) -> None:
    """The jsonl files beside the lm-eval tasks; always the same, as published scores refer to these items."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"choice": choice_items(200)}
    for name, items in evaluation_items(500).items():
        rows[name] = [{"prompt": prompt, "answer": answer} for prompt, answer in items]
    for name, documents in rows.items():
        text = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line: a family to make, or items to write."""
    parser = argparse.ArgumentParser(description="Train the tiny family, or write its evaluation items.")
    parser.add_argument("out", type=Path, nargs="?", help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=Path, metavar="FOLDER", help="write the evaluation items here")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.items is None):
        parser.error("give either a folder to make or --items FOLDER")
    if arguments.items is not None:
        write_items(arguments.items)
    else:
        make(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
