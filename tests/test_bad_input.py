"""Hostile files, each found by thinking or by the fuzzer: one message, no hang, no code run, no secret shown."""

import json
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from badfiles import VERDICT
from lm_eval_tasks import metrics, write_task
from models import write_adapter, write_family, write_llama
from safetensors.torch import save_file
from searches import import_what_commands_need, run_cli, write_config

import evomerge
from evomerge.config.config_file import load_config, parse_config
from evomerge.config.config_file import write_config as store
from evomerge.config.database_url import expanded, has_password, masked
from evomerge.config.differences import config_differences
from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.prepared_items import read
from evomerge.evaluate.standalone import evaluate_model
from evomerge.files.read import read_json, read_text, read_yaml
from evomerge.files.write import write_text
from evomerge.merge.live import load_live_model
from evomerge.merge.recipe.pinned_inputs import with_fingerprints
from evomerge.merge.recipe.recipe import load_recipe
from evomerge.parse import DEPTH, YAML_NODES, parse_json, parse_yaml
from evomerge.report.verdict_text import results_section
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.inputs import check_unchanged, create_run
from evomerge.search.run import Run
from evomerge.sources.adapter import open_adapter
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.locate import looks_like_hub_id
from evomerge.sources.open_models import open_models
from evomerge.sources.tokenizer import open_tokenizer

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What a command imports on its way to a refusal, which takes seconds of its own."""
    import_what_commands_need()


def refusal(act: Callable[[], object]) -> str:
    """The message of the one error that may come, within a second of the processor's time."""
    started = time.process_time()
    with pytest.raises(EvomergeError) as caught:
        act()
    assert time.process_time() - started < 5
    return str(caught.value)


# Text


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * (DEPTH + 1), f"more than {DEPTH} levels deep (line 1, column {DEPTH + 1})"),
        ("{a: " * 100_000, f"more than {DEPTH} levels deep"),
        ("- " * 100_000, f"more than {DEPTH} levels deep"),
        (laughs(9), f"more than {YAML_NODES:,} values, aliases expanded"),
        ("[" + "1," * YAML_NODES + "]", f"more than {YAML_NODES:,} values"),
        ("a: &a [1, *a]", "an alias to a value that contains it (line 1"),
        ("a: &a {b: {<<: *a}}", "an alias to a value that contains it"),
        ("a: *b", "found undefined alias"),
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice (line 3, column 1)"),
        ("x: {1: a, 0x1: b}", "the key '0x1' occurs twice"),
        ("a: 1" + ":0" * 300_000, "a number of 600,001 digits"),  # base 60, in quadratic time
        ("a: !!int ''", "a value does not fit its type"),
        ("a: !!timestamp soon", "a value does not fit its type"),
        ("a: !!bool maybe", "a value does not fit its type"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("a: !function code.run", "could not determine a constructor for the tag '!function'"),
        ("a: b\n---\nc: d", "but found another document"),
        ("a: \0", "(character"),
    ],
    ids=lambda value: value[:20],
)
def test_yaml_that_is_too_much_is_refused_with_its_line(text: str, reason: str) -> None:
    message = refusal(lambda: parse_yaml(text, "file.yaml"))
    assert message.startswith("file.yaml: not YAML: ")
    assert reason in message


def test_aliases_and_merge_keys_within_bounds_are_yaml() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {deep: {d: &d {<<: *a, x: 9}}}\ne: {<<: *d}\nf: [*a, *a]"
    assert parse_yaml(text, "") == yaml.safe_load(text)
    assert parse_yaml("", "") is None
    assert parse_yaml("[" * DEPTH + "]" * DEPTH, "") is not None


