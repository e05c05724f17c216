"""What is measured of the sources is measured once, kept by who they are, and the same however it was come by."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import write_family

from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.derived import threads
from evomerge.merge.materialise import materialise
from evomerge.merge.measure import prepare as prepare_module
from evomerge.merge.measure.prepare import by_file, measure_sources
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.open_models import open_models

MEASURED = [name for name, method in METHODS.items() if method.measures]
NAMES = ["one", "two"]


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return write_family(tmp_path / "models", dtype=torch.bfloat16)


def bank_of(family: dict[str, Path]) -> Bank:
    return Bank(open_models(family["base"], {n: family[n] for n in NAMES}))


def inputs_of(family: dict[str, Path]) -> dict[str, dict[str, str]]:
    return {n: model_fingerprint(family[n]) for n in ("base", *NAMES)}


def merged(family: dict[str, Path], bank: Bank, method: str) -> dict[str, torch.Tensor]:
    wanted = {"weight": 0.5, "density": 0.4, "t": 0.3}
    method_sources = NAMES[: METHODS[method].sources[1]]
    recipe = Recipe(
        method=method,
        base=Model(path=str(family["base"])),
        sources=[RecipeSource(name=n, path=str(family[n])) for n in method_sources],
        parameters={k: v for k, v in wanted.items() if k in METHODS[method].knobs},
    )
    out = {n: torch.empty(i.shape, dtype=torch.bfloat16) for n, i in bank.models.base.tensors.items()}
    materialise(recipe, bank, out)
    return out


@pytest.mark.parametrize("method", MEASURED)
def test_a_merge_from_kept_measurements_is_the_same(method: str, family: dict[str, Path], tmp_path: Path):
    fresh = merged(family, bank_of(family), method)
    first, again = bank_of(family), bank_of(family)
    sources = NAMES[: METHODS[method].sources[1]]
    assert measure_sources(first, method, sources, tmp_path / "cache", inputs_of(family)) == len(first.names)
    assert measure_sources(again, method, sources, tmp_path / "cache", inputs_of(family)) == 0
    assert first.measurement_cache.keys() == again.measurement_cache.keys()
    for bank in (first, again):
        out = merged(family, bank, method)
        assert all(torch.equal(out[n], fresh[n]) for n in fresh)


def test_another_input_is_measured_anew(family: dict[str, Path], tmp_path: Path):
    bank, inputs = bank_of(family), inputs_of(family)
    measure_sources(bank, "slerp", NAMES, tmp_path, inputs)
    changed = inputs | {"two": {**inputs["two"], "model.safetensors": "0" * 64}}
    assert measure_sources(bank_of(family), "slerp", NAMES, tmp_path, changed) == len(bank.names)
    assert measure_sources(bank_of(family), "slerp", NAMES[::-1], tmp_path, inputs) == len(bank.names)


@pytest.mark.parametrize("elements", [0, 1 << 12, 1 << 30])
def test_every_tensor_lies_in_one_file(elements: int, family: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "PER_FILE", elements)
    bank = bank_of(family)
    files = by_file(bank)
    assert sorted(name for names in files for name in names) == sorted(bank.names)
    assert all(len(names) == 1 or sum(bank.base(n).numel() for n in names) <= elements for names in files)
    assert len(files) == {0: len(bank.names), 1 << 30: 1}.get(elements, len(files))


def test_a_torn_file_is_measured_anew(family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "PER_FILE", 0)
    inputs = inputs_of(family)
    measure_sources(bank_of(family), "ties", NAMES, tmp_path, inputs)
    torn = min(tmp_path.iterdir())
    torn.write_bytes(torn.read_bytes()[:-3])
    assert measure_sources(bank_of(family), "ties", NAMES, tmp_path, inputs) == 1


def test_threads_do_not_change_what_is_measured(family: dict[str, Path], tmp_path: Path):
    grams = []
    for count in (1, 2):
        bank = bank_of(family)
        with threads(count):
            measure_sources(bank, "slerp", NAMES, tmp_path / str(count), inputs_of(family))
        grams.append({k: v for k, v in bank.measurement_cache.items() if k[0] == "gram"})
    assert grams[0].keys() == grams[1].keys()
    assert all(np.array_equal(grams[0][k], grams[1][k]) for k in grams[0])
