"""Searches whose sources are merges of their own, or have other tokenizers: the same trials as of plain folders."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from searches import BETWEEN_RESULT_AND_END, finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.search.run import open_run
from evomerge.search.storage.step_record import STEPS

BUDGET = {"trials": 14}
SAMPLER = {"name": "auto", "steps": 4}


def inner_recipe(family: Path) -> dict[str, Any]:
    return {
        "method": "slerp",
        "dtype": "float32",
        "base": {"path": str(family / "base")},
        "sources": [{"name": s, "path": str(family / s)} for s in ("rev", "add")],
        "parameters": {"t": 0.4},
    }


def step_points(run: Path) -> list[Any]:
    """The points of the learned start."""
    attributes = open_run(run).study().user_attrs
    return [attributes[key]["point"] for key in sorted(attributes) if key.startswith(STEPS)]


@pytest.fixture(scope="module")
def of_folders(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The search with the merge written to a folder beforehand."""
    folder = tmp_path_factory.mktemp("folders")
    (folder / "inner.yaml").write_text(yaml.safe_dump(inner_recipe(tiny_family)), encoding="utf-8")
    assert run_cli("merge", folder / "inner.yaml", "--out", folder / "both").returncode == 0
    sources = [{"name": "both", "path": str(folder / "both")}, {"name": "sort", "path": str(tiny_family / "sort")}]
    return finished_search(write_config(folder, tiny_family, sources=sources, sampler=SAMPLER, budget=BUDGET))


@pytest.fixture(scope="module")
def of_recipe(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The search with the merge as a recipe file, killed once and resumed."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "inner.yaml").write_text(yaml.safe_dump(inner_recipe(tiny_family)), encoding="utf-8")
    sources = [{"name": "both", "recipe": "inner.yaml"}, {"name": "sort", "path": str(tiny_family / "sort")}]
    config = write_config(folder, tiny_family, sources=sources, sampler=SAMPLER, budget=BUDGET)
    killed = run_cli("search", config, "--run", folder / "run", prelude=BETWEEN_RESULT_AND_END)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_cli("resume", folder / "run")
    assert resumed.returncode == 0, resumed.stderr
    return folder / "run"


def test_a_source_that_is_a_recipe_is_searched_like_the_folder_of_its_result(of_recipe: Path, of_folders: Path) -> None:
    assert trials_of(of_recipe) == trials_of(of_folders)
    assert step_points(of_recipe) == step_points(of_folders) != []
    here, there = verdict_of(of_recipe), verdict_of(of_folders)
    assert here["sentence"] == there["sentence"]
    assert here["holdout"] == there["holdout"]


def test_its_winner_is_exported_with_the_recipe_inside(of_recipe: Path, tmp_path: Path) -> None:
    done = run_cli("export", of_recipe, "--trial", "9", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    both = next(s for s in recipe["sources"] if s["name"] == "both")
    assert both["recipe"]["parameters"] == {"t": 0.4}
    assert both["recipe"]["sources"][0]["sha256"]
    again = run_cli(
        "reproduce", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "again", "--check", tmp_path / "out"
    )
    assert again.returncode == 0, again.stderr


def test_a_changed_inner_recipe_is_refused(of_recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(of_recipe.parent, tmp_path / "copy")
    file = tmp_path / "copy" / "inner.yaml"
    run = tmp_path / "copy" / "run"
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    manifest["origin"] = str(tmp_path / "copy" / "search.yaml")
    (run / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8").replace("t: 0.4", "t: 0.5"), encoding="utf-8")
    done = run_cli("resume", run, "--trials", "15")
    assert done.returncode == 2, done.stderr
    assert "sources.0.recipe.parameters.t: 0.4 -> 0.5" in done.stderr


def with_moved_tokens(model: Path, out: Path) -> Path:
    """The same model with its tokens in another order, and the rows of its embedding with them."""
    shutil.copytree(model, out)
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    ids: dict[str, int] = content["model"]["vocab"]
    kept = {t["content"] for t in content["added_tokens"]}
    plain = [token for token in ids if token not in kept]
    moved = dict(zip(plain, reversed([ids[token] for token in plain]), strict=True))
    rows = {ids[token]: new for token, new in moved.items()}
    content["model"]["vocab"] = ids | moved
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old, new = tensors[name], tensors[name].clone()
            for before, after in rows.items():
                new[after] = old[before]
            tensors[name] = new
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_other_tokenizers_are_searched_by_token(vocabulary: str, tiny_family: Path, tmp_path: Path) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    options: dict[str, Any] = {"sampler": {"name": "learned", "steps": 4}, "budget": BUDGET}
    expected = finished_search(write_config(plain, tiny_family, **options))
    moved = with_moved_tokens(tiny_family / "add", tmp_path / "moved")
    options["sources"] = [{"name": "rev", "path": str(tiny_family / "rev")}, {"name": "add", "path": str(moved)}]
    refused = run_cli("search", write_config(other, tiny_family, **options), "--run", other / "refused")
    assert refused.returncode == 2
    assert "another tokenizer" in refused.stderr
    found = finished_search(write_config(other, tiny_family, vocabulary=vocabulary, **options))
    assert trials_of(found) == trials_of(expected)
    assert step_points(found) == step_points(expected) != []
    assert verdict_of(found)["holdout"] == verdict_of(expected)["holdout"]


WRONG = {
    "no such file": ({"recipe": "none.yaml"}, "none.yaml"),
    "path and recipe": ({"recipe": {}, "path": "x"}, "sources.0"),
    "no recipe": ({"recipe": {"method": "tie"}}, "sources.0.recipe: not a recipe"),
    "neither": ({}, "sources.0: needs a `path` or a `recipe`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_of_a_source_is_one_error(case: str, tiny_family: Path, tmp_path: Path) -> None:
    given, line = WRONG[case]
    config = write_config(tmp_path, tiny_family, sources=[{"name": "a", **given}])
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_vocabulary_of_no_model_is_refused(tiny_family: Path, tmp_path: Path) -> None:
    done = run_cli("search", write_config(tmp_path, tiny_family, vocabulary="english"), "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "vocabulary: 'english' is not one (alone) of base, union, rev, add" in done.stderr