def test_what_a_line_says_is_not_in_the_error() -> None:
    for text in (
        "storage: postgresql://me:hunter2@host/db: x\n",
        "storage: [postgresql://me:hunter2@host\n",
        "a: 'hunter2",
    ):
        assert "hunter2" not in refusal(lambda text=text: parse_yaml(text, "file.yaml"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, f"more than {DEPTH} levels deep"),
        ("[" * 200 + "]" * 200, f"more than {DEPTH} levels deep"),
        ('{"a":' * 70 + "1" + "}" * 70, f"more than {DEPTH} levels deep"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("9" * 5000, "not readable as JSON"),
        ("{", "not readable as JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_is_too_much_is_refused(text: str, reason: str) -> None:
    assert reason in refusal(lambda: parse_json(text, "file.json"))


def test_whole_characters_are_json() -> None:
    assert parse_json('["\\ud83d\\ude00"]', "") == ["\U0001f600"]
    assert parse_json('{"a": 1, "a": 2}', "") == {"a": 2}
    assert "the key 'a' occurs twice" in refusal(lambda: parse_json('{"a": 1, "a": 2}', "", unique=True))


@pytest.mark.parametrize("read", [read_yaml, read_json, read_text, load_config, load_recipe])
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "zero", "loop", ".", "a\0b", "x" * 300):
        assert "cannot be read" in refusal(lambda name=name: read(tmp_path / name))
    assert "no such file" in refusal(lambda: read(tmp_path / "gone"))


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b" " * ((4 << 20) + 1))
    assert "big: is larger than 4 MB" in refusal(lambda: read_yaml(tmp_path / "big"))
    (tmp_path / "big").write_bytes(b"\xff")
    assert "big: cannot be read" in refusal(lambda: read_yaml(tmp_path / "big"))


# Models


def write_header(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: list[Any], end: int, start: int = 0, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        (b"", 2**63, "fewer than its header needs"),
        (b"", 1000, "fewer than its header needs"),
        (b"[]", None, "its header is a list"),
        (b"{", None, "its header: not readable as JSON"),
        (b"[" * 100_000, None, "levels deep"),
        (b"\xff\xff", None, "its header is not UTF-8 text"),
        (b'{"a":1,"a":2}', None, "the key 'a' occurs twice"),
        ({"a": entry([-1], 1)}, None, "the shape of a is not a list of sizes"),
        ({"a": entry([1.0], 1)}, None, "the shape of a is not a list of sizes"),
        ({"a": None}, None, "the shape of a is not a list of sizes"),
        ({"a": entry([2**62, 2**62], 1)}, None, "a has a shape that no tensor has"),
        ({"a": entry([0, 2**64 - 1], 0)}, None, "a has a shape that no tensor has"),  # empty, and torch counts strides
        ({"a": entry([1] * 9, 1)}, None, "a has a shape that no tensor has"),
        ({"a\0b": entry([1], 1)}, None, "'a\\x00b' is not a valid name of a tensor"),
        ({"x" * 600: entry([1], 1)}, None, "is not a valid name of a tensor"),
        ({"a": entry([2], 2), "b": entry([2], 3, 1)}, None, "not a complete safetensors file"),
        ({"a": entry([1], 2)}, None, "not a complete safetensors file"),
        ({"a": entry([1], 1, dtype="F128")}, None, "not a complete safetensors file"),
        ({"a": entry([2], 1, dtype="F4")}, None, "tensor a has the type F4, which cannot be merged"),
        ({"model.layers.99999999999.x": entry([3], 3)}, None, "has a tensor of layer 99,999,999,999"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, header: Any, length: int | None, reason: str) -> None:
    folder = write_llama(tmp_path / "llama")
    write_header(folder / "model.safetensors", header, b"123", length)
    if isinstance(header, dict) and reason.startswith("tensor"):
        write_header(folder / "model.safetensors", header, b"1", length)
    assert reason in refusal(lambda: open_checkpoint(folder))


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 40 << 20))
        file.truncate(50 << 20)
    assert "its header is larger than 32 MB" in refusal(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pipe_among_a_models_files_does_not_make_one_wait(tmp_path: Path, name: str) -> None:
    folder = write_llama(tmp_path / "llama")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "llama" in refusal(lambda: open_models(folder, {"it": write_llama(tmp_path / "it", 1)}))


def test_files_of_the_hubs_cache_are_links_and_are_read(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert open_checkpoint(tmp_path / "snapshot").tensors.keys() == open_checkpoint(folder).tensors.keys()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "../x", "/etc/passwd", "..", "", None, {"a": 1}])
def test_an_index_names_plain_files(tmp_path: Path, name: Any) -> None:
    folder = write_llama(tmp_path / "llama", shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    assert "model.safetensors.index.json: names" in refusal(lambda: open_checkpoint(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", ["llama"]), ("num_hidden_layers", 10**12), ("num_hidden_layers", "2"), ("auto_map", "x.Y")],
)
def test_a_model_config_of_wrong_types_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_llama(tmp_path / "llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))
    assert f"config.json: {key} must be a " in refusal(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("number", [-1, 2**40, "1", 1.5, None, True])
def test_the_id_of_a_token_is_a_small_number(tmp_path: Path, number: Any) -> None:
    folder = write_llama(tmp_path / "llama")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": number}))
    assert "vocab.json: the id of 'a' is" in refusal(lambda: open_models(folder, {}))


def custom_code(folder: Path, ran: Path) -> Path:
    """A model whose configuration and tokenizer name Python code that lies beside them."""
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
    (folder / "own.py").write_text(code + "class Config: pass\nclass Model: pass\nclass Tokens: pass\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    for file, change in (
        ("config.json", {"model_type": "its_own", "auto_map": own}),
        ("tokenizer_config.json", {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["own.Tokens", None]}}),
    ):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | change))
    return folder


def test_code_beside_a_model_is_not_run_and_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "y")  # transformers would ask, and run it
    folder = custom_code(write_llama(tmp_path / "llama"), tmp_path / "ran")
    message = refusal(lambda: load_live_model(folder, torch.float32, torch.device("cpu")))
    assert "needs Python code of its own, `auto_map` in config.json, which evomerge never runs" in message
    models = open_models(folder, {"it": custom_code(write_llama(tmp_path / "it", 1), tmp_path / "ran")})
    assert "it: its configuration names Python code of its own (`auto_map`)" in " ".join(models.compatibility.notes)
    assert not (tmp_path / "ran").exists()


