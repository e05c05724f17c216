"""Tasks that are a Python function of the user's: a search by them, what is recorded of them, and what may go wrong."""

import importlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models import write_llama
from searches import KILL, ROOT, run_cli, trials_of, verdict_of, write_config
from small_models import new_model
from typer.testing import CliRunner

import evomerge
from evomerge.cli import app
from evomerge.config.config_file import load_config
from evomerge.config.tasks import PythonTask, TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.deal import deal
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.python_task import PythonSource, TaskCodeFailed, read_docs
from evomerge.evaluate.tasks import items_of
from evomerge.merge.recipe.recipe import load_recipe
from evomerge.search import agreements
from evomerge.search.agreements import refuse_task_code
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import EvaluationJob, Failure, TrialJob
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.run import Run, open_run
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.trial_record import record_of
from evomerge.statistics.gather import choose_items

EXAMPLES = ROOT / "examples" / "other_models"


def example(name: str) -> Any:
    """A module of the examples."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def write_example(folder: Path, kind: str, items: int = 150, **changes: Any) -> Path:
    """The models and items of an example, made as its script makes them, and its configuration with changes."""
    if kind == "images":
        example("make_images").make(folder, items)
    else:
        make = example("make")
        make.make(make.KINDS[kind], folder, items)
    content = yaml.safe_load((EXAMPLES / f"{kind}.yaml").read_text().replace(f"../../runs/{kind}/", ""))
    for name in ("scores.py", "image_scores.py"):
        (folder / name).write_text((EXAMPLES / name).read_text())
    content |= {"splits": {"search": 60, "selection": 30, "holdout": 50}, "budget": {"trials": 8}} | changes
    (folder / "search.yaml").write_text(yaml.safe_dump(content))
    return folder / "search.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search on the BERT classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreements, "agreements", lambda: folder / "agreed")
        evomerge.search(write_example(folder, "classifier"), run=folder / "run", show=False)
    return folder / "run"


def test_a_search_scores_a_classifier_as_its_function_does(run: Path) -> None:
    """The holdout scores of the base are those of the function on the model that transformers loads."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder, config = run.parent / "base", load_config(run / "config.yaml")
    model, tokenizer = BertForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for task in open_tasks(config.tasks):
        docs = [item.doc for item in deal(task, config.splits, config.seed)["holdout"]]
        right = example("scores").accuracy(model.eval(), docs, tokenizer)
        assert verdict_of(run)["holdout"]["base"][task.name]["value"] == pytest.approx(np.mean(right), abs=1e-9)
    assert "no learned start: task sea: its objective acc has no derivative" in (run / "log.txt").read_text()
    assert any(np.isnan(trial_scores(t)["sea"]["acc"]).any() for t in open_run(run).study().trials), "none raced"


def test_a_trial_is_repeated_bit_by_bit(run: Path) -> None:
    from evomerge.search.repeat import repeat

    number = len(open_run(run).study().trials) - 1
    assert repeat(Run(run), number).differing == 0


IN_THE_FIRST_RACE = (
    KILL
    + """
import evomerge.search.evaluation.evaluator as e
real = e.Evaluator.score_trial
e.Evaluator.score_trial = lambda self, recipe, normal, setup, race: die() if race else real(self, recipe, normal)
"""
)


@pytest.mark.more
def test_a_trial_that_was_killed_in_its_race_races_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreements, "agreements", lambda: tmp_path / "agreed")
    killed = run_cli("search", run.parent / "search.yaml", "--run", tmp_path / "run", prelude=IN_THE_FIRST_RACE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert run_cli("resume", tmp_path / "run").returncode == 0
    assert trials_of(tmp_path / "run") == trials_of(run)
    races = [[record_of(t).race for t in open_run(r).study().trials] for r in (tmp_path / "run", run)]
    assert races[0] == races[1]


def test_the_function_s_file_is_recorded_and_named_in_the_card(run: Path, tmp_path: Path) -> None:
    from evomerge.files.read import sha256

    digest = sha256(run.parent / "scores.py")
    assert json.loads((run / "run.json").read_text())["items"]["sea"]["code"] == digest
    evomerge.Run(run).export(tmp_path / "out", show=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"sea: accuracy of scores.py, SHA-256 {digest}" in card
    assert "from transformers import BertForSequenceClassification" in card


def test_a_changed_file_is_refused_as_other_inputs_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreements, "agreements", lambda: run.parent / "agreed")
    file = run.parent / "scores.py"
    before = file.read_bytes()
    file.write_bytes(before + b"\n# changed\n")
    try:
        with pytest.raises(EvomergeError, match="task sea: its Python file is another one now"):
            evomerge.resume(run, show=False)
    finally:
        file.write_bytes(before)


def test_a_stranger_s_run_runs_no_function_of_its_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreements, "agreements", lambda: run.parent / "nobody")
    with pytest.raises(EvomergeError, match=r"lets Python code of tasks run .*scores.py:accuracy.*--allow-task-code"):
        refuse_task_code(Run(run), Run(run).config())


