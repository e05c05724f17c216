"""The public interface of `import evomerge`, and its page docs/reference/python.md."""

import asyncio
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from models import write_family, write_llama
from safetensors.torch import load_file
from searches import ROOT, finished_search, run_cli, trials_of, verdict_of, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import evomerge
from evomerge import EvomergeError
from evomerge.api.merge import plain

PAGE = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


# --- The names ---


def fresh(code: str) -> Any:
    """What code prints as JSON in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def test_the_import_loads_nothing_and_each_name_what_it_needs() -> None:
    heavy = ("torch", "transformers", "optuna", "lm_eval", "pydantic", "pandas")
    loaded = f"[name for name in {heavy} if name in sys.modules]"
    code = f"import json, sys, evomerge; first = {loaded}; evomerge.open_run, evomerge.search, evomerge.merge; "
    first, then = fresh(code + f"print(json.dumps([first, {loaded}]))")
    assert first == []
    assert set(then) == {"optuna", "pydantic"}


def test_importing_a_package_does_not_replace_the_function_of_its_name() -> None:
    code = """
import json, sys
import evomerge.search.run as run
import evomerge.merge.recipe.recipe, evomerge.evaluate, evomerge
from evomerge.search.run import Run
from evomerge import search
import evomerge.evaluate.racing as racing
same = [run is sys.modules["evomerge.search.run"], racing is sys.modules["evomerge.evaluate.racing"]]
same += [evomerge.search.run is run, evomerge.search is search, Run is run.Run]
print(json.dumps([same, [type(getattr(evomerge, n)).__name__ for n in ("search", "merge", "evaluate")]]))
"""
    assert fresh(code) == [[True] * 5, ["function"] * 3]


def test_the_page_documents_exactly_what_is_public() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(documented) == sorted(evomerge.__all__)
    assert set(evomerge.__all__) <= set(dir(evomerge))
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        evomerge.serach  # type: ignore[attr-defined] # noqa: B018


def callables() -> dict[str, Callable[..., Any]]:
    """Every public function, and every public method and property of the classes that are there for the public."""
    found: dict[str, Callable[..., Any]] = {}
    for name in evomerge.__all__:
        public = getattr(evomerge, name)
        if inspect.isfunction(public):
            found[name] = public
            continue
        if not public.__module__.startswith(("evomerge.api.", "evomerge.report.")):
            continue
        own = {k: v for k, v in vars(public).items() if not k.startswith(("_", "model_"))}
        members = {k: v.fget if isinstance(v, property) else v for k, v in own.items()}
        found |= {f"{name}.{k}": v for k, v in members.items() if inspect.isfunction(v)}
    return found


@pytest.mark.parametrize("name", sorted(callables()))
def test_public_functions_have_types_and_say_what_they_do(name: str) -> None:
    signature = inspect.signature(function := callables()[name])
    assert signature.return_annotation is not inspect.Signature.empty
    arguments = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    assert [p.name for p in arguments if p.annotation is inspect.Parameter.empty] == []
    assert (inspect.getdoc(function) or "").endswith(".")
    if name in evomerge.__all__ and name != "resume":  # whose arguments are those of search
        for argument in arguments:
            assert re.search(rf"^(\w+, )*{argument.name}(, \w+)*: ", inspect.getdoc(function) or "", re.MULTILINE)


def test_the_package_is_marked_as_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert "py.typed" in settings["setuptools"]["package-data"]["evomerge"]
    assert (ROOT / "evomerge" / "py.typed").is_file()


# --- Searching ---


def content_of(folder: Path, family: Path, **changes: Any) -> dict[str, Any]:
    """A small configuration as a dict, with paths as `Path`."""
    content: dict[str, Any] = yaml.safe_load(write_config(folder, family, **changes).read_text(encoding="utf-8"))
    return content | {"base": Path(content["base"])}


@pytest.fixture(scope="module")
def searched(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A search from a dict, and the same by the command line."""
    folder, seen = tmp_path_factory.mktemp("face"), []
    content = content_of(folder, tiny_family, budget={"trials": 10})
    run = evomerge.search(content, run=folder / "called", on_trial=seen.append, show=False)
    return SimpleNamespace(run=run, seen=seen, command=finished_search(folder / "search.yaml"))


