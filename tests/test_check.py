"""`evomerge check`: what it warns of, and that it tells the truth about answers and scores."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from searches import run_cli, write_config

import evomerge
from evomerge.search.check.answers import form, task_concerns
from evomerge.search.check.concerns import (
    forecast_concerns,
    guard_concerns,
    holdout_concern,
    least_gain,
    split_concerns,
)
from evomerge.search.check.forecast import Forecast
from evomerge.search.check.memory import Memory, memory_concerns
from evomerge.search.check.near_duplicates import Text, near_duplicates
from evomerge.search.check.probe import Answered, ProbedItem, ProbedTask
from evomerge.search.evaluation.guards import Guard
from evomerge.search.verdict.guards import judge_guard


def answered(text: str, metric: float, objective: float = -1.0, cut: bool = False) -> Answered:
    return Answered(text, text, cut, metric, objective, objective)


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
        ("It is Paris", "text that precedes it"),
        ("Parisian", None),
        ("London", None),
        ("Paris", None),
    ],
)
def test_how_an_answer_differs(taken: str, why: str | None) -> None:
    found = form(ProbedItem("p", "Paris", {}), taken)
    assert (found and found[0]) == why


@pytest.mark.parametrize("taken", ["1,234", "$1234", "1234.0", " 1234 €"])
def test_a_number_may_be_written_otherwise(taken: str) -> None:
    found = form(ProbedItem("p", "1234", {}), taken)
    assert found is not None
    assert found[0] == "how the number is written"
    assert form(ProbedItem("p", "1234", {}), "12345") is None


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_two_texts_can_be_compared(gold: str, taken: str) -> None:
    found = form(ProbedItem("p", gold, {}), taken)
    assert found is None or gold != taken


def test_a_task_that_tells_no_models_apart() -> None:
    for score, words in ((0.0, "answer none of 4 items right"), (1.0, "answer all of 4 items right")):
        items = [ProbedItem("p", "g", {m: answered("x", score) for m in ("base", "a")}) for _ in range(4)]
        assert words in whats(task_of(items))
    items = [ProbedItem("p", "g", {m: answered("x", 0.5) for m in ("base", "a")}) for _ in range(4)]
    assert "have the same exact_match on every item" in whats(task_of(items, right=None))
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
    task = task_of(items)
    assert "where models answer right they do not write its gold answer: give `gold` beside the task" in whats(task)
    assert "they write no space before the answer" in whats(replace(task, delimiter=" "))
    spaced = [ProbedItem("p", "7", {"base": answered(" 7", 1.0, -2.9)}) for _ in range(4)]
    assert "they write a space before the answer" in whats(task_of(spaced))


def test_items_in_two_splits() -> None:
    splits = {"search": ["What is 1 + 1?", "b"], "selection": ["c"], "holdout": ["what is  1+1", "d"]}
    (found,) = split_concerns({"t": {s: [Text(t, "x") for t in texts] for s, texts in splits.items()}})  # type: ignore[misc]
    assert "1 items of search are in holdout too" in found.what
    assert "'What is 1 + 1?'" in found.what
    other = {"search": ["a", "b"], "selection": ["c"], "holdout": ["d"]}
    assert not list(split_concerns({"t": {s: [Text(t, "x") for t in texts] for s, texts in other.items()}}))  # type: ignore[misc]


STORY = "A farmer sells twelve eggs at the market every day, and bakes muffins for her friends with four. What is left?"


@pytest.mark.parametrize(
    ("question", "answer", "alike"),
    [
        (STORY.replace("left", "left over"), "8", True),
        (STORY.replace("farmer", "gardener"), "8", True),
        (STORY.lower().replace(",", ""), "8", True),
        (STORY.replace("farmer", "gardener"), "9", False),  # it asks for something else
        (f"{STORY} She has 3 hens.", "8", False),
        ("How many eggs does the farmer keep if she sells twelve and bakes with four of them today?", "8", False),
    ],
)
def test_what_nearly_repeats_a_question(question: str, answer: str, alike: bool) -> None:
    found = near_duplicates({"search": [Text(STORY, "8")], "selection": [], "holdout": [Text(question, answer)]})
    assert bool(found.get(("search", "holdout"))) == alike


def test_near_duplicates_among_twenty_thousand_items_are_found_in_seconds() -> None:
    words = np.array([f"w{k}" for k in range(4000)])
    texts = [" ".join(row) for row in words[np.random.default_rng(0).integers(0, 4000, (20_000, 30))]]
    copies = [Text(f"please {text}", "x") for text in texts[:50]]
    started = time.process_time()
    found = near_duplicates(
        {
            "search": [Text(t, "x") for t in texts[:8000]],
            "selection": [Text(t, "x") for t in texts[8000:12_000]],
            "holdout": [*copies, *(Text(t, "x") for t in texts[12_000:])],
        }
    )
    assert time.process_time() - started < 10
    assert sorted(a.question for a, _ in found["search", "holdout"]) == sorted(texts[:50])
    assert not found.get(("search", "selection"))


def test_a_task_with_a_pattern_takes_no_longer_and_is_no_concern() -> None:
    texts = [
        Text(f"What is the sum of the two numbers {a} and {b} in words?", "x") for a in range(60) for b in range(60)
    ]
    found = near_duplicates({"search": texts[::2], "selection": [], "holdout": texts[1::2]})
    assert len(found.get(("search", "holdout"), [])) <= 1800  # those of the same numbers, in the other order


def test_memory_that_does_not_suffice() -> None:
    assert not list(memory_concerns(Memory(10, 20, 40, "cpu")))
    (slow,) = memory_concerns(Memory(10**10, 2 * 10**10, 2 * 10**10, "cpu"))
    assert "base and sources (20.0 GB) do not fit into the free memory (20.0 GB)" in slow.what
    (never,) = memory_concerns(Memory(3 * 10**10, 0, 2 * 10**10, "cuda"))
    assert "needs 30.0 GB of memory, 20.0 GB are free on the accelerator" in never.what


def test_the_gain_that_the_holdout_can_show_is_that_of_the_verdict() -> None:
    """Half of the answers change: 0.10 needs 300 items (see docs/reference/configuration.md, between 242 and more)."""
    items = [
        ProbedItem("p", "g", {"base": answered("x", 0.0), "a": answered("g", 1.0), "b": answered("x", float(n % 2))})
        for n in range(16)
    ]
    probed = [task_of(items)]
    assert not list(holdout_concern(least_gain(probed, {"t": 100_000}, {"t": 1.0})))
    (found,) = holdout_concern(least_gain(probed, {"t": 100}, {"t": 1.0}))
    least = 2.487 * (np.var([0.0, 1.0]) / 100) ** 0.5
    assert f"a gain of {100 * least:.1f} points or more, not one of 2 or 5 or 10" in found.what
    assert least_gain([task_of(items[:4])], {"t": 100}, {"t": 1.0}) is None


def test_a_guard_that_the_holdout_items_cannot_show_kept_and_what_would_be_enough() -> None:
    items = [
        ProbedItem("p", "g", {"base": answered("x", float(n % 2)), "a": answered("x", float(n % 2 and n > 1))})
        for n in range(16)
    ]
    guard = Guard("t", {"t": "exact_match"}, 0.05, "base")
    (found,) = guard_concerns([guard], [task_of(items)], {"t": 60})
    assert "guard t: 60 holdout items show a drop to within 0.084, and 0.05 is allowed" in found.what
    enough, allowed = re.findall(r"[\d.]+", found.mend)
    assert not list(guard_concerns([guard], [task_of(items)], {"t": int(enough)}))
    assert not list(guard_concerns([replace(guard, max_drop=float(allowed))], [task_of(items)], {"t": 60}))
    assert "max_drop" in next(guard_concerns([replace(guard, max_drop=0.0)], [task_of(items)], {"t": 60})).mend

    def kept(count: int) -> bool:
        """The verdict's word on a candidate of which one answer in ten is another one, as often better as worse."""
        changed = np.arange(count) % 20
        before = {"t": {"exact_match": np.where(changed == 0, 1.0, np.where(changed == 10, 0.0, 1.0))}}
        after = {"t": {"exact_match": np.where(changed == 0, 0.0, 1.0)}}
        return judge_guard(guard, before, after, 0).state == "kept"

    assert not kept(60)
    assert kept(int(enough))


