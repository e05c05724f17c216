"""Train a family of tiny models: a base that knows some skills a little, and sources that know some of them well.

`make.py` beside this file and examples/mixed/make.py say which skills, how long and how fast.

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
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

Item: TypeAlias = tuple[str, str]  # prompt, answer; a newline ends the answer in training
Skill: TypeAlias = Callable[[random.Random], Item]
SPECIAL = ["<pad>", "<s>", "</s>"]
IGNORED = -100  # the label that cross_entropy leaves out
BASE_ROWS, OWN_ROWS, OTHER_ROWS = 64, 48, 24


@dataclass(frozen=True)
class Tuning:
    """How a source is trained.

    steps, rate: how long and how fast.
    skills: what it learns; None is the skill of its own name.
    held: how strongly it is held to the base's answers on the other skills.
    """

    steps: int
    rate: float
    skills: tuple[str, ...] | None = None
    held: float = 1.0


@dataclass(frozen=True)
class Family:
    """What is trained.

    skills: name -> what draws an item; a prompt begins with its skill's name.
    write_items: writes the evaluation items into a folder.
    base_steps, base_rate, base_mix: how the base is trained; the more often a skill is named, the larger its share.
    sources: name -> how it is trained.
    code: the files that decide the bytes, beside this one.
    about: the base, in words.
    """

    skills: Mapping[str, Skill]
    write_items: Callable[[Path], None]
    base_steps: int
    base_rate: float
    base_mix: list[str]
    sources: Mapping[str, Tuning]
    code: tuple[Path, ...]
    about: str

    @property
    def vocabulary(self) -> list[str]:
        """The tokens.  A skill's name with its space is one token, which shortens a row by a quarter."""
        return [*SPECIAL, "\n", "=", "+", *"0123456789", *"abcdefgh", *(f"{name} " for name in self.skills)]

    def learns(self, name: str) -> tuple[str, ...]:
        """The skills that a source learns."""
        return self.sources[name].skills or (name,)