def test_evaluate_takes_a_task_file_if_it_may_run_code(run: Path, tmp_path: Path) -> None:
    content = {"python": str(run.parent / "scores.py:accuracy"), "items": str(run.parent / "sky.jsonl"), "name": "sky"}
    (tmp_path / "sky.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(EvomergeError, match="runs Python code"):
        evomerge.evaluate(run.parent / "sky", tmp_path / "sky.yaml", show=False)
    found = evomerge.evaluate(run.parent / "sky", tmp_path / "sky.yaml", allow_task_code=True, show=False)
    assert found.tasks["sky"].metrics["score"] > 0.6


WRITES = """
def starts(model, items, tokenizer):
    ids = [tokenizer(item["question"], return_tensors="pt").input_ids for item in items]
    return [float(model(i).logits[0, -1].softmax(0)[tokenizer.convert_tokens_to_ids("a")]) for i in ids]
"""


def test_a_language_model_is_scored_by_both_kinds_of_tasks(tmp_path: Path) -> None:
    """One engine, the same scores as by each kind alone."""
    folder = write_llama(tmp_path / "llama")
    (tmp_path / "own.py").write_text(WRITES)
    (tmp_path / "items.jsonl").write_text("".join(f'{{"question": "{c} = "}}\n' for c in "abcdefg"))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"python": "own.py:starts", "items": "items.jsonl", "block": 3}))
    both = [ROOT / "evals" / "tiny" / "rev.yaml", tmp_path / "own.yaml"]
    together = evomerge.evaluate(folder, both, limit=12, allow_task_code=True, show=False).tasks
    for task in both:
        for name, found in evomerge.evaluate(folder, task, limit=12, allow_task_code=True, show=False).tasks.items():
            assert found.raw == together[name].raw
    assert len(together["starts"].raw["score"]) == 7


# What may go wrong


def source(folder: Path, code: str, **options: Any) -> PythonSource:
    """A task of three items by the function `f` of some code."""
    (folder / "own.py").write_text(code)
    (folder / "items.jsonl").write_text('{"x": 1}\n{"x": 2}\n\n{"x": 3}\n')
    return PythonSource(PythonTask(python=f"{folder / 'own.py'}:f", items=str(folder / "items.jsonl"), **options))


def scored(folder: Path, code: str, **options: Any) -> list[float]:
    """The item scores of a ViT, which has no tokenizer, by the function."""
    (task,) = open_tasks([TaskConfig(task=source(folder, code, **options).given)])
    with torch.random.fork_rng():
        engine = Engine(new_model("vit"), None, 64, language=False)
    found = engine.score(engine.prepare(task, items_of(task, task.docs), everything=True), Clock())
    return list(found[task.metric])


def test_blocks_random_numbers_and_the_mode_of_the_model(tmp_path: Path) -> None:
    code = """
import numpy, random, torch
def f(model, items):
    assert not model.training and not torch.is_grad_enabled() and len(items) <= 2
    model.train()
    items[0].clear()
    return numpy.array([torch.rand(1).item() + random.random() + numpy.random.rand()] * len(items))
"""
    state = torch.random.get_rng_state()
    found = scored(tmp_path, code, block=2)
    assert len(set(found)) == 1, "each call begins with the same random numbers"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scored(tmp_path, code, block=2) == found
    code = "import torch, numpy\ndef f(model, items): return [torch.tensor(0.5), numpy.float32(1), True]"
    assert scored(tmp_path, code) == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("change", ["model.double()", "[p.mul_(2) for p in model.parameters()]"])
