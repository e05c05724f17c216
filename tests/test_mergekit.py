"""Beside mergekit 0.1.5 itself: the same configuration and the same files give the same model.

`make test-mergekit` makes an environment for mergekit and runs this; or name a Python that has it: EVOMERGE_MERGEKIT.
One process of mergekit makes all merges.  Its `dtype: float32` is the arithmetic that evomerge always uses.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from architectures import write_architectures
from mergekit_cases import CASES, ELSEWHERE, Case
from models import NAMES
from torch import Tensor

from evomerge.merge.bank import Bank
from evomerge.merge.card import model_card
from evomerge.merge.export import export
from evomerge.merge.mergekit.read import load_merge
from evomerge.merge.recipe import model_folders
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.open import open_models

MERGEKIT = os.environ.get("EVOMERGE_MERGEKIT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MERGEKIT, reason="EVOMERGE_MERGEKIT does not name a Python with mergekit"),
]

RUNS = [(name, "llama", d) for name in CASES for d in (torch.float32, torch.bfloat16)]
RUNS += [(name, a, torch.bfloat16) for name in ELSEWHERE for a in ("qwen2", "gemma2", "gpt2")]
IDS = [f"{name}-{a}-{NAMES[d]}" for name, a, d in RUNS]


def family(root: Path, architecture: str, dtype: torch.dtype) -> Path:
    return root / f"{architecture}-{NAMES[dtype]}"


def configuration(case: Case, folder: Path, dtype: torch.dtype) -> str:
    """The case as YAML, with the models' absolute paths, computed in float32 and written in `dtype`."""
    text = yaml.safe_dump(case.config | {"dtype": "float32", "out_dtype": NAMES[dtype]}, sort_keys=False)
    for name in ("base", "one", "two", "three"):
        text = text.replace(f"<{name}>", str(folder / name))
    return text


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of families, with what mergekit makes of every case in FAMILY/CASE/theirs."""
    root = tmp_path_factory.mktemp("mergekit")
    jobs = []
    for name, architecture, dtype in RUNS:
        folder = family(root, architecture, dtype)
        if not folder.exists():
            write_architectures(folder, architecture, dtype)
        file = folder / name / "mergekit.yml"
        file.parent.mkdir()
        file.write_text(configuration(CASES[name], folder, dtype))
        jobs.append([str(file), str(file.parent / "theirs"), 1])
    (root / "jobs.json").write_text(json.dumps(jobs))
    program = Path(__file__).with_name("mergekit_run.py")
    run = [str(MERGEKIT), program, root / "jobs.json"]
    finished = subprocess.run(run, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return root


def tensors_in(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def both(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Bank]:
    """What evomerge makes of FOLDER/mergekit.yml, what mergekit made of it, and the bank of inputs."""
    error = folder / "theirs" / "error.txt"
    assert not error.exists(), error.read_text()[-2000:]
    recipe, _ = load_merge(folder / "mergekit.yml")
    base, sources = model_folders(recipe)
    bank = Bank(open_models(base, sources))
    export(recipe, bank, folder / "ours", model_card)
    ours, theirs = tensors_in(folder / "ours"), tensors_in(folder / "theirs")
    assert ours.keys() == theirs.keys()
    return ours, theirs, bank


def units_apart(x: Tensor, y: Tensor, inputs: list[Tensor]) -> float:
    """The largest difference, in units in the last place (of the outputs' type) of the largest number that went into
    each element."""
    assert x.dtype == y.dtype
    bits = {torch.float32: 24, torch.bfloat16: 8}[x.dtype]
    largest = torch.stack([t.float().abs() for t in (*inputs, x, y)]).amax(0)
    exponent = torch.frexp(largest).exponent
    return float(((x.double() - y.double()).abs() / torch.exp2((exponent - bits).double())).max())


@pytest.mark.parametrize(("name", "architecture", "dtype"), RUNS, ids=IDS)
def test_a_mergekit_file_makes_what_mergekit_makes(name: str, architecture: str, dtype: torch.dtype, merged: Path):
    ours, theirs, bank = both(family(merged, architecture, dtype) / name)
    apart = {}
    for tensor in ours:
        inputs = [bank.base(tensor), *(bank.source(s, tensor) for s in bank.models.sources)]
        apart[tensor] = units_apart(ours[tensor], theirs[tensor], inputs)
    print(f"{max(apart.values()):.2f} units apart at most, {max(apart, key=lambda n: apart[n])}")
    assert max(apart.values()) <= (CASES[name].units if dtype == torch.float32 else 1), apart
