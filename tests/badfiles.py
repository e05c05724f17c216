"""Every kind of file that evomerge reads, whole and ready to be spoilt: where it lies, what it says, who reads it."""

import contextlib
import io
import json
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval_tasks import metrics, write_lines
from models import write_adapter, write_family, write_llama
from safetensors.torch import save_file

from evomerge.config.config_file import dump_config, load_config, parse_config
from evomerge.config.differences import config_differences
from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.standalone import evaluate_model
from evomerge.merge.live import load_live_model
from evomerge.merge.measure.prepare import load
from evomerge.merge.mergekit.load_merge import load_merge
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, check_layers, dump_recipe, load_recipe
from evomerge.report.live_view import render
from evomerge.report.page.scores import explanation
from evomerge.report.progress import Screen
from evomerge.report.verdict_text import results_section
from evomerge.search.monitor.snapshot import (
    STATE,
    Coefficients,
    LastFailure,
    Snapshot,
    TaskScore,
    WorkerState,
    read_snapshot,
    why_ended,
)
from evomerge.search.run import Run
from evomerge.sources.adapter import open_adapter
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.open_models import open_models
from evomerge.sources.tokenizer import open_tokenizer

SECONDS = 5.0  # of the processor, so that a paused machine is no hang
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # on a terminal
EVIL = "\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x\x1b\\\r\u202e[/] "

CONFIG = {
    "name": "night",
    "base": "base",
    "sources": [
        {"name": "one", "path": "one", "role": "specialist"},
        {"name": "two", "path": "two", "statistics": "task.yaml"},
    ],
    "method": "ties",
    "space": {"weight": [0, 1], "density": {"low": 0.1, "high": 1, "granularity": "layer", "components": ["mlp"]},
              "granularity": "depth", "knots": 2, "sources": {"one": {"weight": 0.5}}},
    "tasks": [{"task": "task.yaml", "weight": 2, "objective": "gold_prob", "num_fewshot": 1, "gold": "{{answer}}"}],
    "splits": {"search": 0.4, "selection": 10, "holdout": "test"},
    "sampler": {"name": "cma-es", "sigma0": 0.2, "population": 8},
    "budget": {"trials": 10, "timeout": "1h30m"},
    "racing": {"alpha": 0.05, "informative": False},
    "seed": 1,
    "batch_tokens": "auto",
    "storage": "postgresql+psycopg://me:secret@host/db",
}  # fmt: skip
RECIPE = {
    "method": "ties",
    "dtype": "float32",
    "base": {"path": "base", "sha256": {"config.json": "0" * 64}},
    "sources": [
        {"name": "one", "path": "one", "parameters": {"weight": [0.5, 1.0]}},
        {"name": "inner", "recipe": {"method": "linear", "base": {"path": "base"},
                                     "sources": [{"name": "two", "path": "two"}], "parameters": {"weight": 1}}},
    ],
    "parameters": {"weight": {"default": 1, "mlp": 0.5}, "density": [{"filter": "mlp", "value": 0.3}, {"value": 1}]},
    "vocabulary": "base",
    "chat_template": "{{ messages }}",
    "outputs": {"model.safetensors": "1" * 64},
}  # fmt: skip
MERGEKIT = {
    "merge_method": "dare_ties",
    "base_model": "base",
    "slices": [{"sources": [{"model": "base", "layer_range": [0, 2]},
                            {"model": "one", "layer_range": [0, 2], "parameters": {"weight": [0, 0.5, 1]}},
                            {"model": {"model": {"path": "base"}, "lora": "lora"}, "layer_range": [0, 2]}]}],
    "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}], "density": 0.5},
    "dtype": "float32",
    "tokenizer": {"source": "base"},
    "chat_template": "chatml",
}  # fmt: skip
TASK = {
    "task": "fuzzed",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
    "filter_list": [
        {"name": "f", "filter": [{"function": "regex", "regex_pattern": "(.*)"}, {"function": "take_first"}]}
    ],
    "metric_list": [*metrics("exact_match")],
    "fewshot_config": {"sampler": "first_n"},
    "num_fewshot": 0,
    "metadata": {"version": 1.0},
}  # fmt: skip
INTERVAL = {"value": 0.5, "low": 0.4, "high": 0.6}
VERDICT = {
    "outcome": "better",
    "detectable": 0.1,
    "winner": True,
    "recommended": "winner",
    "score": INTERVAL,
    "comparisons": [{"name": "one", "kind": "parent", "score": 0.4, "difference": INTERVAL}],
    "sentence": "Winner.",
    "chosen": {"name": "trial 3", "trial": 3, "recipe": "0" * 16},
    "finalists": [{"name": "trial 3", "trial": 3, "selection_metric": 0.5, "selection_value": 0.5}],
    "holdout": {name: {"task": INTERVAL | {"objective": 0.1}} for name in ("winner", "one")},
    "holdout_uses": 1,
    "greedy_soup": "",
    "tasks": {"task": {"metric": "acc", "objective": "acc", "weight": 1.0, "code": True,
                       "items": {"search": 1, "selection": 1, "holdout": 1}}},
}  # fmt: skip
MANIFEST = {"evomerge": "0.1.0", "origin": "/nowhere", "seed": 1, "inputs": {"base": {"config.json": "0" * 64}},
            "items": {"task": {"search": "0" * 64}}}  # fmt: skip