# Adapters


def adapter_refusal(tmp_path: Path, **config: Any) -> str:
    base = write_llama(tmp_path / "base")
    folder = write_adapter(tmp_path / "it", base, **config)
    return refusal(lambda: open_adapter(folder, open_checkpoint(base)))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10**400, 1e30, "8", True, [8], {"a": 1}])
def test_an_alpha_is_a_number(tmp_path: Path, alpha: Any) -> None:
    assert "lora_alpha must be a finite number" in adapter_refusal(tmp_path, lora_alpha=alpha)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (["q_proj"], "alpha_pattern must be a mapping"),
        ({"q_proj": "8"}, "alpha_pattern.q_proj: must be a finite number"),
        ({"(": 8}, "alpha_pattern.(: not a regular expression"),
        ({"x" * 2000: 8}, "a pattern of 2,000 characters"),
        ({"(.|.|.)*[A-Z]": 8}, "takes too long to match"),
    ],
)
def test_a_pattern_of_modules_can_be_matched(tmp_path: Path, pattern: Any, reason: str) -> None:
    assert reason in adapter_refusal(tmp_path, alpha_pattern=pattern)


@pytest.mark.parametrize("key", ["use_rslora", "fan_in_fan_out"])
def test_a_switch_of_an_adapter_is_true_or_false(tmp_path: Path, key: str) -> None:
    assert f"{key} must be true or false, found 'false'" in adapter_refusal(tmp_path, **{key: "false"})


def test_an_adapter_of_rank_zero_is_refused(tmp_path: Path) -> None:
    assert "has rank 0" in adapter_refusal(tmp_path, rank=0)


