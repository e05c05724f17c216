"""Requests of items are stored in the run folder: read back unchanged, not built twice, not used for other items."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval_tasks import write_task
from searches import run_cli, trials_of, write_config
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.config.tasks import TaskConfig
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.prepared_items import prepared_workload
from evomerge.evaluate.tasks import Task, items_of

DOCS = [{"prompt": f"{a}+{b}=", "answer": a + b, "choices": [a, b + a, "ba"], "gold": 1} for a in "abcde" for b in "ab"]
KINDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "gold"},
    "generate_until": {
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 4},
    },
    "loglikelihood": {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}"},
    "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{prompt}}{{answer}}"},
}


@pytest.fixture(scope="module")
def engine(tiny_family: Path) -> Engine:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_family / "base")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return Engine(LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer, 256)


def task_of(folder: Path, kind: str, **changes: Any) -> Task:
    content: dict[str, Any] = {"output_type": kind, **KINDS[kind], **changes}
    (task,) = open_tasks([TaskConfig(task=str(write_task(folder, kind, DOCS, **content)))])
    return task


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_read_back_is_what_was_asked(
    kind: str, everything: bool, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(tmp_path, kind)
    items = items_of(task, task.docs)
    made = prepared_workload(engine, task, "search", items, everything, tmp_path / "items")
    monkeypatch.setattr(engine, "workload", None)  # it is not called again
    read = prepared_workload(engine, task, "search", items, everything, tmp_path / "items")
    for work in (made, read):
        engine.plan(work)
    assert read.complete == made.complete
    for one, other in zip(read.items, made.items, strict=True):
        for name in ("item", "rows", "spans", "prompts", "gold", "gold_bytes"):
            assert getattr(one, name) == getattr(other, name), name
    assert engine.score(read, Clock()) == engine.score(made, Clock())


@pytest.mark.parametrize("damage", [b"", b"{", None], ids=["empty", "half a line", "the last line lost"])
def test_a_damaged_file_is_made_anew(damage: bytes | None, engine: Engine, tmp_path: Path) -> None:
    task = task_of(tmp_path, "loglikelihood")
    items = items_of(task, task.docs)
    made = prepared_workload(engine, task, "holdout", items, True, tmp_path)
    file = tmp_path / "loglikelihood-holdout-all.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rstrip().rfind(b"\n") + 1] if damage is None else damage)
    assert prepared_workload(engine, task, "holdout", items, True, tmp_path).rows == made.rows
    assert file.read_bytes() == whole


def test_other_items_or_another_prompt_are_asked_anew(engine: Engine, tmp_path: Path) -> None:
    task = task_of(tmp_path, "loglikelihood")
    items = items_of(task, task.docs)
    prepared_workload(engine, task, "search", items, True, tmp_path)
    assert len(prepared_workload(engine, task, "search", items[1:], True, tmp_path).items) == len(items) - 1
    other = task_of(tmp_path, "loglikelihood", doc_to_text="Q: {{prompt}}")
    first = prepared_workload(engine, other, "search", items, True, tmp_path)
    assert first.items[0].instances[0].args[0].startswith("Q: ")


NO_TOKENISING = """
import lm_eval.models.huggingface as h
def refuse(self, *a, **k):
    raise RuntimeError("tokenised again")
h.HFLM.tok_encode = refuse
"""


def test_a_resumed_search_tokenises_nothing(tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, tiny_family, budget={"trials": 2})
    assert run_cli("search", config, "--run", run).returncode == 0
    done = run_cli("resume", run, "--trials", "7", prelude=NO_TOKENISING)
    assert done.returncode == 0, done.stderr
    assert len(trials_of(run)) == 7