def test_a_search_from_python_is_the_search_of_the_command(searched: SimpleNamespace) -> None:
    run, command = searched.run, searched.command
    assert trials_of(run.folder) == trials_of(command)
    assert (run.folder / "config.yaml").read_text() == (command / "config.yaml").read_text()
    assert verdict_of(run.folder) == verdict_of(command)
    files = [
        {f.name for f in folder.iterdir() if not f.name.startswith("study.db-")} for folder in (run.folder, command)
    ]
    assert files[0] == files[1]  # SQLite's own files beside the study are there while a connection is open


def test_every_finished_trial_is_reported(searched: SimpleNamespace) -> None:
    assert searched.seen == searched.run.trials
    assert [(t.number, t.value) for t in searched.seen] == [(n, v) for n, _, _, v in trials_of(searched.command)]
    assert searched.seen[0].baseline is not None
    assert all(t.seconds > 0 and t.params for t in searched.seen)
    stopped = [t for t in searched.seen if t.state == "stopped early"]
    assert {t.state for t in searched.seen} <= {"complete", "stopped early", "broken"}
    assert all(0 < t.evaluated < 1 for t in stopped)
    with pytest.raises(AttributeError, match="cannot assign"):
        searched.seen[0].value = 1.0


def test_a_run_tells_its_verdict_trials_and_recipe(searched: SimpleNamespace, tmp_path: Path) -> None:
    run, written = searched.run, verdict_of(searched.command)
    assert run.verdict.sentence == written["sentence"]
    assert run.verdict.comparisons[0].difference.value == written["comparisons"][0]["difference"]["value"]
    assert repr(run) == f"Run('{run.folder}'): {written['sentence']}"
    assert run.report_file.is_file()
    table = run.trials_dataframe()
    assert list(table["number"]) == list(range(10))
    assert list(table["params_weight.rev.depth0"]) == [t.params["weight.rev.depth0"] for t in run.trials]
    before = sorted(run.folder.iterdir())
    recipe = run.export(push="me/merged", dry_run=True, show=False)
    assert sorted(run.folder.iterdir()) == before
    assert recipe.outputs == run.export(tmp_path / "exported", show=False).outputs
    assert run_cli("export", searched.command, "--out", tmp_path / "by-command").returncode == 0
    for name in ("model.safetensors", "recipe.yaml"):
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "by-command" / name).read_bytes()
    assert recipe.outputs
    assert recipe.parameters == run.best_recipe.parameters
    assert [s.parameters for s in recipe.sources] == [s.parameters for s in run.best_recipe.sources]


