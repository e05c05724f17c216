"""`evomerge compare`: several runs in one table, their candidates paired on the holdout items that they share."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from searches import finished_search, run_cli, verdict_of, write_config

from evomerge.errors import EvomergeError
from evomerge.search.run import open_run
from evomerge.search.storage.item_scores import rows
from evomerge.search.verdict.across_runs import compare_runs

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def runs(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by name: two that differ in the method only, and one with another seed."""
    found = {}
    given: dict[str, dict[str, Any]] = {"first": {}, "linear": {"method": "linear"}, "seed": {"seed": 4}}
    for name, changes in given.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = folder / name
        splits = {"search": 12, "selection": 10, "holdout": 150}
        config = write_config(folder, tiny_family, budget={"trials": 9}, splits=splits, **changes)
        finished_search(config).rename(found[name])
    return found


def holdout(run: Path, task: str) -> dict[str, float]:
    recipe = verdict_of(run)["chosen"]["recipe"]
    return {
        row["item"]: row["score"]
        for row in rows(open_run(run).study())
        if (row["recipe"], row["split"], row["task"], row["metric"]) == (recipe, "holdout", task, "exact_match")
    }


def test_runs_on_the_same_items_are_paired_on_all_of_them(runs: dict[str, Path]) -> None:
    found = compare_runs([open_run(runs["first"]), open_run(runs["linear"])])
    (pair,) = found.pairs
    assert (pair.shared, pair.items) == (300, (300, 300))
    scores = [verdict_of(runs[name])["score"]["value"] for name in ("first", "linear")]
    assert pair.difference is not None
    assert pair.difference.value == pytest.approx(scores[0] - scores[1])
    assert pair.difference.low is not None
    assert pair.difference.low < pair.difference.value < (pair.difference.high or -1)
    assert "on 300 shared holdout items [" in pair.sentence


def test_runs_on_other_items_are_paired_on_those_that_both_have(runs: dict[str, Path]) -> None:
    (pair,) = compare_runs([open_run(runs["first"]), open_run(runs["seed"])]).pairs
    gaps = []
    for task in ("tiny_rev", "tiny_add"):
        a, b = holdout(runs["first"], task), holdout(runs["seed"], task)
        shared = sorted(a.keys() & b.keys())
        assert 0 < len(shared) < 150
        gaps.append(np.mean([a[i] - b[i] for i in shared]))
    assert pair.difference is not None
    assert pair.difference.value == pytest.approx(np.mean(gaps))
    assert f"on {pair.shared} shared holdout items of 300 and 300" in pair.sentence


def test_the_command_shows_every_run_and_every_pair(runs: dict[str, Path]) -> None:
    done = run_cli("compare", *runs.values())
    assert done.returncode == 0, done.stderr
    for name, run in runs.items():
        verdict = verdict_of(run)
        (row,) = [line for line in done.stdout.splitlines() if line.startswith(f"│ {name} ")]
        assert verdict["outcome"] in row
        assert f"{verdict['score']['value']:.3f}" in row
        assert verdict["recommended"] in row
    assert "of 3 runs found something better" in done.stdout
    assert sum(" and " in line and "shared holdout items" in line for line in done.stdout.splitlines()) == 3
    content = json.loads(run_cli("compare", *runs.values(), "--json").stdout)
    assert [run["run"] for run in content["runs"]] == list(runs)
    assert [(pair["first"], pair["second"]) for pair in content["pairs"]] == [
        ("first", "linear"), ("first", "seed"), ("linear", "seed"),
    ]  # fmt: skip


def test_a_run_without_a_verdict_or_without_its_study_is_in_the_table_and_in_no_pair(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    running, moved, same = tmp_path / "running", tmp_path / "moved", tmp_path / "same"
    for folder in (running, moved, same):
        shutil.copytree(runs["first"], folder)
    (running / "verdict.json").unlink()
    for file in moved.glob("study.db*"):
        file.unlink()
    found = compare_runs([open_run(folder) for folder in (runs["first"], running, moved, same)])
    assert [run.outcome is None for run in found.runs] == [False, True, False, False]
    sentences = {(pair.first, pair.second): pair.sentence for pair in found.pairs}
    assert set(sentences) == {("first", "moved"), ("first", "same"), ("moved", "same")}
    assert "moved: its study cannot be read" in sentences["first", "moved"]
    assert sentences["first", "same"] == "first and same: their candidates are the same recipe"


def test_tasks_that_differ_are_left_out_and_named(runs: dict[str, Path], tiny_family: Path, tmp_path: Path) -> None:
    content = verdict_of(runs["first"])
    content["tasks"]["tiny_add"]["metric"] = "answer_logprob"
    shutil.copytree(runs["first"], tmp_path / "other")
    (tmp_path / "other" / "verdict.json").write_text(json.dumps(content))
    (pair,) = compare_runs([open_run(runs["linear"]), open_run(tmp_path / "other")]).pairs
    assert pair.left_out == ["tiny_add"]
    assert pair.shared == 150
    assert pair.sentence.endswith("; not compared: tiny_add")


def test_what_cannot_be_compared_is_one_sentence(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match="two runs or more"):
        compare_runs([open_run(runs["first"])])
    with pytest.raises(EvomergeError, match="named twice"):
        compare_runs([open_run(runs["first"])] * 2)
    done = run_cli("compare", runs["first"], tmp_path)
    assert done.returncode == 2
    assert "not a run folder" in done.stderr
