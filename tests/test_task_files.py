"""Task files as users of lm-eval write them: old keys, includes, groups, missing splits; and `evaluate` on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval_tasks import metrics, write_task
from models import write_llama
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.open_tasks import open_tasks

DOCS = [{"q": f"{a}+{b}=", "c": [str(a + b), "0"], "g": 0} for a in range(1, 4) for b in range(1, 4)]
ASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "g",
    "metric_list": metrics("acc", "brier_score"),
}


def with_keys(file: Path, **keys: Any) -> Path:
    """The task file with these keys besides."""
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | keys))
    return file


def names_and_sizes(file: Path) -> list[tuple[str, int]]:
    return [(t.name, len(list(t.docs))) for t in open_tasks([TaskConfig(task=str(file))])]


@pytest.mark.parametrize("keys", [{"group": "old"}, {"group": ["old", "older"]}, {"tag": "new"}, {"tag": ["a", "b"]}])
def test_a_task_that_names_its_groups_is_that_task(keys: dict[str, Any], tmp_path: Path) -> None:
    assert names_and_sizes(with_keys(write_task(tmp_path, "sums", DOCS, **ASK), **keys)) == [("sums", 9)]


def test_a_chain_of_includes_is_one_task(tmp_path: Path) -> None:
    with_keys(write_task(tmp_path, "sums", DOCS, **ASK), group="old")
    (tmp_path / "second.yaml").write_text("include: sums.yaml\ntask: second\n")
    (tmp_path / "third.yaml").write_text("include: second.yaml\ntask: third\ntag: new\n")
    assert names_and_sizes(tmp_path / "third.yaml") == [("third", 9)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("group: all\ntask: [sums]\n", "is a group or a list of tasks; give the files of its tasks"),
        ("group: all\ntask:\n- {task: sums, dataset_path: json}\n", "is a group or a list of tasks"),
        ("group: all\n", "is a group or a list of tasks"),
        ("task: [sums]\n", "is a group or a list of tasks"),
        ("dataset_path: json\n", "has no `task:` name"),
    ],
)
def test_a_file_that_is_no_task_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(text)
    with pytest.raises(EvomergeError, match=f"all.yaml: {reason}"):
        open_tasks([TaskConfig(task=str(tmp_path / "all.yaml"))])


@pytest.mark.parametrize("key", ["test_split", "validation_split", "training_split", "fewshot_split"])
def test_a_split_that_the_data_lack_is_named(key: str, tmp_path: Path) -> None:
    file = write_task(tmp_path, "sums", DOCS, **(ASK | {"num_fewshot": 1, key: "dev"}))
    with pytest.raises(EvomergeError, match=f"sums.yaml: {key}: the data set has no split 'dev'; it has test"):
        open_tasks([TaskConfig(task=str(file))])


@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_target"])
def test_a_column_that_the_data_lack_is_named(key: str, tmp_path: Path) -> None:
    file = with_keys(write_task(tmp_path, "sums", DOCS, **ASK), **{key: "{{qq}}"})
    with pytest.raises(EvomergeError, match=rf"{key}: the data have no column 'qq'; did you mean q\?; they have q, c"):
        open_tasks([TaskConfig(task=str(file))])


def test_an_empty_data_file_is_named(tmp_path: Path) -> None:
    file = write_task(tmp_path, "sums", DOCS, **ASK)
    (data,) = tmp_path.glob("*.jsonl")
    data.write_text("")
    with pytest.raises(EvomergeError, match="its data file is empty"):
        open_tasks([TaskConfig(task=str(file))])


def test_a_misspelt_objective_has_a_hint(tmp_path: Path) -> None:
    file = write_task(tmp_path, "sums", DOCS, **ASK)
    with pytest.raises(EvomergeError, match=r"did you mean choice_logprob\?"):
        open_tasks([TaskConfig(task=str(file), objective="choice_logprb")])


def test_a_task_of_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evomerge.evaluate.open_tasks.load_named", lambda name: [])
    with pytest.raises(EvomergeError, match="empty: lm-eval finds no task in it"):
        open_tasks([TaskConfig(task="empty")])


# --- The command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose tokenizer has a chat template, and the task sums."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_llama(folder / "model", 1)
    template = "{% for m in messages %}.{{ m['role'][0] }}.{{ m['content'] }} {% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    write_task(folder, "sums", DOCS[3:], **ASK, train=DOCS[:3], training_split="train", fewshot_split="train")
    return folder


def scores_of(folder: Path, *options: str, task: str = "sums") -> dict[str, float]:
    out = folder / "scores.json"
    arguments = ["evaluate", str(folder / "model"), "--tasks", str(folder / f"{task}.yaml"), "--output", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", *options])
    if result.exception is not None:
        raise result.exception
    found: dict[str, float] = json.loads(out.read_text())[task]["metrics"]
    return found


@pytest.mark.parametrize("multiturn", [True, False])
def test_evaluate_with_a_chat_template_scores_as_lm_eval_does(multiturn: bool, folder: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = ["--num-fewshot", "2", "--apply-chat-template"] + ["--no-fewshot-as-multiturn"] * (not multiturn)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # lm-eval reads data files from where it stands
        theirs = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=["sums"],
            num_fewshot=2,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            apply_chat_template=True,
            fewshot_as_multiturn=multiturn,
            bootstrap_iters=0,
        )["results"]["sums"]  # fmt: skip
    ours = scores_of(folder, *options)
    assert ours["acc"] == theirs["acc,none"]
    assert ours["brier_score"] == pytest.approx(theirs["brier_score,none"], rel=1e-5)
    assert ours["brier_score"] != pytest.approx(scores_of(folder, "--num-fewshot", "2")["brier_score"], rel=1e-5)


def test_evaluate_runs_a_tasks_code_by_consent_alone(folder: Path) -> None:
    (folder / "code.py").write_text("def first_two(docs):\n    return docs.select(range(2))\n")
    (folder / "own.yaml").write_text("include: sums.yaml\ntask: own\nprocess_docs: !function code.first_two\n")
    with pytest.raises(EvomergeError, match="on the command line --allow-task-code"):
        scores_of(folder, task="own")
    scores_of(folder, "--allow-task-code", task="own")
    assert json.loads((folder / "scores.json").read_text())["own"]["items"] == 2