def test_target_modules_and_the_base_models_name_are_never_matched_or_opened(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    odd = {"target_modules": "(((a+)+)+)+$", "base_model_name_or_path": "../../../../dev/zero"}
    adapter = open_adapter(write_adapter(tmp_path / "it", base, **odd), open_checkpoint(base))
    assert adapter.may_differ(Q_PROJ)


def test_a_tensor_under_two_names_of_pefts_is_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    folder = write_adapter(tmp_path / "it", base, targets=["q_proj"])
    file = folder / "adapter_model.safetensors"
    module = "base_model.model." + Q_PROJ.removesuffix(".weight")
    twice = {f"{module}.lora_A{x}.weight": torch.ones(4, 16) for x in ("", ".default")}
    save_file(twice | {f"{module}.lora_B.weight": torch.ones(16, 4)}, file)
    assert "is there twice" in refusal(lambda: open_adapter(folder, open_checkpoint(base)))


# Names of files and models


@pytest.mark.parametrize("text", ["owner/model@../../x", "owner/..", "owner/model\n", "../x", "a/b/c"])
def test_a_hub_id_names_nothing_above_it(text: str) -> None:
    assert not looks_like_hub_id(text)


@pytest.mark.parametrize("path", ["a\0b", "./loop/x", "x" * 5000])
def test_a_path_that_cannot_be_is_refused_by_the_recipe(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    content = {"method": "uniform_soup", "base": {"path": path}, "sources": [{"name": "a", "path": path}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    said = refusal(lambda: with_fingerprints(load_recipe(tmp_path / "recipe.yaml")))
    assert "is no path" in said or "no such folder" in said


def test_a_pattern_of_checkpoints_does_not_list_the_whole_disk(tmp_path: Path) -> None:
    content = {"method": "uniform_soup", "base": {"path": "b"}, "sources": [{"checkpoints": "/*/*/*/*/*", "last": 1}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert "no more than 3 parts of a path may hold wildcards" in refusal(lambda: load_recipe(tmp_path / "recipe.yaml"))


# Tasks


def task_file(folder: Path, **changes: Any) -> Path:
    docs = [{"prompt": f"{a}=", "answer": a} for a in "abc"]
    ask = {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "output_type": "generate_until"}
    return write_task(folder, "plain", docs, **(ask | {"metric_list": metrics("exact_match")} | changes))


def task_refusal(file: Path, **config: Any) -> str:
    return refusal(lambda: open_tasks([TaskConfig(task=str(file), **config)]))


def test_a_template_is_no_way_to_run_python(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    template = "{{ cycler.__init__.__globals__.os.mkdir(" + repr(str(ran)) + ") }}"
    file = task_file(tmp_path, doc_to_text=template)
    assert "access to attribute '__init__' of 'type' object is unsafe" in task_refusal(file)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"use_prompt": "local.yaml:x"}, "use_prompt"),
        ({"dataset_path": "pandas"}, "dataset_path: pandas"),
        ({"dataset_kwargs": {"cache_dir": "/tmp/x"}}, "dataset_kwargs.cache_dir"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "dataset_kwargs.trust_remote_code"),
    ],
)
def test_what_can_run_code_or_write_elsewhere_needs_consent(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    assert f"runs Python code (`{key}`); read it; if it may run, set `allow_task_code" in task_refusal(
        task_file(tmp_path, **change)
    )


@pytest.mark.parametrize("name", ["../x\ny", "x" * 200, "\x1b[2J"])
def test_a_tasks_name_is_plain(tmp_path: Path, name: str) -> None:
    assert "cannot be a task's name" in task_refusal(task_file(tmp_path, task=name))


def test_a_format_without_files_is_not_the_current_folder(tmp_path: Path) -> None:
    assert "dataset_path is json, a format; name the files" in task_refusal(task_file(tmp_path, dataset_kwargs={}))
    assert "which contains the current folder" in task_refusal(task_file(tmp_path, dataset_path="/"))


def test_includes_are_bounded_and_stay_in_the_folder_once_included(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "outside.yaml").write_text("doc_to_text: x\n")
    (tmp_path / "inner" / "task.yaml").write_text("task: x\ninclude: ../outside.yaml\n")
    assert "outside.yaml" not in task_refusal(tmp_path / "inner" / "task.yaml")  # one's own file may go anywhere
    (tmp_path / "inner" / "task.yaml").write_text("task: x\ninclude: step.yaml\n")
    (tmp_path / "inner" / "step.yaml").write_text("include: ../outside.yaml\n")
    assert "is included itself, and includes" in task_refusal(tmp_path / "inner" / "task.yaml")
    for k in range(40):
        (tmp_path / f"{k}.yaml").write_text(f"include: {k + 1}.yaml\n")
    assert "more than 16 files that include each other" in task_refusal(tmp_path / "0.yaml")
    for name in ("3", "[[a]]", "{a: b}", '"a\\0b"', "/dev/zero"):
        (tmp_path / "task.yaml").write_text(f"task: x\ninclude: {name}\n")
        assert ": cannot be read" in (said := task_refusal(tmp_path / "task.yaml")) or "task.yaml: include: " in said


def test_filters_are_made_before_the_first_answer(tmp_path: Path) -> None:
    for steps in ({"function": "regex", "regex_pattern": []}, {"function": "regex", "colour": "red"}):
        file = task_file(tmp_path, filter_list=[{"name": "f", "filter": [steps]}])
        assert "lm-eval cannot open this task" in task_refusal(file)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"doc_to_text": ""}, "an item has an empty prompt"),
        ({"doc_to_text": "{{ 6 // (prompt == 'a=') }}"}, "no requests can be built of its items (ZeroDivisionError: "),
        ({"generation_kwargs": {"until": None, "max_gen_toks": 4}}, "needs stop strings in `until`"),
        ({"generation_kwargs": {"until": ["x"], "max_gen_toks": 0}}, "`max_gen_toks` above 0"),
    ],
)
def test_what_a_task_asks_wrongly_is_said_with_its_name(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    short = {"generation_kwargs": {"until": ["x"], "max_gen_toks": 4}}
    file, folder = task_file(tmp_path, **(short | change)), write_llama(tmp_path / "llama")
    model = load_live_model(folder, torch.float32, torch.device("cpu"))

    def score() -> object:
        tasks = open_tasks([TaskConfig(task=str(file))])
        return evaluate_model(model, open_tokenizer(folder), tasks, 256, None, Clock())

    assert reason in refusal(score)


def test_a_card_names_the_tasks_whose_code_ran() -> None:
    used = "This result used Python code of the task task (`allow_task_code`)."
    assert used in results_section(VERDICT)
    tasks = {name: task | {"code": False} for name, task in VERDICT["tasks"].items()}  # type: ignore[attr-defined]
    assert used not in results_section(VERDICT | {"tasks": tasks})


def test_a_task_says_whether_its_code_ran(tmp_path: Path) -> None:
    (plain,) = open_tasks([TaskConfig(task=str(task_file(tmp_path)), allow_task_code=True)])
    assert not plain.code
    (tmp_path / "code.py").write_text("def same(docs):\n    return docs\n")
    (tmp_path / "own.yaml").write_text((tmp_path / "plain.yaml").read_text() + "process_docs: !function code.same\n")
    (own,) = open_tasks([TaskConfig(task=str(tmp_path / "own.yaml"), allow_task_code=True)])
    assert own.code


# One reader, one sentence, the mend


def search_refusal(folder: Path, **changes: Any) -> str:
    """The message of a search with a configuration that is sound but for `changes`."""
    family = folder / "family"
    if not family.exists():
        write_family(family, ["rev", "add"])
    content = yaml.safe_load(write_config(folder, family).read_text()) | changes
    return refusal(lambda: evomerge.search(content, run=folder / "run", show=False))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"method": "task_arithmetics", "seed": -1, "sampler": {"name": "cma"}},
            ["seed: Input", "did you mean task_arithmetic?", "did you mean cma-es?"],
        ),
        (
            {"seed": -1, "tasks": [{"task": "rev.yaml", "objective": "gold_logprop", "metric": "exact_mach"}]},
            ["'gold_logprop' is not a metric that evomerge knows; did you mean gold_logprob?", "mean exact_match?"],
        ),
        ({"sampler": {"nam": "gp"}, "smapler": {}}, ["sampler.nam: unknown key; did you mean name?", "mean sampler?"]),
        ({"space": {"granularity": "layers", "weight": [0, 1]}}, ["(found 'layers'); did you mean layer?"]),
        ({"method": ["ties", "linaer"]}, ["'linaer' is not one of", "did you mean linear?"]),
        ({"method": ["ties", None]}, ["method: give the name of a method, or a list of names (found ['ties', None])"]),
        ({"method": []}, ["method: give the name of a method, or a list of names (found [])"]),
        ({"method": {"ties": {"weight": 1}}}, ["method: give the name of a method, or a list of names"]),
        ({"splits": {"serach": 0.5}}, ["splits.serach: unknown key; did you mean search?"]),
    ],
    ids=["method", "metric", "key", "value", "list", "nothing", "empty", "mapping", "split"],
)
def test_a_misspelt_name_is_said_with_all_else_and_with_the_nearest(
    tmp_path: Path, changes: dict[str, Any], lines: list[str]
) -> None:
    said = search_refusal(tmp_path, **changes)
    assert [line for line in lines if line not in said] == []
    assert not (tmp_path / "run").exists()


