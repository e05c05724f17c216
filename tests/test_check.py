"""`evomerge check`: what it warns of, and that it tells the truth about answers and scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from searches import run_cli, write_config

from evomerge.search.check.concerns import (
    forecast_concerns,
    form,
    holdout_concern,
    split_concerns,
    task_concerns,
)
from evomerge.search.check.forecast import Forecast
from evomerge.search.check.probe import Answered, ProbedItem, ProbedTask


def answered(text: str, metric: float, objective: float = -1.0, cut: bool = False) -> Answered:
    return Answered(text, text, cut, metric, objective)


def task_of(items: list[ProbedItem], kind: str = "generate_until", right: float | None = 1.0) -> ProbedTask:
    return ProbedTask("t", kind, "exact_match", "answer_logprob", right, items, 0.1)


def whats(task: ProbedTask) -> str:
    return " | ".join(f"{concern.what}: {concern.mend}" for concern in task_concerns(task))


@pytest.mark.parametrize(
    ("taken", "why"),
    [
        ("Paris ", "spaces"),
        ("paris", "upper and lower case"),
        ('"Paris".', "quotes or punctuation"),
        ("Paris, the capital", "text that follows it"),
        ("Parisian", None),
        ("London", None),
        ("Paris", None),
    ],
)
def test_how_an_answer_differs(taken: str, why: str | None) -> None:
    found = form(ProbedItem("p", "Paris", {}), taken)
    assert (found and found[0]) == why


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_two_texts_can_be_compared(gold: str, taken: str) -> None:
    found = form(ProbedItem("p", gold, {}), taken)
    assert found is None or gold != taken


def test_a_task_that_tells_no_models_apart() -> None:
    for score, words in ((0.0, "answer none of 4 items right"), (1.0, "answer all of 4 items right")):
        items = [ProbedItem("p", "g", {m: answered("x", score) for m in ("base", "a")}) for _ in range(4)]
        assert words in whats(task_of(items))
    mixed = [ProbedItem("p", "g", {"base": answered("x", 0.0), "a": answered("g", 1.0)}) for _ in range(4)]
    assert whats(task_of(mixed)) == ""


def test_cut_answers_are_named_with_their_model() -> None:
    items = [ProbedItem("p", "g", {"base": answered("g", 1.0), "a": answered("x y", 0.0, cut=True)}) for _ in range(4)]
    assert "4 of 4 answers of a were cut by `max_gen_toks`" in whats(task_of(items))


def test_a_single_odd_answer_is_no_concern() -> None:
    items = [ProbedItem("p", "G", {"base": answered("x", 0.0), "a": answered("G", 1.0, -0.1)}) for _ in range(11)]
    items.append(ProbedItem("p", "G", {"base": answered("x", 0.0), "a": answered("g", 0.0, -0.1)}))
    assert whats(task_of(items)) == ""


def test_an_objective_that_prefers_another_model_than_the_metric() -> None:
    items = [
        ProbedItem("p", "g", {"base": answered("x", 0.0, -0.1), "a": answered("g", float(n % 8 != 0), -2.0)})
        for n in range(16)
    ]
    assert "base is best by answer_logprob and a by exact_match" in whats(task_of(items))


def test_a_gold_answer_that_models_do_not_write() -> None:
    items = [
        ProbedItem("p", "7", {"base": answered("x", 0.0, -3.0), "a": answered("3+4=7", 1.0, -2.9)}) for _ in range(4)
    ]
    assert "where models answer right they do not write its gold answer" in whats(task_of(items))


def test_items_in_two_splits() -> None:
    splits = {"search": ["What is 1 + 1?", "b"], "selection": ["c"], "holdout": ["what is  1+1", "d"]}
    (found,) = split_concerns({"t": splits})  # type: ignore[dict-item]
    assert "1 items of search are in holdout too" in found.what
    assert not list(split_concerns({"t": {"search": ["a", "b"], "selection": ["c"], "holdout": ["d"]}}))


def test_the_gain_that_the_holdout_can_show_is_that_of_the_verdict() -> None:
    """Half of the answers change: 0.10 needs 300 items (see docs/reference/configuration.md, between 242 and more)."""
    items = [
        ProbedItem("p", "g", {"base": answered("x", 0.0), "a": answered("g", 1.0), "b": answered("x", float(n % 2))})
        for n in range(16)
    ]
    probed = [task_of(items)]
    assert not list(holdout_concern(probed, {"t": 100_000}, {"t": 1.0}))
    (found,) = holdout_concern(probed, {"t": 100}, {"t": 1.0})
    least = 2.487 * (np.var([0.0, 1.0]) / 100) ** 0.5
    assert f"a gain of {least:.2f} of the mean metric" in found.what


FORECAST = Forecast(10.0, {"t": 9.0}, 1.0, 30.0, 20.0, 50.0, 1000.0, None, 10, 100)


def test_too_little_time_and_too_little_disk() -> None:
    assert FORECAST.candidates == 90
    assert not list(forecast_concerns(FORECAST))
    (short,) = forecast_concerns(replace(FORECAST, limit=150.0))
    assert (short.what, short.mend[:16]) == ("the time limit leaves room for about 5 candidates", "give it 5m or mo")
    (full,) = forecast_concerns(replace(FORECAST, disk=1000))
    assert "of disk" in full.what


def test_a_check_shows_the_answers_and_scores_of_evaluate(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    found = json.loads(run_cli("check", config, "--json", "--items", "6").stdout)
    task = found["tasks"][0]
    assert [task["name"], len(task["items"]), list(task["items"][0]["answers"])] == [
        "tiny_rev",
        6,
        ["base", "rev", "add"],
    ]
    for item in task["items"]:
        assert item["gold"] == item["prompt"].removeprefix("rev ").removesuffix("=")[::-1]
        for answer in item["answers"].values():
            assert answer["metric"] == float(answer["text"] == item["gold"])
    done = run_cli("search", config, "--check", "--trials", "6", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "a trial takes at most" in done.stdout


def test_a_chat_template_that_is_missing_is_said_before_anything_is_computed(tiny_family: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(write_config(tmp_path, tiny_family).read_text())
    content["tasks"][0]["apply_chat_template"] = True
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(content))
    done = run_cli("search", tmp_path / "chat.yaml", "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "has no chat template; leave it out" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()