def test_a_function_that_changes_the_model_is_refused(tmp_path: Path, change: str) -> None:
    """All later candidates would be scored with what it left."""
    with pytest.raises(EvomergeError, match="changed the model's weights, or their type or device") as caught:
        scored(tmp_path, f"def f(model, items):\n    {change}\n    return [1] * len(items)\n")
    assert not isinstance(caught.value, TaskCodeFailed), "which would fail one trial alone"


def test_mode_and_working_folder_are_as_before_after_a_call(tmp_path: Path) -> None:
    model, before = new_model("vit"), Path.cwd()
    task = source(tmp_path, "import os\ndef f(model, items): model.train(), os.chdir('/'); return [1] * len(items)")
    task.score(model, task.eval_docs, lambda kind: None, "all")
    assert not model.training
    assert Path.cwd() == before


def test_items_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"x": 1}\r\n{"x": 2}\r\n', encoding="utf-8-sig", newline="")
    assert read_docs(tmp_path / "items.jsonl") == [{"x": 1}, {"x": 2}]


def test_what_a_function_prints_is_not_in_the_json_of_check(run: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(model, items):\n    print('here')\n    return [0.5] * len(items)\n")
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["tasks"] = [{"task": {"python": str(tmp_path / "own.py:f"), "items": str(run.parent / "sea.jsonl")}}]
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(app, ["check", str(tmp_path / "search.yaml"), "--json", "--items", "2"])
    assert "here" in done.stderr
    assert json.loads(done.stdout)["tasks"][0]["name"] == "f"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1, 2]", r"task f: f of own.py returned 2 values for 3 items \(items 1 to 3 of 3\)"),
        ("[1, 2, float('nan')]", "returned nan for the item {'x': 3}"),
        ("[1, 'high', 3]", "returned 'high' for the item {'x': 2}; a number is needed"),
        ("0.5", "returned 0.5; it must return a list"),
        ("[i['y'] for i in items]", "failed on items 1 to 3 of 3: KeyError: 'y'\n  own.py, line 2, in f: return"),
        ("exit(0)", "failed on items 1 to 3 of 3: SystemExit"),
        ("None", "returned None"),
        ("__import__('numpy').ones((3, 2))", r"returned \[1.0, 1.0\] for the item"),
    ],
)
def test_wrong_numbers_and_errors_are_one_clear_message(tmp_path: Path, returned: str, message: str) -> None:
    with pytest.raises(EvomergeError, match=message.replace("{", r"\{")):
        scored(tmp_path, f"def f(model, items):\n    return {returned}\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def g(model, items): ...", "has no function 'f'"),
        ("def f(model): ...", r"f\(model\) must take \(model, items\)"),
        ("def f(model, items, other): ...", "must take"),
        ("def f(model, items:", r"cannot be imported: SyntaxError: .* \(line 1\)"),
        ("import no_such_package", "cannot be imported: ModuleNotFoundError: No module named"),
    ],
)
def test_a_file_without_a_usable_function_is_refused_when_it_is_opened(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(EvomergeError, match=message):
        source(tmp_path, code)


def test_a_function_may_ask_for_what_the_model_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="asks for the tokenizer, and the base model has none"):
        scored(tmp_path, "def f(model, items, tokenizer): return [0] * len(items)")
    with pytest.raises(EvomergeError, match="'perplexity' has a meaning of its own"):
        source(tmp_path, "def f(model, items): ...", metric="perplexity")