def test_a_metric_that_only_looks_misspelt_is_left_to_its_task(tmp_path: Path) -> None:
    said = search_refusal(tmp_path, tasks=[{"task": str(task_file(tmp_path)), "metric": "exact_mach"}])
    assert "is not one of its metrics" in said
    assert "did you mean exact_match?" in said


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_a_task_without_items_names_its_file(tmp_path: Path, content: str) -> None:
    file = task_file(tmp_path)
    data = Path(yaml.safe_load(file.read_text())["dataset_kwargs"]["data_files"]["test"])
    (file.parent / data).write_text(content)
    assert f"its data file is empty: {file.parent / data}; give it one item a line" in task_refusal(file)


def test_a_folder_without_a_model_names_the_one_in_it(tmp_path: Path) -> None:
    write_llama(tmp_path / "run" / "checkpoint-500")
    (tmp_path / "none").mkdir()
    base = write_llama(tmp_path / "base")
    said = refusal(lambda: open_models(base, {"run": tmp_path / "run"}))
    assert said.endswith(f"neither config.json nor adapter_config.json; {tmp_path / 'run' / 'checkpoint-500'} is one")
    assert refusal(lambda: open_models(base, {"none": tmp_path / "none"})).endswith("nor adapter_config.json")


def test_a_run_is_not_written_into_a_model(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_family(tmp_path / "family", ["rev", "add"])["base"].parent)
    said = refusal(lambda: evomerge.search(config, run=tmp_path / "family" / "rev", show=False))
    assert said == f"{tmp_path / 'family' / 'rev'}: holds a model; choose another --run folder"