@pytest.mark.parametrize("notebook", [False, True], ids=["script", "notebook"])
def test_an_interrupt_leaves_a_run_that_resumes(
    notebook: bool, tiny_family: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a notebook an event loop runs already in the thread that calls."""
    content, folder = content_of(tmp_path, tiny_family, budget={"trials": 8}), tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)

    def interrupt(trial: evomerge.Trial) -> None:
        if trial.number == 4:
            os.kill(os.getpid(), signal.SIGINT)

    def start() -> None:
        evomerge.search(content, run=folder, on_trial=interrupt, show=False)

    async def cell() -> None:
        start()

    with pytest.raises(KeyboardInterrupt, match=re.escape(f"evomerge.resume('{folder}')")):
        _ = asyncio.run(cell()) if notebook else start()
    assert signal.getsignal(signal.SIGINT) == before
    run = evomerge.open_run(folder)
    assert run.verdict is None
    assert repr(run).endswith("no verdict yet")
    assert run.best_recipe.method == "task_arithmetic"
    done = run.trials[:5]
    resumed = evomerge.resume(run, show=False)
    assert resumed.trials[:5] == done
    assert len(resumed.trials) == 8
    assert resumed.verdict is not None
    assert run.trials == resumed.trials
    assert capfd.readouterr() == ("", "")


def test_what_a_users_function_raises_ends_the_search_and_loses_nothing(tiny_family: Path, tmp_path: Path) -> None:
    def fail(trial: evomerge.Trial) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        evomerge.search(content_of(tmp_path, tiny_family), run=tmp_path / "run", on_trial=fail, show=False)
    assert evomerge.open_run(tmp_path / "run").trials[0].state == "complete"


def test_wrong_input_is_told_before_there_is_a_run_folder(tiny_family: Path, tmp_path: Path) -> None:
    content = content_of(tmp_path, tiny_family)
    for wrong, words in (
        ({"method": "tie"}, "configuration: 1 problem.*'tie' is not one of"),
        ({"base": "/no/such/model"}, "no such folder"),
        ({"samplr": {}}, "samplr: unknown key"),
    ):
        with pytest.raises(EvomergeError, match=f"(?s){words}"):
            evomerge.search(content | wrong, run=tmp_path / "run", show=False)
    with pytest.raises(EvomergeError, match="--trials: Input should be greater than or equal to 1"):
        evomerge.search(tmp_path / "search.yaml", run=tmp_path / "run", trials=0, show=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(EvomergeError, match="not a run folder"):
        evomerge.open_run(tmp_path)
    with pytest.raises(EvomergeError, match="not a run folder"):
        evomerge.resume(tmp_path)


def test_a_configuration_object_is_checked_like_a_file(tiny_family: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(write_config(tmp_path, tiny_family, base="/no/such/model").read_text(encoding="utf-8"))
    config = evomerge.SearchConfig.model_validate(content)
    with pytest.raises(EvomergeError, match="base: no such folder: /no/such/model"):
        evomerge.search(config, run=tmp_path / "run", show=False)


# --- Merging ---


def recipe_of(family: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """A linear merge of a family's two sources, with paths as `Path`."""
    sources = [{"name": n, "path": family[n], "parameters": {"weight": w}} for n, w in (("one", 0.3), ("two", 0.6))]
    return {"method": "linear", "dtype": "float32", "base": {"path": family["base"]}, "sources": sources} | changes


@pytest.mark.parametrize(
    ("dtype", "held", "tied"),
    [("float32", "float32", False), ("bfloat16", "bfloat16", True), ("bfloat16", "float32", False)],
)
def test_a_live_model_gets_what_the_folder_would_hold(dtype: str, held: str, tied: bool, tmp_path: Path) -> None:
    family = write_family(tmp_path, tied=tied)
    recipe = recipe_of(family, dtype=dtype)
    written = evomerge.merge(recipe, out=tmp_path / "merged", show=False)
    assert written.outputs["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=held)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    made = evomerge.merge(recipe, model=model, show=False)
    assert made.method == "linear"
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == addresses[name]
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def test_a_live_model_that_does_not_fit_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    family = write_family(tmp_path / "family")
    deep, wide = write_llama(tmp_path / "deep", layers=3), write_llama(tmp_path / "wide", padding=4)
    float16 = AutoModelForCausalLM.from_pretrained(family["base"], dtype="float16")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(float16.config)
    for model, words in (
        (float16, "is of type float16, which cannot hold .* dtype bfloat16; load the model in bfloat16 or float32"),
        (AutoModelForCausalLM.from_pretrained(deep, dtype="float32"), "weights of transformers' LlamaForCausalLM"),
        (
            AutoModelForCausalLM.from_pretrained(wide, dtype="float32"),
            r"the shape \(44, 16\), the recipe makes it \(40, 16\)",
        ),
        (empty, "on one device; they are on: meta"),
    ):
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(EvomergeError, match=words):
            evomerge.merge(recipe_of(family, dtype="bfloat16"), model=model, show=False)
        for name, p in model.named_parameters():
            assert p.is_meta or torch.equal(p, before[name])


def test_a_recipe_may_be_a_file_a_dict_an_object_or_mergekits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = write_family(tmp_path)
    monkeypatch.chdir(tmp_path)
    content = recipe_of({name: Path(name) for name in family}, method="task_arithmetic")
    kit_models = [{"model": n, "parameters": {"weight": w}} for n, w in (("one", 0.3), ("two", 0.6))]
    mergekit = {"merge_method": "task_arithmetic", "base_model": "base", "models": kit_models, "dtype": "float32"}
    evomerge.merge(content, out="first", mergekit="kit.yml", show=False)
    forms = ["first/recipe.yaml", Path("kit.yml"), mergekit, evomerge.Recipe.model_validate(plain(content))]
    for number, form in enumerate(forms):
        evomerge.merge(form, out=f"again-{number}", show=False)  # type: ignore[arg-type]
        made = Path(f"again-{number}/model.safetensors").read_bytes()
        assert made == Path("first/model.safetensors").read_bytes(), form


def test_a_merge_says_what_it_lacks(tmp_path: Path) -> None:
    recipe = recipe_of(write_family(tmp_path))
    with pytest.raises(EvomergeError, match="say what to write"):
        evomerge.merge(recipe)
    with pytest.raises(EvomergeError, match="give `model` alone"):
        evomerge.merge(recipe, out=tmp_path / "out", model=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(EvomergeError, match=r"recipe: not a recipe:\n.*'lineal' is not one of"):
        evomerge.merge(recipe | {"method": "lineal"}, out=tmp_path / "out")


# --- Evaluating, inspecting ---


def test_a_live_model_scores_as_its_folder_and_keeps_its_mode(
    tiny_family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ROOT / "evals" / "tiny" / "choice.yaml"
    on_disk = evomerge.evaluate(tiny_family / "sort", task, limit=12)
    assert "acc" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tiny_family / "sort", dtype="float32").train()
    model.model.norm.eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_family / "sort")
    in_memory = evomerge.evaluate(model, [task], tokenizer=tokenizer, limit=12, show=False)
    assert capsys.readouterr().out == ""
    assert in_memory.tasks == on_disk.tasks
    assert model.training
    assert not model.model.norm.training
    (result,) = in_memory.tasks.values()
    assert (result.items, len(result.raw["acc"])) == (12, 12)
    assert in_memory.compute_dtype == "float32"
    assert in_memory.seconds["forward"] > 0
    with pytest.raises(EvomergeError, match="needs its tokenizer"):
        evomerge.evaluate(model, task)
    for wrong, words in (
        ({"limit": 0}, "limit: must be at least 1, found 0"),
        ({"num_fewshot": -1}, "num_fewshot: .* greater than or equal to 0"),
        ({"dtype": "float8"}, "dtype: 'float8' is not one of float32, bfloat16, float16"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype: 'bfloat16' is not one of auto, float32"),
    ):
        with pytest.raises(EvomergeError, match=words):
            evomerge.evaluate(tiny_family / "sort", task, show=False, **wrong)  # type: ignore[arg-type]


def test_an_inspection_is_typed_and_prints_as_the_command(tiny_family: Path, tmp_path: Path) -> None:
    found = evomerge.inspect(tiny_family / "base", [tiny_family / "rev", str(tiny_family / "add")])
    assert found.mergeable
    assert found.layers > 0
    assert found.cosines["rev"]["rev"] == pytest.approx(1.0)
    assert found.cosines["rev"]["add"] == pytest.approx(found.cosines["add"]["rev"])
    assert found.distances["rev"]["mlp"] is not None
    assert found.distances["rev"]["mlp"] > 0
    printed = run_cli("inspect", tiny_family / "base", tiny_family / "rev", tiny_family / "add").stdout
    numbers = r"[\d.]+%|[+-]\d\.\d\d|\d+ layers|can be merged"
    assert re.findall(numbers, str(found)) == re.findall(numbers, printed)
    other = evomerge.inspect(tiny_family / "base", write_llama(tmp_path / "one"))
    assert not other.mergeable
    assert other.cosines == {}
    assert "problem: one: hidden_size is 16" in repr(other)


# --- The page ---


def test_the_example_of_the_page_runs(tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tiny_family)
    (tmp_path / "evals").symlink_to(ROOT / "evals")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/reference/python.md", "exec"), names)
    assert len(names["run"].trials) == 10
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "evals", "merged", "average"}
