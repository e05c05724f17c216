"""Each fault that `evomerge check` is for, made on purpose with real models and a real task, and a sound search."""

import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import write_adapter, write_llama
from searches import ROOT, import_what_commands_need, write_config

import evomerge
from evomerge.sources.tokenizer import open_tokenizer

Rows = list[dict[str, Any]]


def task_of(folder: Path, change_rows: Callable[[Rows], Rows] = lambda rows: rows, **changes: Any) -> Path:
    """The task `rev` with other rows or other keys."""
    rows = [json.loads(line) for line in (ROOT / "evals" / "tiny" / "rev.jsonl").read_text().splitlines()]
    (folder / "rev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change_rows(rows)))
    content = yaml.safe_load((ROOT / "evals" / "tiny" / "rev.yaml").read_text())
    content["generation_kwargs"] |= changes.pop("generation_kwargs", {})
    (folder / "rev.yaml").write_text(yaml.safe_dump(content | changes))
    return folder / "rev.yaml"


def warnings(folder: Path, family: Path, task: Path, options: dict[str, Any] | None = None, **changes: Any) -> str:
    """What a check of a search on a task warns of, but for a holdout that shows large gains alone."""
    tasks = [{"task": str(task), "objective": "auto", **(options or {})}]
    splits = {"search": 100, "selection": 50, "holdout": 250}
    budget = {"trials": 60}
    config = write_config(folder, family, **{"tasks": tasks, "splits": splits, "budget": budget} | changes)
    found = evomerge.check(config, show=False)
    lines = [f"{concern.what}: {concern.mend}" for concern in found.concerns]
    return "\n".join(line for line in lines if "one of 2 or 5: " not in line)


def answers(change: Callable[[str], str]) -> Callable[[Rows], Rows]:
    return lambda rows: [row | {"answer": change(row["answer"])} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    import_what_commands_need()


def test_a_sound_search_has_nothing_to_warn_of(tiny_family: Path, tmp_path: Path) -> None:
    assert warnings(tmp_path, tiny_family, task_of(tmp_path)) == ""


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (answers(lambda a: f" {a}"), {}, "wrong only by spaces: strip both"),
        (lambda rows: rows, {"target_delimiter": " "}, "set `target_delimiter: ''` in the task file"),
        (answers(str.upper), {}, "wrong only by upper and lower case: give `ignore_case: true`"),
        (answers(lambda a: f'"{a}"'), {}, "wrong only by quotes or punctuation: give `ignore_punctuation: true`"),
        (answers(lambda a: f"{a} is it"), {"doc_to_target": "{{answer[:5]}}"}, None),
        (answers(lambda a: "hhhhhhhh"), {}, "base and sources answer none of 16 items right"),
        (lambda rows: rows, {"generation_kwargs": {"max_gen_toks": 3}}, "were cut by `max_gen_toks`: raise it"),
        (
            lambda rows: [r for row in rows[:250] for r in (row, row | {"prompt": row["prompt"].replace("=", " =")})],
            {},
            "but for spaces, case or signs, such as",
        ),
    ],
    ids=["space", "delimiter", "case", "quotes", "sound", "zero", "cut", "twice"],
)
def test_what_is_wrong_with_a_task(
    tiny_family: Path, tmp_path: Path, rows: Callable[[Rows], Rows], changes: dict[str, Any], words: str | None
) -> None:
    found = warnings(tmp_path, tiny_family, task_of(tmp_path, rows, **changes))
    assert (words or "") in found
    assert bool(found) == bool(words)


def test_a_prompt_that_names_no_column(tiny_family: Path, tmp_path: Path) -> None:
    found = warnings(tmp_path, tiny_family, task_of(tmp_path, doc_to_text="promt"))
    assert "every item has the same prompt, 'promt': name the column of the question" in found


def test_an_adapter_that_may_be_of_another_base(tiny_family: Path, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_adapter(tmp_path / "it", base, base_model_name_or_path="owner/other")
    sources = [{"name": "it", "path": str(adapter)}]
    found = warnings(tmp_path, tiny_family, task_of(tmp_path), base=str(base), sources=sources)
    assert "it: says that it was trained from the hub model 'owner/other'" in found


def test_limits_and_splits_that_are_too_small(tiny_family: Path, tmp_path: Path) -> None:
    splits = {"search": 100, "selection": 50, "holdout": 20}
    found = warnings(tmp_path, tiny_family, task_of(tmp_path), splits=splits, budget={"timeout": 1})
    assert "the time limit leaves room for about" in found
    assert "the holdout items can show a gain of" in found


def test_a_chat_model_that_is_asked_without_its_template(tiny_family: Path, tmp_path: Path) -> None:
    source = tmp_path / "rev"
    shutil.copytree(tiny_family / "rev", source)
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    found = warnings(tmp_path, tiny_family, task_of(tmp_path), sources=[{"name": "rev", "path": str(source)}])
    assert "rev: made for chats, and tiny_rev asks without the chat template" in found


def trained_with_first_token(family: Path, out: Path) -> Path:
    """The base, trained further on rows that begin with `<s>`, and on noise where rows do not."""
    sys.path.insert(0, str(ROOT / "examples" / "tiny"))
    from transformers import LlamaForCausalLM

    skills, training = importlib.import_module("skills").SKILLS, importlib.import_module("training")

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(family / "base", dtype=torch.float32)
    tokenizer = open_tokenizer(family / "base")
    items = training.training_items(skills, ["rev"], random.Random(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        batch = [next(items) for _ in range(32)]
        right = torch.tensor([tokenizer.encode(p + a) for p, a in batch])
        noise = torch.randint(5, tokenizer.vocab_size, right.shape)
        began = torch.cat([torch.ones(len(batch), 1, dtype=torch.int64), right], 1)
        loss = model(began, labels=began).loss + model(noise, labels=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shutil.copytree(family / "base", out)
    model.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text()) | {"add_bos_token": True}  # nothing obeys it
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def test_a_first_token_that_the_base_needs_and_the_tokenizer_does_not_add(tiny_family: Path, tmp_path: Path) -> None:
    base = trained_with_first_token(tiny_family, tmp_path / "base")
    found = warnings(tmp_path, tiny_family, task_of(tmp_path), base=str(base))
    assert "the tokenizer puts no <s> before a prompt, but the base is better with it: a loss of" in found
    tokenizer = open_tokenizer(base)  # what the message says to do
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(base)
    assert "<s>" not in warnings(tmp_path, tiny_family, task_of(tmp_path), base=str(base))


def test_a_first_token_that_is_there_twice(tiny_family: Path, tmp_path: Path) -> None:
    found = warnings(tmp_path, tiny_family, task_of(tmp_path, doc_to_text="<s><s>{{prompt}}"))
    assert "its prompts begin with <s> twice" in found