def test_an_adapter_of_another_base_is_refused_and_of_a_fine_tune_doubted(tmp_path: Path) -> None:
    base, tuned = write_llama(tmp_path / "base"), write_llama(tmp_path / "tuned", 1, change=0.01)
    other = write_llama(tmp_path / "other", 1, change=1.0)
    copy = write_llama(tmp_path / "copy")

    def opened(declared: object) -> Any:
        name = f"adapter{len(list(tmp_path.iterdir()))}"
        adapter = write_adapter(tmp_path / name, base, base_model_name_or_path=str(declared))
        return open_models(base, {"it": adapter}, strict=False).compatibility

    (problem,) = opened(other).problems
    assert f"it: was trained on {other}, which is another model than the base here" in problem
    assert f"give `base: {other}`, or an adapter of this base" in problem
    (doubt,) = opened(tuned).doubts
    assert f"it: was trained on {tuned}, whose weights differ from the base's by" in doubt
    (doubt,) = opened("owner/other").doubts
    assert "If that is another model, its change does not fit: give `base: owner/other`" in doubt
    for same in (base, copy, "somebody/base"):
        assert (opened(same).problems, opened(same).doubts) == ([], [])


# Passwords

URL = "postgresql+psycopg://me:hunter2@host:5432/db"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me:a@b:c/d@host/db", "postgresql://me:***@host/db"),
        ("postgresql://host/db?user=me&password=hunter2&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("mysql+pymysql://me@host/db", "mysql+pymysql://me@host/db"),
        ("sqlite:////a/b:c@d.db", "sqlite:////a/b:c@d.db"),
        ("postgresql://me:${SECRET}@host/db", "postgresql://me:${SECRET}@host/db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert has_password(url) == (url != shown)


def test_variables_are_written_as_a_url_writes_them_and_must_be_set() -> None:
    url = "postgresql://me:${SECRET}@host/db"
    assert expanded(url, {"SECRET": "a@b/c:d"}) == "postgresql://me:a%40b%2Fc%3Ad@host/db"
    assert "storage: the environment variable 'SECRET' is not set" in refusal(lambda: expanded(url, {}))
    assert "hunter2" not in refusal(lambda: expanded("postgresql://me:hunter2${X}@host/db", {}))


def configuration(folder: Path, storage: str | None) -> SearchConfig:
    for name in ("base", "one"):
        if not (folder / name).exists():
            write_llama(folder / name)
    content = {
        "name": "n", "base": "base", "sources": [{"name": "one", "path": "one"}], "method": "task_arithmetic",
        "space": {"weight": [0, 1]}, "tasks": [{"task": str(task_file(folder))}], "storage": storage,
        "splits": {"search": 1, "selection": 1, "holdout": 1},
    }  # fmt: skip
    (folder / "search.yaml").write_text(yaml.safe_dump(content))
    return parse_config(content, folder / "search.yaml")


def test_differences_show_no_password(tmp_path: Path) -> None:
    old = configuration(tmp_path, URL)
    (line,) = config_differences(old, old.model_copy(update={"storage": URL.replace("host", "other")}))
    assert line == f"storage: {masked(URL)} -> {masked(URL).replace('host', 'other')}"
    (line,) = config_differences(old, old.model_copy(update={"storage": URL.replace("hunter2", "hunter3")}))
    assert line == f"storage: {masked(URL)} -> the same with another password"
    assert "hunter2" not in refusal(lambda: parse_config({"storage": [URL]}, tmp_path / "search.yaml"))


def test_only_the_owner_reads_a_configuration_with_a_password(tmp_path: Path) -> None:
    def mode(storage: str | None) -> int:
        store(tmp_path / "config.yaml", configuration(tmp_path, storage))
        return stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode)

    before = os.umask(0o022)
    try:
        assert mode(URL) == 0o600
        assert mode("postgresql://me:${SECRET}@host/db") == 0o644
        assert mode(None) == 0o644
        assert mode(URL) == 0o600  # over a file that all could read
        (tmp_path / "config.yaml.part").write_text("left over, and readable")
        assert mode(URL) == 0o600
    finally:
        os.umask(before)
    assert load_config(tmp_path / "config.yaml").storage == URL


def test_no_file_of_a_run_holds_what_a_variable_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, "sqlite:///" + str(tmp_path) + "/${SECRET}.db")
    task_set = open_task_set(config)
    monkeypatch.delenv("SECRET", raising=False)
    message = refusal(lambda: create_run(config, task_set, tmp_path / "search.yaml", tmp_path / "run"))
    assert "'SECRET' is not set" in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("SECRET", "hunter2")
    run = create_run(config, task_set, tmp_path / "search.yaml", tmp_path / "run")
    assert run.storage_url(run.config()) == f"sqlite:///{tmp_path}/hunter2.db"
    changed = (tmp_path / "search.yaml").read_text().replace("name: n", "name: n\nseed: 5")
    (tmp_path / "search.yaml").write_text(changed)
    check_unchanged(run, accept=True)
    assert "seed: 0 -> 5" in run.log_file.read_text()
    assert not [f for f in run.folder.rglob("*") if f.is_file() and b"hunter2" in f.read_bytes()]


