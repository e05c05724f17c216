"""Commands that only read or refuse import none of the libraries that take seconds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from searches import ROOT, Done, finished_search, run_cli, write_config

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "peft", "gradio")
SHOWS = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr))
from evomerge.cli import main
sys.argv[0] = "evomerge"
main()
"""


@pytest.fixture(scope="module")
def config(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("light"), tiny_family, budget={"trials": 6})


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    return finished_search(config)


def fresh(*arguments: str | Path) -> tuple[Done, set[str]]:
    """A command in an interpreter of its own, and which of HEAVY it has imported."""
    command = [sys.executable, "-c", SHOWS, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said, _, last = done.stderr.rstrip().rpartition("\n")
    return Done(done.returncode, done.stdout, said), set(json.loads(last))


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["search", "--help"], ["play", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done, imported = fresh(*arguments)
    assert done.returncode == 0, done.stderr
    assert imported == set()


def test_completing_a_command_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_EVOMERGE_COMPLETE", "complete_bash")  # as the script of `--install-completion` asks
    monkeypatch.setenv("COMP_WORDS", "evomerge sear")
    monkeypatch.setenv("COMP_CWORD", "1")
    done, imported = fresh()
    assert (done.stdout.split(), imported) == (["search"], set())


@pytest.mark.parametrize("command", ["status", "studies", "items", "report"])
def test_a_command_that_reads_results_imports_nothing_heavy(command: str, run: Path, tmp_path: Path) -> None:
    options = {"studies": ["--storage", run], "items": [run, "--out", tmp_path / "items.csv"]}
    done, imported = fresh(command, *options.get(command, [run]))
    assert done.returncode == 0, done.stderr
    assert imported == set()


def test_migrate_imports_nothing_heavy(tmp_path: Path) -> None:
    genome = {"models": ["a/one", "a/two"], "merge_method": "linear"}
    (old := tmp_path / "genome.yml").write_text(yaml.safe_dump({"genome": genome, "tasks": ["any"]}), encoding="utf-8")
    done, imported = fresh("migrate", old, "--out", tmp_path / "search.yaml")
    assert done.returncode == 0, done.stderr
    assert imported == set()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"samplr": {}}, "samplr: unknown key"), ({"method": "tie"}, "'tie'"), ({"base": "/no/such/model"}, "/no/such")],
)
def test_a_wrong_configuration_is_refused_before_anything_heavy_is_imported(
    change: dict[str, object], word: str, config: Path
) -> None:
    wrong = config.with_name("wrong.yaml")
    wrong.write_text(yaml.safe_dump(yaml.safe_load(config.read_text(encoding="utf-8")) | change), encoding="utf-8")
    done, imported = fresh("search", wrong)
    assert done.returncode == 2
    assert word in done.stderr
    assert imported == set()


def test_what_transformers_has_been_asked_once_needs_no_import_of_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = run_cli("export", run, "--out", first)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "cache" / "evomerge" / "loads").iterdir()), "transformers was asked, and its answer is kept"
    done, imported = fresh("reproduce", first / "recipe.yaml", "--out", second, "--check", first)
    assert done.returncode == 0, done.stdout + done.stderr
    assert imported == {"torch"}


def test_an_answer_kept_for_one_model_is_not_taken_for_another(
    tiny_family: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, recipe = tmp_path / "base", tmp_path / "recipe.yaml"
    shutil.copytree(tiny_family / "base", base)
    content = {
        "recipe": 1,
        "method": "linear",
        "dtype": "float32",
        "base": {"path": str(base)},
        "sources": [{"name": "same", "path": str(base), "parameters": {"weight": 1.0}}],
    }
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = run_cli("merge", recipe, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    tensors = load_file(base / "model.safetensors")
    lost = next(name for name in tensors if "norm" in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, base / "model.safetensors")
    done = run_cli("merge", recipe, "--out", tmp_path / "part")
    assert done.returncode == 2
    assert lost in done.stderr