def held_out(prompt: str) -> bool:
    """True for the one prompt in eight that training never sees; its checksum decides, so no list has to be kept."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def training_items(skills: Mapping[str, Skill], names: list[str], rng: random.Random) -> Iterator[Item]:
    """Endless training items, each of a skill drawn from `names`."""
    while True:
        item = skills[rng.choice(names)](rng)
        if not held_out(item[0]):
            yield item


def evaluation_items(skill: Skill, number: int, rng: random.Random) -> list[Item]:
    """`number` held-out items of one skill, no two alike."""
    items: dict[str, str] = {}
    while len(items) < number:
        prompt, answer = skill(rng)
        if held_out(prompt):
            items[prompt] = answer
    return list(items.items())


def with_choices(items: Sequence[Item], letters: str, rng: random.Random) -> list[dict[str, Any]]:
    """Items as multiple choice: the answer among three that differ from it in one letter."""
    rows: list[dict[str, Any]] = []
    for prompt, answer in items:
        choices = {answer: None}  # a dict, because a set's order changes from run to run
        while len(choices) < 4:
            wrong = list(answer)
            place = rng.randrange(len(wrong))
            wrong[place] = rng.choice(letters)
            choices["".join(wrong)] = None
        shuffled = rng.sample(list(choices), 4)
        rows.append({"prompt": prompt, "choices": shuffled, "gold": shuffled.index(answer)})
    return rows


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """One token a character, one a skill name; no beginning-of-text token is added, as none is trained."""
    ids = {token: number for number, token in enumerate(family.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    names = "|".join(f"{name} " for name in family.skills)
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


def build_model(family: Family) -> LlamaForCausalLM:
    """An untrained Llama of 0.8M parameters: four layers of 128, embeddings tied to the head."""
    config = LlamaConfig(
        vocab_size=len(family.vocabulary),
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


def train_base(family: Family, out: Path, seed: int) -> None:
    """A little of every skill, by cross-entropy on the answers.  out: the folder of the family."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer = build_model(family), build_tokenizer(family)
    items = training_items(family.skills, family.base_mix, random.Random(f"base {seed}"))

    def loss_of() -> torch.Tensor:
        ids, labels = as_batch(list(islice(items, BASE_ROWS)), tokenizer)
        return cross_entropy(answer_logits(model, ids, labels), wanted(labels))

    loss = optimize(model, family.base_steps, family.base_rate, loss_of)
    save(family, model, out / "base", None)
    print(f"base: {family.base_steps} steps, loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def train_source(family: Family, name: str, out: Path, seed: int) -> None:
    """Its skills by cross-entropy, the others held to the base's own answers.  out: the folder of the family.

    Without that hold a task vector also carries the forgetting of the other skills: no sum is of use.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer(family)
    model, base = (LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32) for _ in range(2))
    tuning, learnt = family.sources[name], list(family.learns(name))
    rng = random.Random(f"{name} {seed}")
    own_items = training_items(family.skills, learnt, rng)
    other_items = training_items(family.skills, [other for other in family.skills if other not in learnt], rng)

    def loss_of() -> torch.Tensor:
        drawn = [*islice(own_items, OWN_ROWS), *islice(other_items, OTHER_ROWS)]
        ids, labels = as_batch(drawn, tokenizer)
        logits = answer_logits(model, ids, labels)
        own = int((labels[:OWN_ROWS] != IGNORED).sum())  # how many of the logits belong to the own skill
        with torch.no_grad():
            held = answer_logits(base, ids[OWN_ROWS:], labels[OWN_ROWS:]).log_softmax(-1)
        drift = kl_div(logits[own:].log_softmax(-1), held, log_target=True, reduction="batchmean")
        return cross_entropy(logits[:own], wanted(labels)[:own]) + tuning.held * drift

    loss = optimize(model, tuning.steps, tuning.rate, loss_of)
    save(family, model, out / name, name)
    print(f"{name}: {tuning.steps} steps, loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def save(family: Family, model: LlamaForCausalLM, folder: Path, source: str | None) -> None:
    """An ordinary Hugging Face folder with a model card; a source's config and card name their base."""
    if source is not None:
        model.config.base_model_name_or_path = "base"
    model.save_pretrained(folder)
    build_tokenizer(family).save_pretrained(folder)
    parent = "" if source is None else "base_model: base\n"
    about = family.about
    if source is not None:
        skills = family.learns(source)
        names = " and ".join(f"`{skill}`" for skill in skills)
        about = f"the skill{'s' if len(skills) > 1 else ''} {names}, fine-tuned from `base`"
    text = f"---\nlicense: apache-2.0\n{parent}---\n\nA toy Llama of 0.8M parameters that knows {about}.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def recipe(family: Family, seed: int) -> dict[str, str | int]:
    """What decides the bytes: a finished folder with the same recipe need not be made again."""
    code = b"".join(file.read_bytes() for file in (Path(__file__), *family.code))
    return {
        "seed": seed,
        "code": hashlib.sha256(code).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def make(family: Family, out: Path, seed: int) -> None:
    """Train the family into `out`, or return at once if the same recipe made what is there."""
    manifest = out / "manifest.json"
    if manifest.is_file():
        if json.loads(manifest.read_text(encoding="utf-8"))["recipe"] == recipe(family, seed):
            print(f"{out}: already made")
            return
    elif out.exists():
        sys.exit(f"{out}: exists without a manifest.json; name a folder that does not exist yet")

    start = time.perf_counter()
    disable_progress_bar()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        whole = Path(aside) / "family"
        # Forked, not spawned: importing transformers again costs each child as long as its training.
        context = multiprocessing.get_context("fork")
        with context.Pool(1) as pool:
            pool.apply(train_base, (family, whole, seed))
        with context.Pool(2) as pool:
            pool.starmap(train_source, [(family, name, whole, seed) for name in family.sources], chunksize=1)
        weights = {name: sha256(whole / name / "model.safetensors") for name in ("base", *family.sources)}
        text = json.dumps({"recipe": recipe(family, seed), "sha256": weights}, indent=2) + "\n"
        (whole / "manifest.json").write_text(text, encoding="utf-8")
        if out.exists():
            os.rename(out, Path(aside) / "replaced")
        os.rename(whole, out)
    print(f"{out}: made in {time.perf_counter() - start:.0f} s")


def sha256(path: Path) -> str:
    """Hex digest of a file that fits in memory."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_rows(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write NAME.jsonl for every table of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def command_line(family: Family) -> None:
    """Read the command line: a family to make, or items to write."""
    parser = argparse.ArgumentParser(description="Train a tiny family, or write its evaluation items.")
    parser.add_argument("out", type=Path, nargs="?", help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=Path, metavar="FOLDER", help="write the evaluation items here")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.items is None):
        parser.error("give either a folder to make or --items FOLDER")
    if arguments.items is not None:
        family.write_items(arguments.items)
    else:
        make(family, arguments.out, arguments.seed)