def test_a_password_is_in_no_message_and_no_log_of_a_resume(tmp_path: Path) -> None:
    config = configuration(tmp_path, URL)
    task_set = open_task_set(config)
    run = create_run(config, task_set, tmp_path / "search.yaml", tmp_path / "run")
    (tmp_path / "search.yaml").write_text((tmp_path / "search.yaml").read_text().replace("host:5432", "elsewhere"))
    message = refusal(lambda: check_unchanged(run, accept=False))
    assert "me:***@elsewhere" in message
    assert "hunter2" not in message
    check_unchanged(run, accept=True)
    assert "hunter2" not in run.log_file.read_text()
    assert stat.S_IMODE(run.config_file.stat().st_mode) == 0o600
    holders = [f.name for f in run.folder.rglob("*") if f.is_file() and b"hunter2" in f.read_bytes()]
    assert holders == ["config.yaml"]  # a resume needs it


# What a run keeps


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 5000, '{"inputs": 3}', '{"inputs": {"base": 3}}', "\0"])
def test_a_manifest_that_cannot_be_read_stops_the_resume(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    assert "this run cannot be resumed" in refusal(Run(tmp_path).manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"score": 3},
        {"score": {"value": "1", "low": 0, "high": 1}},
        {"comparisons": [{}]},
        {"holdout": {}},
        {"tasks": []},
        {"chosen": {}},
        {"winner": [1]},
    ],
)
def test_a_verdict_that_cannot_be_shown_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT | change))
    assert "verdict.json: " in refusal(Run(tmp_path).verdict)
    (tmp_path / "verdict.json").write_text(json.dumps(VERDICT))
    assert Run(tmp_path).verdict() == VERDICT


