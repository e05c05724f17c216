"""The table of docs/explanation/choose-a-method.md: every method that takes four sources, on the tiny family.

Each method is tried with a few settings in which all sources are treated alike.  The setting that is best on the search
items of configs/quickstart.yaml is scored on its holdout items.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from merging import ROOT, TASKS, TINY, Items, Lab
from tables import print_table

from evomerge.config.config_file import load_config
from evomerge.merge.methods import METHODS
from evomerge.search.evaluation.task_set import open_task_set

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
WEIGHTS = (0.25, 0.5, 0.8, 1.0, 1.3)
LAMBDAS = (1.0, 1.5, 2.0, 3.0, 4.0)
SPARSE = (0.2, 0.5, 0.8)  # densities

Setting = tuple[str, dict[str, float], dict[str, Any]]
"""What it is called; the coefficients of every source; those of the merge."""


def settings(method: str) -> Iterator[Setting]:
    """What is tried of a method: a scale of all task vectors, and where there is a density some of them."""
    knobs = METHODS[method].knobs
    normalizes = "normalize" in knobs and bool(knobs["normalize"].default)
    own = {n: 1.0 for n, k in knobs.items() if k.each and k.default is None}
    by_lambda = "lambda" in knobs and (normalizes or "weight" not in knobs)
    for scale in LAMBDAS if by_lambda else WEIGHTS if "lambda" in knobs else (1.0,):
        shared = {"lambda": scale} if by_lambda else {}
        each = own if by_lambda or "lambda" not in knobs else {"weight": scale}
        name = f"lambda {scale:g}" if by_lambda else f"weights {scale:g}" if "lambda" in knobs else ""
        if "density" in knobs:
            yield from ((f"{name}, density {d:g}", each | {"density": d}, shared) for d in SPARSE)
        elif "select_topk" in knobs:
            yield from ((f"select_topk {d:g}", each, {"select_topk": d}) for d in (0.2, 0.5, 1.0))
        else:
            yield name or "-", each, shared


def gather(kind: str, task: str, folder: Path) -> Path:
    """The statistics file of a source, of the search items of its own task."""
    file = folder / f"{task}.{kind}"
    command = ["--kind", kind, "--model", TINY / task, "--task", ROOT / "evals" / "tiny" / f"{task}.yaml"]
    program = [sys.executable, "-m", "evomerge", "statistics", *command, "--search", QUICKSTART, "--out", file]
    subprocess.run(program, check=True, capture_output=True)
    return file


def compare(scratch: Path) -> None:
    """Print the table."""
    lab, task_set = Lab(), open_task_set(load_config(QUICKSTART))
    items: dict[str, dict[str, Items]] = {
        split: {t: [(i.doc["prompt"], i.doc["answer"]) for i in found] for t, found in task_set.split(split).items()}
        for split in ("search", "holdout")
    }

    def mean(split: str) -> tuple[float, list[float]]:
        each = [lab.score(found)[0] for found in items[split].values()]
        return float(np.mean(each)), each

    rows = []
    for method, about in METHODS.items():
        if about.sources[1] is not None:
            continue
        files = {task: gather(about.statistics, task, scratch) for task in TASKS} if about.statistics else {}
        tried = []
        for name, each, shared in settings(method):
            lab.merge(method, {task: dict(each) for task in TASKS}, statistics=files, **shared)
            tried.append((mean("search")[0], name, mean("holdout")))
        _, name, (whole, each_task) = max(tried, key=lambda one: one[0])
        rows.append([f"`{method}`", name, *each_task, whole])
        print(rows[-1], flush=True)
    print_table(["method", "best setting on the search items", *items["search"], "mean"], rows)


def draw(folder: Path) -> None:
    """Print the table; there is no picture."""
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(scratch))