def test_what_needs_prompts_or_gold_answers_refuses_a_python_task(tmp_path: Path) -> None:
    given = source(tmp_path, "def f(model, items): return [0.5] * len(items)").given
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"python": given.python, "items": given.items}))
    config = TaskConfig(task=str(tmp_path / "own.yaml"), num_fewshot=2, allow_task_code=True)
    with pytest.raises(EvomergeError, match="num_fewshot has no meaning for a Python task"):
        open_tasks([config])
    with pytest.raises(EvomergeError, match="task f: statistics need gold answers"):
        choose_items(open_tasks([config.model_copy(update={"num_fewshot": 0})]), 8, None)


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda task: task["task"].pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("items"), r"tasks.0.task.items: missing"),
        (lambda task: task["task"].update(itmes="x"), "tasks.0.task.itmes: unknown key; did you mean items?"),
        (lambda task: task["task"].update(items="none.jsonl"), "tasks.0.task.items: no such file: .*none.jsonl"),
        (lambda task: task["task"].update(python="none.py:f"), "tasks.0.task.python: no such file: .*none.py"),
        (lambda task: task["task"].update(python="scores.py"), "tasks.0.task.python: String should match"),
        (lambda task: task.update(num_fewshot=2), "num_fewshot: has no meaning for a Python task"),
    ],
)
def test_problems_of_a_configuration_name_their_key(
    run: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = yaml.safe_load((run.parent / "search.yaml").read_text())
    change(content["tasks"][0])
    (run.parent / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(EvomergeError, match=message):
        load_config(run.parent / "wrong.yaml")


def test_an_error_in_the_function_ends_a_search_where_the_base_is_scored(run: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(model, items, tokenizer):\n    return [i['missing'] for i in items]\n")
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["tasks"] = [{"task": {"python": str(tmp_path / "own.py:f"), "items": str(run.parent / "sea.jsonl")}}]
    with pytest.raises(EvomergeError, match=r"KeyError: 'missing'\n  own\.py, line 2, in f"):
        evomerge.search(content, run=tmp_path / "run", show=False)


def test_an_error_in_a_trial_fails_that_trial(run: Path) -> None:
    """An error of the function, or a number that is not finite, which a broken candidate may cause."""
    config = load_config(run / "config.yaml")
    evaluator = Evaluator(config, open_config_models(config), open_task_set(config), log=lambda text: None)
    recipe = load_recipe(run / "winner.yaml")
    source = evaluator.task_set.tasks[0].lm
    for value, broken in ((float("nan"), True), ("high", False)):
        source.function = lambda model, items, tokenizer, value=value: [value] * len(items)
        found = evaluator.run(TrialJob(recipe, None))
        assert isinstance(found, Failure)
        assert found.broken is broken
        assert f"accuracy of scores.py returned {value!r} for the item" in found.reason
        with pytest.raises(EvomergeError, match="returned"):
            evaluator.run(EvaluationJob(recipe, "selection"))


# The other examples


@pytest.mark.slow
def test_an_embedding_model_is_searched_by_retrieval(tmp_path: Path) -> None:
    evomerge.search(write_example(tmp_path, "embeddings"), run=tmp_path / "run", show=False)
    holdout = verdict_of(tmp_path / "run")["holdout"]
    mean = {name: np.mean([t["value"] for t in tasks.values()]) for name, tasks in holdout.items()}
    assert mean["winner"] > mean["base"] + 0.1


@pytest.mark.slow
def test_a_t5_is_searched_by_what_it_writes_in_processes(tmp_path: Path) -> None:
    config = write_example(tmp_path, "translation", 200, device="cpu")
    evomerge.search(config, run=tmp_path / "run", workers=2, show=False)
    holdout = verdict_of(tmp_path / "run")["holdout"]
    mean = {name: np.mean([t["value"] for t in tasks.values()]) for name, tasks in holdout.items()}
    assert mean["winner"] > mean["base"] + 0.1


@pytest.mark.slow
def test_a_search_may_have_tasks_of_both_kinds(tiny_family: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(WRITES)
    (tmp_path / "items.jsonl").write_text("".join(f'{{"question": "rev {c}e = "}}\n' for c in "abcdefghijklmnopqrstu"))
    own = {"task": {"python": str(tmp_path / "own.py:starts"), "items": str(tmp_path / "items.jsonl")}}
    rev = {"task": str(ROOT / "evals" / "tiny" / "rev.yaml")}
    splits = {"search": 8, "selection": 6, "holdout": 7}
    config = write_config(tmp_path, tiny_family, tasks=[rev, own], splits=splits, budget={"trials": 7})
    evomerge.search(config, run=tmp_path / "run", show=False)
    assert set(verdict_of(tmp_path / "run")["tasks"]) == {"tiny_rev", "starts"}
    assert len(trials_of(tmp_path / "run")) == 7


@pytest.mark.slow
def test_a_vision_model_is_searched_by_images(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    evomerge.search(write_example(tmp_path, "images"), run=tmp_path / "run", show=False)
    holdout = verdict_of(tmp_path / "run")["holdout"]
    mean = {name: np.mean([t["value"] for t in tasks.values()]) for name, tasks in holdout.items()}
    assert max(mean[name] for name in mean.keys() - {"base"}) > mean["base"] + 0.05
    evomerge.Run(tmp_path / "run").export(tmp_path / "out", show=False)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