def test_what_a_model_was_asked_is_asked_anew_if_the_file_is_damaged(tmp_path: Path) -> None:
    (task,) = open_tasks([TaskConfig(task=str(task_file(tmp_path)))])
    for text in ("", "[]\n", "3\n", '{"key": "k"}\n', "[" * 5000 + "\n", '{"key": "k", "metrics": true}\n3\n'):
        (tmp_path / "kept.jsonl").write_text(text)
        assert read(tmp_path / "kept.jsonl", "k", task, []) is None or '"metrics"' in text


# The command line


def test_the_command_line_says_one_line_and_ends_with_two(tmp_path: Path) -> None:
    family = write_family(tmp_path / "family", ["rev", "add"])
    (tmp_path / "bomb.yaml").write_text(laughs(9))
    os.mkfifo(tmp_path / "pipe.yaml")
    bad = write_llama(tmp_path / "bad")
    write_header(bad / "model.safetensors", {"a": entry([0, 2**64 - 1], 0)})
    own = custom_code(write_llama(tmp_path / "own"), tmp_path / "ran")
    adapter = write_adapter(tmp_path / "adapter", family["base"], alpha_pattern={"(.|.|.)*[A-Z]": 8})
    escapes = tmp_path / "escapes.yaml"
    escapes.write_text('{method: "\\e[2J", base: {path: b}, sources: [{name: a, path: b}]}')
    search = write_config(tmp_path, tmp_path / "family", storage="postgresql://me:hunter2@${NOWHERE}/db")
    for arguments, word in (
        (["merge", tmp_path / "bomb.yaml", "--out", tmp_path / "out"], "aliases expanded"),
        (["merge", tmp_path / "pipe.yaml", "--out", tmp_path / "out"], "not an ordinary file"),
        (["merge", escapes, "--out", tmp_path / "out"], "\\x1b[2J"),
        (["search", tmp_path / "bomb.yaml"], "aliases expanded"),
        (["search", search, "--run", tmp_path / "run"], "the environment variable 'NOWHERE' is not set"),
        (["inspect", family["base"], bad], "a has a shape that no tensor has"),
        (["inspect", family["base"], adapter], "takes too long to match"),
        (["evaluate", own, "--tasks", task_file(tmp_path)], "which evomerge never runs"),
    ):
        done = run_cli(*arguments)  # type: ignore[arg-type]
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert done.stderr.startswith("error: ")
        assert word in done.stderr
        assert "hunter2" not in done.stderr + done.stdout
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_a_private_file_was_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: (seen.append(stat.S_IMODE(os.fstat(n).st_mode)), sync(n))[1])
    write_text(tmp_path / "secret", "text", private=True)
    assert seen[0] == 0o600
