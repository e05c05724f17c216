"""Beside mergekit itself: the same merge of the same files, within a few units in the last place of float32.

Point EVOMERGE_MERGEKIT at a Python that has mergekit (0.1.5 was used) and run `pytest -m slow tests/test_mergekit.py`.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import write_family
from torch import Tensor

from evomerge.merge.bank import Bank
from evomerge.merge.card import model_card
from evomerge.merge.export import export
from evomerge.merge.recipe import Model, Recipe, RecipeSource
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.open import open_models

MERGEKIT = os.environ.get("EVOMERGE_MERGEKIT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MERGEKIT, reason="EVOMERGE_MERGEKIT does not name a Python with mergekit"),
]

# name: (method, whether mergekit lists the base as a model too, weights, all other knobs)
MERGES: dict[str, tuple[str, list[float], dict[str, Any]]] = {
    "linear": ("linear", [0.3, 0.9], {"normalize": True}),
    "linear, not normalised": ("linear", [0.3, 0.9], {"normalize": False}),
    "slerp": ("slerp", [], {"t": 0.3}),
    "slerp by layer": ("slerp", [], {"t": [0.2, 0.7]}),
    "task_arithmetic": ("task_arithmetic", [0.4, -0.2], {"lambda": 1.3}),
    "task_arithmetic, normalised": ("task_arithmetic", [0.4, 0.7], {"normalize": True}),
    "ties": ("ties", [0.4, 0.7], {"density": 1.0, "normalize": True}),
    "ties, trimmed": ("ties", [0.4, 0.7], {"density": 0.5, "normalize": True}),
    "ties, not normalised": ("ties", [0.4, 0.7], {"density": 0.5, "normalize": False, "lambda": 0.8}),
    "ties, a negative weight": ("ties", [0.7, -0.4], {"density": 0.5, "normalize": True}),
}

# Ties is the same to the last bit but one.  The others' sums are rounded in another order there (linear divides at
# the end, slerp finds the angle in float32), so each side is a unit or two off on its own.
UNITS = {"linear": 3, "slerp": 3, "task_arithmetic": 2, "ties": 1}
# mergekit gives these the first value of a gradient, evomerge the last.
AFTER_THE_STACK = ("model.norm.weight", "lm_head.weight")


def run_mergekit(config: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    file = folder / "mergekit.yaml"
    file.write_text(yaml.safe_dump(config))
    program = Path(str(MERGEKIT)).parent / "mergekit-yaml"
    finished = subprocess.run(
        [program, file, folder / "theirs", "--quiet"], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return tensors_in(folder / "theirs")


def tensors_in(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def units_apart(x: Tensor, y: Tensor, inputs: list[Tensor]) -> float:
    """The largest difference, in units in the last place of the largest number that went into each element."""
    largest = torch.stack([t.float().abs() for t in (*inputs, x, y)]).amax(0)
    exponent = torch.frexp(largest).exponent
    return float(((x.double() - y.double()).abs() / torch.ldexp(torch.tensor(1.0).double(), exponent - 24)).max())


def pairs() -> Iterator[Any]:
    """Each merge of float32 and of bfloat16 files.  Trimmed bfloat16 is left out: many magnitudes are equal there, of
    which `torch.topk` takes some and evomerge all."""
    for name, merge in MERGES.items():
        for stored in (torch.float32, torch.bfloat16):
            if stored == torch.float32 or merge[2].get("density", 1.0) == 1.0:
                yield pytest.param(*merge, stored, id=f"{name}-{stored}")


@pytest.mark.parametrize(("method", "weights", "knobs", "stored"), pairs())
def test_mergekit_makes_the_same_model(
    method: str, weights: list[float], knobs: dict[str, Any], stored: torch.dtype, tmp_path: Path
):
    names = ["one", "two"] if weights else ["one"]
    folders = write_family(tmp_path / "models", names, dtype=stored)
    base = str(folders["base"])
    models: list[dict[str, Any]] = [
        {"model": str(folders[n]), "parameters": {"weight": w}} for n, w in zip(names, weights, strict=False)
    ]
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": knobs, "models": models}
    if method == "slerp":
        config |= {"models": [{"model": base}, {"model": str(folders["one"])}]}
    if method != "linear":
        config |= {"base_model": base}
    theirs = run_mergekit(config, tmp_path)

    sources = [RecipeSource(name=n, path=str(folders[n])) for n in names]
    for source, weight in zip(sources, weights, strict=False):
        source.parameters["weight"] = weight
    recipe = Recipe(method=method, dtype="float32", base=Model(path=base), sources=sources, parameters=knobs)
    bank = Bank(open_models(folders["base"], {n: folders[n] for n in names}))
    export(recipe, bank, tmp_path / "ours", model_card)
    ours = tensors_in(tmp_path / "ours")

    assert ours.keys() == theirs.keys()
    apart = {}
    for name in ours:
        if isinstance(knobs.get("t"), list) and name in AFTER_THE_STACK:
            continue
        inputs = [bank.base(name), *(bank.source(s, name) for s in names)]
        apart[name] = units_apart(ours[name], theirs[name], inputs)
    assert max(apart.values()) <= UNITS[method], apart
