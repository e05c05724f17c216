"""`evomerge new-task`: task files for own data, of which lm-eval gets prompts, choices and gold answers right."""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import run_cli

from evomerge.config.tasks import SplitsConfig, TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.deal import deal
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import Task
from evomerge.start.new_task import NewTask, new_task

Row = dict[str, Any]
words = st.text("abcdefg xyzäß'\"{}%,", min_size=1, max_size=12).map(str.strip).filter(bool)


def write(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "data.jsonl") -> Path:
    file = folder / name
    if name.endswith(".csv"):
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def opened(done: NewTask) -> Task:
    (task,) = open_tasks([TaskConfig(task=str(done.file))])
    return task


def gold_choices(task: Task) -> list[str]:
    return [task.lm.doc_to_choice(doc)[task.lm.doc_to_target(doc)] for doc in task.docs]


FORMS: dict[str, Callable[[list[str], int], Any]] = {
    "number from 0": lambda choices, right: right,
    "number from 1": lambda choices, right: right + 1,
    "letter": lambda choices, right: "ABCD"[right],
    "small letter": lambda choices, right: "abcd"[right],
    "text": lambda choices, right: choices[right],
}
rights = st.integers(0, 3)
chosen = st.lists(
    st.tuples(
        words, st.lists(words.filter(lambda w: len(w) > 1), min_size=4, max_size=4, unique=True), st.integers(0, 3)
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(given_rows=chosen)
def test_the_gold_choice_is_the_right_one_however_it_is_said(
    form: str, given_rows: list[tuple[str, list[str], int]]
) -> None:
    extra = [("last", ["aa", "bb", "cc", "dd"], 3), ("first", ["aa", "bb", "cc", "dd"], 0)]  # so that forms differ
    each = [*given_rows, *extra]
    rows = [{"question": q, "choices": c, "answer": FORMS[form](c, right)} for q, c, right in each]
    with TemporaryDirectory() as folder:
        task = opened(new_task(write(Path(folder), rows)))
        assert task.kind == "multiple_choice"
        assert gold_choices(task) == [c[right] for _, c, right in each]
        assert [task.lm.doc_to_text(doc) for doc in task.docs] == [q for q, _, _ in each]


def test_choices_may_be_columns(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "A": "one", "B": "two", "C": f"three {n}", "answer": "ABC"[n % 3]} for n in range(9)]
    done = new_task(write(tmp_path, rows, "data.csv"))
    assert done.columns.choices == ("A", "B", "C")
    assert gold_choices(opened(done)) == [row[row["answer"]] for row in rows]


def test_few_different_answers_are_classes(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": n % 2 + 1} for n in range(40)]
    done = new_task(write(tmp_path, rows))
    assert done.columns.labels == ("1", "2")
    assert gold_choices(opened(done)) == [str(row["label"]) for row in rows]


def score(task: Task, text: str, place: int = 0) -> float:
    """The metric of a text that a model may write."""
    from evomerge.evaluate.item_values import lm_eval_values
    from evomerge.evaluate.tasks import items_of

    item = items_of(task, task.docs)[place]
    built = task.lm.construct_requests(doc=item.doc, ctx="", metadata=(task.name, 0, 1))
    built.resps = [text]
    return float(lm_eval_values(task, [item], [[built]])[task.metric][0])


@pytest.mark.parametrize(
    ("answer", "taken", "right", "wrong"),
    [
        (" Paris ", None, ["Paris", "  Paris \n"], ["paris", "Paris."]),
        ("Paris", "first_line", ["Paris\nand more", "\n Paris  "], ["It is\nParis"]),
        (1200, None, ["1200", "It is 1,200", "3 and then 1200."], ["1200 and 3"]),
        ("yes", "none", ["yes"], [" yes"]),
    ],
)
def test_what_counts_of_a_written_answer(
    answer: Any, taken: str | None, right: list[str], wrong: list[str], tmp_path: Path
) -> None:
    rows = [{"question": f"q{n}", "answer": answer if n == 0 else f"{n}{n}"} for n in range(5)]
    task = opened(new_task(write(tmp_path, rows), taken=taken))
    assert [score(task, text) for text in right] == [1.0] * len(right)
    assert [score(task, text) for text in wrong] == [0.0] * len(wrong)


def test_a_line_break_typed_in_the_shell_is_one(tmp_path: Path) -> None:
    data = write(tmp_path, [{"question": f"q{n}", "answer": f"a{n}{n}"} for n in range(5)])
    done = run_cli("new-task", data, "--prompt", r"Q:\t{{question}}\nA: \\nabla")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "data.yaml").read_text())["doc_to_text"] == "Q:\t{{question}}\nA: \\nabla"
    assert new_task(data, tmp_path / "b.yaml", prompt=r"\n{{question}}").prompt == r"\nq0", "Python has its own escapes"