FORECAST = Forecast(10.0, {"t": 9.0}, 1.0, 30.0, 20.0, 50.0, 1000.0, None, 7, 10, 100)


def test_too_little_time_and_too_little_disk() -> None:
    assert FORECAST.candidates == 90
    assert not list(forecast_concerns(FORECAST))
    (short,) = forecast_concerns(replace(FORECAST, limit=150.0))
    assert (short.what, short.mend[:16]) == ("the time limit leaves room for about 5 candidates", "give it 5m or mo")
    few = replace(FORECAST, limit=None, trials=20, steps=0.0)
    (counted,) = forecast_concerns(few)
    assert counted.what == "of 20 trials 7 are baselines, so 13 are left for candidates"
    assert not list(forecast_concerns(replace(few, trials=27)))
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
    plan = json.loads(run_cli("check", config, "--json", "--timeout", "90m", "--items", "2").stdout)["forecast"]
    assert (plan["limit"], plan["trials"]) == (5400.0, None)
    soon = (datetime.now() + timedelta(hours=2)).strftime("%H:%M")
    plan = json.loads(run_cli("check", config, "--json", "--until", soon, "--items", "2").stdout)["forecast"]
    assert 6600 < plan["limit"] <= 7200
    dry = run_cli("search", config, "--dry-run", "--until", soon)
    assert "in 2h 0m there is room for" in dry.stdout or "in 1h 59m there is room for" in dry.stdout
    done = run_cli("search", config, "--check", "--trials", "6", "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "a trial takes about" in done.stdout


def test_a_chat_template_that_is_missing_is_said_before_anything_is_computed(tiny_family: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(write_config(tmp_path, tiny_family).read_text())
    content["tasks"][0]["apply_chat_template"] = True
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(content))
    done = run_cli("search", tmp_path / "chat.yaml", "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "has no chat template; leave it out" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_search_after_a_check_opens_everything_once_and_finds_the_same(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evomerge.merge.live as live
    import evomerge.search.models as models

    opened: list[str] = []
    for module, name in ((live, "load_live_model"), (models, "open_models")):
        real = getattr(module, name)

        def counted(*a: object, real: Callable[..., object] = real, name: str = name, **k: object) -> object:
            opened.append(name)
            return real(*a, **k)

        monkeypatch.setattr(module, name, counted)
    config = write_config(tmp_path, tiny_family, budget={"trials": 8})
    looked = evomerge.search(config, run=tmp_path / "looked", check=True, show=False)
    assert sorted(opened) == ["load_live_model", "open_models"]
    plain = evomerge.search(config, run=tmp_path / "plain", show=False)
    assert [(t.params, t.value) for t in looked.trials] == [(t.params, t.value) for t in plain.trials]
