"""A package of somebody else's adds a merge method, an objective and a sampler: examples/plugin."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from searches import ROOT, run_cli, write_config

from evomerge.search.storage.database import open_study, sqlite_url

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the plug-in is installed, without a network."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples" / "plugin", folder / "source")  # a build writes beside its source
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run(command, check=True)
    return folder / "site"


def evomerge(site: Path, *arguments: str | Path) -> None:
    """A command in a process that has the plug-in."""
    done = run_cli(*arguments, prelude=f"import sys; sys.path.insert(0, {str(site)!r})")
    assert done.returncode == 0, done.stderr


def test_a_search_uses_the_method_the_objective_and_the_sampler(
    installed: Path, tiny_family: Path, tmp_path: Path
) -> None:
    tasks = [
        {"task": str(ROOT / "evals" / "tiny" / f"{s}.yaml"), "objective": "clipped_logprob"} for s in ("rev", "add")
    ]
    changes = {
        "method": "equal_length",
        "space": {"weight": [0.0, 1.6], "lambda": 0.5, "granularity": "model"},
        "tasks": tasks,
        "sampler": {"name": "near-best", "sigma0": 0.1},
        "budget": {"trials": 9},
        "racing": False,
        "scale": "none",
    }
    config, run = write_config(tmp_path, tiny_family, **changes), tmp_path / "run"
    evomerge(installed, "search", config, "--run", run)
    verdict = json.loads((run / "verdict.json").read_text(encoding="utf-8"))
    assert [task["objective"] for task in verdict["tasks"].values()] == ["clipped_logprob"] * 2

    trials = open_study(sqlite_url(run / "study.db"), "small", create=False).trials  # to open the run needs the plug-in
    assert all(-5 <= trial.value <= 0 for trial in trials)
    last = [trial for trial in trials if "baseline" not in trial.user_attrs][-1]
    drawn, best = last.params, max(trials[: last.number], key=lambda t: t.value).params
    assert drawn != best
    assert all(abs(drawn[name] - best[name]) < 5 * 0.1 * 1.6 for name in drawn)

    evomerge(installed, "export", run, "--trial", str(last.number), "--out", tmp_path / "merged")
    base, rev, add, merged = (
        load_file(folder / "model.safetensors")
        for folder in (tiny_family / "base", tiny_family / "rev", tiny_family / "add", tmp_path / "merged")
    )
    recipe = yaml.safe_load((tmp_path / "merged" / "recipe.yaml").read_text(encoding="utf-8"))
    weights = [source["parameters"]["weight"] for source in recipe["sources"]]
    for name, b in base.items():
        vectors = [(x[name] - b).double() for x in (rev, add)]
        lengths = [float(d.norm()) for d in vectors]
        mean = sum(lengths) / 2
        scaled = [0.5 * w * mean / n * d for w, n, d in zip(weights, lengths, vectors, strict=True)]
        assert torch.allclose(merged[name].double(), b.double() + sum(scaled), atol=1e-5), name


def test_without_the_package_its_names_are_refused(tiny_family: Path, tmp_path: Path) -> None:
    for number, (change, name) in enumerate((
        ({"method": "equal_length"}, "equal_length"),
        ({"sampler": {"name": "near-best"}}, "near-best"),
        ({"tasks": [{"task": str(ROOT / "evals/tiny/rev.yaml"), "objective": "clipped_logprob"}]}, "clipped_logprob"),
    )):  # fmt: skip
        done = run_cli("search", write_config(tmp_path, tiny_family, **change), "--run", tmp_path / f"run{number}")
        assert done.returncode == 2
        assert name in done.stderr