def test_questions_that_come_again_are_counted(tmp_path: Path) -> None:
    rows = [{"question": f"q{n % 7}", "answer": f"a{n}"} for n in range(10)]
    done = new_task(write(tmp_path, rows, "data.json"))
    assert (done.rows, done.repeated) == (10, 3)


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 5))
def test_rows_with_the_same_question_get_into_one_split(random: Random, seed: int) -> None:
    questions = [n if n < 50 else random.randrange(50) for n in range(80)]
    rows = [{"question": f"What is {q}?", "answer": f"a{n}"} for n, q in enumerate(questions)]
    with TemporaryDirectory() as folder:
        task = opened(new_task(write(Path(folder), rows)))
        dealt = deal(task, SplitsConfig(search=12, selection=6, holdout=12), seed)
    asked = {split: {item.doc["question"] for item in items} for split, items in dealt.items()}
    assert {split: len(items) for split, items in dealt.items()} == {"search": 12, "selection": 6, "holdout": 12}
    assert not asked["search"] & asked["holdout"]
    assert not asked["search"] & asked["selection"]
    assert not asked["selection"] & asked["holdout"]


def test_the_file_is_read_beside_its_data_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    done = new_task(write(tmp_path, [{"question": "q", "answer": "a"}]), tmp_path / "tasks" / "mine.yaml")
    assert yaml.safe_load(done.file.read_text())["dataset_kwargs"]["data_files"] == {"test": "../data.jsonl"}
    assert opened(done).name == "mine"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"question": "q", "answer": "a"}\n{"question"', {}, "data.jsonl, line 2: not readable as JSON"),
        ('{"question": "q", "answer": "a"}\n{"question": "r"}', {}, "row 2: has no 'answer'"),
        ('{"question": "q", "answer": "a"}', {"question": "qestion"}, "no column 'qestion'; did you mean question?"),
        (
            '{"one": "q", "two": "a", "three": "b"}',
            {},
            "which column is the question? Say it with --question; there are one",
        ),
        ('{"question": "q", "answer": "z", "choices": ["a", "b"]}', {}, "row 1: the answer 'z' is none of the choices"),
        ('{"my question": "q", "answer": "a"}', {"question": "my question"}, "rename it"),
        ("[1, 2]", {}, "expected a JSON object in each row"),
        ("", {}, "has no rows"),
    ],
)
def test_data_that_do_not_fit_are_one_clear_error(
    content: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(EvomergeError, match=re.escape(message)):
        new_task(file, **options)
    assert not file.with_suffix(".yaml").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    data = write(tmp_path, [{"question": "q", "answer": "a"}])
    data.with_suffix(".yaml").write_text("mine")
    done = run_cli("new-task", data)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert data.with_suffix(".yaml").read_text() == "mine"


def test_a_new_task_and_a_new_configuration_can_be_checked(tiny_family: Path, tmp_path: Path) -> None:
    """From own data to a look at the search, with an answer's case as the fault."""
    lines = (Path(__file__).parent.parent / "evals" / "tiny" / "rev.jsonl").read_text().splitlines()[:120]
    rows = [{"prompt": r["prompt"], "answer": r["answer"].upper()} for r in map(json.loads, lines)]
    data, config = write(tmp_path, rows), tmp_path / "mine.yaml"
    assert run_cli("new-task", data, "--out", tmp_path / "upper.yaml").returncode == 0
    models = [
        "--base",
        tiny_family / "base",
        "--source",
        tiny_family / "rev",
        "--source",
        f"other={tiny_family / 'sort'}",
    ]
    done = run_cli("init", *models, "--task", tmp_path / "upper.yaml", "--timeout", "10s", "--out", config)
    assert done.returncode == 0, done.stderr
    assert "upper (120 items)" in done.stdout
    content = yaml.safe_load(config.read_text())
    assert content["tasks"] == [{"task": "upper.yaml"}]
    assert [source["name"] for source in content["sources"]] == ["rev", "other"]

    done = run_cli("search", config, "--dry-run", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "answers of rev are wrong only by upper and lower case" in shown
    assert "give `ignore_case: true` beside the metric" in shown
    assert "the time limit leaves room for about 0 candidates" in shown
    assert not (tmp_path / "run").exists()

    again = run_cli("init", *models, "--task", tmp_path / "upper.yaml", "--timeout", "1h", "--out", config)
    assert again.returncode == 2
    assert "exists already" in again.stderr