STATE_CONTENT = json.loads(json.dumps(asdict(Snapshot(
    "n", step=(3, 9), parts=(1, 2), trials=4, limit=9, best=0.5, best_trial=3, points=((1, 0.25), (2, 0.5)),
    tasks=(TaskScore("t", "acc", 0.5, 0.4, "one", 0.1),), coefficients=(Coefficients("weight", "one", 1, 0, 2),),
    workers=(WorkerState("0", "cpu", "busy", 1, 3.0),), failures=(LastFailure(1, "why"),), left=9.0, reserved=3.0,
    per_minute=3.0, used={"seconds": 2.0, "tokens": 5, "device_seconds": 4.0}, price=(0.5, "EUR"),
))))  # fmt: skip
CARD = {"license": "mit", "base_model": ["owner/base"], "tags": ["merge"]}


class Live:
    """A model and its tokenizer, opened when they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        return load_live_model(self.folder, torch.float32, torch.device("cpu"))

    @cached_property
    def tokenizer(self) -> Any:
        return open_tokenizer(self.folder)


@dataclass(frozen=True)
class Target:
    """A file in a folder of its own.  plain: its content as plain data.  write: that as bytes.  read: who reads it."""

    file: Path
    plain: Any
    write: Callable[[Any], bytes]
    read: Callable[[], object]


def as_yaml(content: Any) -> bytes:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def as_json(content: Any) -> bytes:
    return json.dumps(content, default=str).encode()


def as_card(content: Any) -> bytes:
    return b"---\n" + as_yaml(content) + b"---\n# A model\n"


def tensors_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its data."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def as_safetensors(data: bytes) -> Callable[[Any], bytes]:
    def write(header: Any) -> bytes:
        text = as_json(header)
        return struct.pack("<Q", len(text)) + text + data

    return write


def make_targets(root: Path) -> dict[str, Target]:
    """All targets, each with what it needs beside it."""
    family = write_family(root / "family", ["one", "two"])
    write_adapter(root / "family" / "lora", family["base"])
    for file in ("task.yaml", "search.yaml"):
        (root / "family" / file).write_text("task: x\n")
    base = open_checkpoint(family["base"])
    sharded = write_llama(root / "sharded", 1, shards=2)
    whole = write_llama(root / "whole", 1)
    adapter = write_adapter(root / "adapter", family["base"], alpha_pattern={r"layers\.0\..*q_proj": 4, "v_proj": 2.0})
    spoilt = write_adapter(root / "spoilt", family["base"])
    worded = write_llama(root / "worded", 1)
    (root / "tasks").mkdir()
    (root / "run").mkdir()
    (root / "kept").mkdir()
    write_lines(root / "tasks" / "data.jsonl", [{"prompt": f"{a}=", "answer": a} for a in "abc"])
    save_file(
        {'["gram"]': torch.eye(2).double(), '["ranks", 0] keys': torch.arange(3)}, root / "kept" / "a.safetensors"
    )
    header, data = tensors_of(whole / "model.safetensors")
    lora_header, lora_data = tensors_of(spoilt / "adapter_model.safetensors")
    kept_header, kept_data = tensors_of(root / "kept" / "a.safetensors")
    run, live = Run(root / "run"), Live(whole)

    def read_config() -> None:
        file = root / "family" / "search.yaml"
        config = load_config(file)
        again = parse_config(yaml.safe_load(dump_config(config)), file)
        assert again == config
        config_differences(config, again)

    def read_recipe(file: Path, read: Callable[[Path], Recipe]) -> None:
        recipe = read(file)
        with contextlib.suppress(EvomergeError):
            check_layers(recipe, 2)
        (root / "out.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        (root / "out.yaml").unlink()

    def read_model(folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        for name, info in checkpoint.tensors.items():
            assert tuple(checkpoint.read(name).shape) == info.shape
        with contextlib.suppress(EvomergeError):
            models = open_models(family["base"], {"it": folder}, strict=False, vocabulary="union")
            (root / "written").mkdir()
            try:
                if models.vocabulary:
                    models.vocabulary.write(root / "written")
            finally:
                for left in sorted((root / "written").iterdir()):
                    left.unlink()
                (root / "written").rmdir()

    def read_adapter(folder: Path) -> None:
        opened = open_adapter(folder, base)
        for name in opened.changes:
            opened.read(name)
        open_models(family["base"], {"it": folder})

    def read_task() -> None:
        opened = open_tasks([TaskConfig(task=str(root / "tasks" / "task.yaml"))])
        evaluate_model(live.model, live.tokenizer, opened, 256, None, Clock())

    def read_verdict() -> None:
        if (verdict := run.verdict()) is not None:
            results_section(verdict)
            explanation(verdict)

    def read_state() -> None:
        if (snapshot := read_snapshot(run.folder)) is not None:
            for width in (60, 150):
                screen = Screen(file=io.StringIO(), width=width)
                screen.print(render(snapshot, 1e9, why_ended(snapshot, snapshot.beat)), render(snapshot))

    def read_card() -> None:
        head = yaml.safe_load(model_card(recipe).split("---\n")[1])
        assert set(head) <= {"library_name", "pipeline_tag", "tags", "license", "license_name", "base_model"}

    recipe = Recipe(
        method="linear", base=Model(path=str(whole)), sources=[RecipeSource(name="one", path=str(whole))],
        parameters={"weight": 1},
    )  # fmt: skip
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    return {
        "config": Target(root / "family" / "search.yaml", CONFIG, as_yaml, read_config),
        "recipe": Target(
            root / "family" / "recipe.yaml", RECIPE, as_yaml,
            lambda: read_recipe(root / "family" / "recipe.yaml", load_recipe),
        ),
        "mergekit": Target(
            root / "family" / "mergekit.yml", MERGEKIT, as_yaml,
            lambda: read_recipe(root / "family" / "mergekit.yml", lambda f: load_merge(f)[0]),
        ),
        "header": Target(whole / "model.safetensors", header, as_safetensors(data), lambda: read_model(whole)),
        "adapter header": Target(
            spoilt / "adapter_model.safetensors", lora_header, as_safetensors(lora_data), lambda: read_adapter(spoilt)
        ),
        "adapter config": Target(
            adapter / "adapter_config.json", json.loads((adapter / "adapter_config.json").read_text()), as_json,
            lambda: read_adapter(adapter),
        ),
        "index": Target(sharded / "model.safetensors.index.json", index, as_json, lambda: read_model(sharded)),
        "model config": Target(
            worded / "config.json", json.loads((worded / "config.json").read_text()), as_json,
            lambda: read_model(worded),
        ),
        "tokenizer": Target(
            worded / "tokenizer.json", json.loads((worded / "tokenizer.json").read_text()), as_json,
            lambda: read_model(worded),
        ),
        "tokenizer config": Target(
            worded / "tokenizer_config.json", json.loads((worded / "tokenizer_config.json").read_text()), as_json,
            lambda: read_model(worded),
        ),
        "card": Target(whole / "README.md", CARD, as_card, read_card),
        "task": Target(
            root / "tasks" / "task.yaml", TASK, as_yaml,
            read_task,
        ),
        "manifest": Target(run.manifest_file, MANIFEST, as_json, run.manifest),
        "verdict": Target(run.verdict_file, VERDICT, as_json, read_verdict),
        "state": Target(run.folder / STATE, STATE_CONTENT, as_json, read_state),
        "measurements": Target(
            root / "kept" / "a.safetensors", kept_header, as_safetensors(kept_data),
            lambda: load(root / "kept" / "a.safetensors"),
        ),
    }  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {os.path.join(where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files)}


@contextlib.contextmanager
def spoilt(target: Target, content: bytes) -> Iterator[None]:
    """The target's file with another content, for a while."""
    before = target.file.read_bytes() if target.file.exists() else None
    target.file.write_bytes(content)
    try:
        yield
    finally:
        if before is None:
            target.file.unlink()
        else:
            target.file.write_bytes(before)


def outcome(target: Target, content: bytes, watched: Path) -> str | None:
    """None if a content is read, else the message.  AssertionError if anything else comes of it.

    watched: the folder in which no file may appear or vanish.
    """
    with spoilt(target, content):
        there, started = files_in(watched), time.process_time()
        try:
            target.read()
            message = None
        except EvomergeError as error:
            message = str(error)
        seconds = time.process_time() - started
        assert seconds < SECONDS, f"took {seconds:.1f} s"
        assert files_in(watched) == there
    if message is not None:
        assert message.strip()
        assert "Traceback" not in message
        message.encode()  # it can be printed
    return message
