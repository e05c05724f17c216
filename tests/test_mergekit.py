"""Beside mergekit 0.1.5 itself: the same configuration and the same files give the same model.

`make test-mergekit` makes an environment for mergekit and runs this; or name a Python that has it: EVOMERGE_MERGEKIT.
One process of mergekit makes all merges, with `dtype: float32`, the arithmetic that evomerge always uses.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from architectures import write_architectures
from mergekit_cases import (
    ADAPTER,
    CASES,
    DOCUMENTS,
    ELSEWHERE,
    RANDOM,
    ROUNDED,
    STEPS,
    STEPS_HERE,
    VOCABULARIES,
    Case,
)
from models import NAMES, VOCABULARY, write_adapter, write_llama
from torch import Tensor

from evomerge.api.lora import extract_lora
from evomerge.config.config_file import load_config
from evomerge.merge.bank.bank import Bank
from evomerge.merge.mergekit.from_recipe import dump_mergekit
from evomerge.merge.mergekit.load_merge import load_merge
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.search.space.nearest import nearest_point
from evomerge.search.space.space import build_space
from evomerge.sources.adapter import Adapter, open_adapter
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.embedding_rows import vocabulary_tensors
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import tensor_role
from evomerge.sources.tokenizer import read_vocabulary
from evomerge.start.migrate.migrate import migrate

MERGEKIT = os.environ.get("EVOMERGE_MERGEKIT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MERGEKIT, reason="EVOMERGE_MERGEKIT does not name a Python with mergekit"),
]

SPECIAL, LETTERS = VOCABULARY[:3], VOCABULARY[3:]
TOKENIZERS = ([*SPECIAL, *reversed(LETTERS), "v", "w"], [*SPECIAL, "w", "x", *LETTERS[4:]])

RUNS = [(name, "llama", d) for name in CASES for d in (torch.float32, torch.bfloat16)]
RUNS += [(name, a, torch.bfloat16) for name in ELSEWHERE for a in ("qwen2", "gemma2", "gpt2")]
IDS = [f"{name}-{a}-{NAMES[d]}" for name, a, d in RUNS]


def family(root: Path, architecture: str, dtype: torch.dtype) -> Path:
    return root / f"{architecture}-{NAMES[dtype]}"


def configuration(case: Case, folder: Path, dtype: torch.dtype) -> str:
    """The case as YAML, with the models' absolute paths and the output in `dtype`."""
    types = {"dtype": case.arithmetic, "out_dtype": NAMES[dtype]}
    return with_paths(yaml.safe_dump(case.config | types, sort_keys=False), folder)


def with_paths(text: str, folder: Path) -> str:
    for name in ("base", "one", "two", "three", "lora"):
        text = text.replace(f"<{name}>", str(folder / name))
    return text


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of families, with what mergekit makes of every case in FAMILY/CASE/theirs."""
    root = tmp_path_factory.mktemp("mergekit")
    for seed, tokens in enumerate((VOCABULARY, *TOKENIZERS)):
        write_llama(root / "words" / ("base", "one", "two")[seed], seed, vocabulary=tokens)
    plain = [*RUNS, *((name, "llama", torch.float32) for name in RANDOM)]
    for architecture, dtype in dict.fromkeys((a, d) for _, a, d in plain):
        write_architectures(family(root, architecture, dtype), architecture, dtype)
    wanted = [(CASES | RANDOM, family(root, a, d), name, d) for name, a, d in plain]
    wanted += [(VOCABULARIES, root / "words", name, torch.float32) for name in VOCABULARIES]
    wanted += [({"an adapter": ADAPTER}, root / "words", "an adapter", torch.float32)]
    write_adapter(root / "words" / "lora", root / "words" / "base")
    jobs = []
    for cases, folder, name, dtype in wanted:
        file = folder / name / "mergekit.yml"
        file.parent.mkdir()
        file.write_text(configuration(cases[name], folder, dtype))
        jobs.append([str(file), str(file.parent / "theirs"), 1])
        if dtype == torch.float32 and name not in RANDOM:
            again, _ = dump_mergekit(load_merge(file)[0])
            (file.parent / "again.yml").write_text(again)
            jobs.append([str(file.parent / "again.yml"), str(file.parent / "again"), 1])
    for name in ROUNDED:
        folder = family(root, "llama", torch.bfloat16)
        (folder / f"{name}, rounded").mkdir()
        text = with_paths(yaml.safe_dump(CASES[name].config | {"dtype": "bfloat16"}, sort_keys=False), folder)
        (file := folder / f"{name}, rounded" / "mergekit.yml").write_text(text)
        jobs.append([str(file), str(file.parent / "theirs"), 1])
    for seed, name in enumerate(("base", "one", "two")):
        write_llama(root / "documents" / name, seed)
    write_adapter(root / "documents" / "lora", root / "documents" / "base")
    (file := root / "documents" / "mergekit.yml").write_text(with_paths(DOCUMENTS, file.parent))
    jobs.append([str(file), str(file.parent / "theirs"), 1])
    for seed, name in enumerate(("base", "one", "two", "three")):
        write_llama(root / "steps" / name, seed)
    for name, text in STEPS.items():
        (file := root / "steps" / name / "mergekit.yml").parent.mkdir()
        file.write_text(with_paths(text, root / "steps"))
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
    bank = open_bank(recipe, torch.device("cpu"))
    export(recipe, bank, folder / "ours", model_card)
    ours, theirs = tensors_in(folder / "ours"), tensors_in(folder / "theirs")
    assert ours.keys() == theirs.keys()
    return ours, theirs, bank


def rows_of(folder: Path) -> list[int]:
    """The rows of a model's embedding in the alphabetical order of their tokens."""
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None
    return [vocabulary.tokens[token] for token in sorted(vocabulary.tokens)]


def on_a_cut(base: Tensor, sources: list[Tensor], cuts: tuple[float, ...]) -> Tensor:
    """Where some task vector is as large as the element that stands at one of these shares of its order, of those
    that several elements share."""
    found = torch.zeros(base.shape, dtype=torch.bool)
    for source in sources:
        sizes = (source.float() - base.float()).abs()
        ordered = sizes.flatten().sort(descending=True).values
        for cut in cuts:
            for at in (int(cut * len(ordered)) - 1, int(cut * len(ordered))):
                alike = sizes == ordered[min(max(at, 0), len(ordered) - 1)]
                found |= alike & (alike.sum() > 1)
    return found


def units_apart(x: Tensor, y: Tensor, *inputs: Tensor) -> float:
    """The largest difference in units (`units_of_each`)."""
    return float(units_of_each(x, y, *inputs).max())


def units_of_each(x: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
    """The differences, in units in the last place (of the outputs' type) of the largest number that went into each
    element."""
    assert x.dtype == y.dtype
    bits = {torch.float32: 24, torch.bfloat16: 8}[x.dtype]
    largest = torch.stack([t.float().abs() for t in (*inputs, x, y)]).amax(0)
    exponent = torch.frexp(largest).exponent
    return (x.double() - y.double()).abs() / torch.exp2((exponent - bits).double())


@pytest.mark.parametrize(("name", "architecture", "dtype"), RUNS, ids=IDS)
def test_a_mergekit_file_makes_what_mergekit_makes(name: str, architecture: str, dtype: torch.dtype, merged: Path):
    ours, theirs, bank = both(family(merged, architecture, dtype) / name)
    apart = {}
    for tensor in ours:
        taking_part = bank.taking_part(tensor, list(bank.models.sources))
        base, sources = bank.base(tensor), [bank.source(s, tensor) for s in taking_part]
        clear = ~on_a_cut(base, sources, CASES[name].cuts)
        apart[tensor] = units_apart(*(x[clear] for x in (ours[tensor], theirs[tensor], base, *sources)))
    print(f"{max(apart.values()):.2f} units apart at most, {max(apart, key=lambda n: apart[n])}")
    allowed = CASES[name].units if dtype == torch.float32 else min(1, CASES[name].units)
    assert max(apart.values()) <= allowed, apart


@pytest.mark.parametrize(("name", "units", "share"), [(n, *bounds) for n, bounds in ROUNDED.items()], ids=ROUNDED)
def test_mergekits_own_rounding_is_as_far_as_the_page_says(name: str, units: float, share: float, merged: Path):
    ours, theirs, bank = both(family(merged, "llama", torch.bfloat16) / f"{name}, rounded")
    far = total = 0
    for tensor in ours:
        inputs = [bank.base(tensor), *(bank.source(s, tensor) for s in bank.models.sources)]
        apart = units_of_each(ours[tensor], theirs[tensor].bfloat16(), *inputs)  # of which two methods write float32
        far, total = far + int((apart > units).sum()), total + apart.numel()
    print(f"{far / total:.4f} farther than {units} units")
    assert far / total <= share


def test_documents_that_build_on_each_other_make_what_mergekit_makes(merged: Path):
    ours, theirs, bank = both(merged / "documents")
    for tensor in ours:
        inputs = [bank.source(s, tensor) for s in bank.models.sources]
        assert units_apart(ours[tensor], theirs[tensor], *inputs) <= 8, tensor


@pytest.mark.parametrize("method", STEPS)
def test_several_sources_merge_as_mergekit_merges_them_step_by_step(method: str, merged: Path):
    folder = merged / "steps" / method
    assert not (folder / "theirs" / "error.txt").exists(), (folder / "theirs" / "error.txt").read_text()[-2000:]
    names, parameters, weights = STEPS_HERE[method]
    paths = {name: str(merged / "steps" / name) for name in ("base", *names)}
    sources = [RecipeSource(name=n, path=paths[n], parameters={"weight": weights[n]} if weights else {}) for n in names]
    base = Model(path=paths["base"])
    recipe = Recipe(method=method, dtype="float32", base=base, sources=sources, parameters=parameters)
    bank = open_bank(recipe, torch.device("cpu"))
    export(recipe, bank, folder / "ours", model_card)
    ours, theirs = tensors_in(folder / "ours"), tensors_in(folder / "theirs")
    for tensor in ours:
        inputs = [bank.base(tensor), *(bank.source(s, tensor) for s in names)]
        assert units_apart(ours[tensor], theirs[tensor], *inputs) <= 4, tensor


@pytest.mark.parametrize("name", [*CASES, *VOCABULARIES, "an adapter"])
def test_mergekit_makes_the_same_of_the_file_that_is_written_here(name: str, merged: Path):
    """A file of mergekit, read as a recipe and written as a file again: mergekit's model is the same."""
    folder = (family(merged, "llama", torch.float32) if name in CASES else merged / "words") / name
    assert not (folder / "again" / "error.txt").exists(), (folder / "again" / "error.txt").read_text()[-2000:]
    first, second = tensors_in(folder / "theirs"), tensors_in(folder / "again")
    rows = rows_of(folder / "theirs"), rows_of(folder / "again")
    by_token = vocabulary_tensors(open_checkpoint(folder / "again"))
    for tensor in first:
        x, y = first[tensor], second[tensor]
        if tensor in by_token:
            x, y = x[rows[0]], y[rows[1]]
        # Angles are found in float64 where the first file says so.
        assert (
            torch.equal(x, y)
            if (CASES | VOCABULARIES).get(name, ADAPTER).arithmetic == "float32"
            else (units_apart(x, y, torch.ones(x.shape)) <= 2)
        ), tensor


def test_an_adapter_is_merged_as_mergekit_merges_it(merged: Path):
    """Of the sum B A, which both round, the terms count as numbers that go in."""
    ours, theirs, bank = both(merged / "words" / "an adapter")
    lora = bank.models.sources["lora"]
    assert isinstance(lora, Adapter)
    for tensor in ours:
        inputs = [bank.base(tensor)]
        if tensor in lora.changes:
            product = lora.changes[tensor].low_rank
            assert product is not None
            inputs.append(product.scale * product.left.abs() @ product.right.abs())
        assert units_apart(ours[tensor], theirs[tensor], *inputs) <= 2, tensor


@pytest.mark.parametrize("name", VOCABULARIES)
def test_models_of_different_tokenizers_merge_token_by_token_as_in_mergekit(name: str, merged: Path):
    folder = merged / "words" / name
    ours, theirs, bank = both(folder)
    ours_by_token, theirs_by_token = rows_of(folder / "ours"), rows_of(folder / "theirs")
    assert len(ours_by_token) == len(theirs_by_token)
    for tensor in ours:
        x, y, inputs = (
            ours[tensor],
            theirs[tensor],
            [bank.base(tensor), *(bank.source(s, tensor) for s in bank.models.sources)],
        )
        if tensor in vocabulary_tensors(open_checkpoint(folder / "ours")):
            x, y, inputs = x[ours_by_token], y[theirs_by_token], [i[ours_by_token] for i in inputs]
        assert units_apart(x, y, *inputs) <= VOCABULARIES[name].units, tensor


@pytest.mark.parametrize("method", RANDOM)
def test_a_random_mask_keeps_the_same_share_and_the_same_norm(method: str, merged: Path):
    """One source of weight 1: what remains of its task vector shows the mask."""
    ours, theirs, bank = both(family(merged, "llama", torch.float32) / method)
    kept: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for tensor, whole in {n: bank.source("one", n) - bank.base(n) for n in ours}.items():
        ranks = whole.abs().reshape(-1, whole.shape[-1]).argsort(1).argsort(1).reshape(whole.shape)
        upper = ranks >= whole.shape[-1] / 2  # of each row, the half that is larger
        for side, merge in (("ours", ours), ("theirs", theirs)):
            left = merge[tensor] - bank.base(tensor)
            assert left.abs().sum() == pytest.approx(float(whole.abs().sum()), rel=1e-4), (side, tensor)
            mask = left != 0
            kept[side].append([float(mask[half].sum()) for half in (upper, ~upper)])
    count = sum(t.numel() for t in ours.values()) / 2
    shares = {side: torch.tensor(sums).sum(0) / count for side, sums in kept.items()}
    print(f"kept of the larger and the smaller half: {shares}")
    expected = [0.7, 0.5] if "della" in method else [0.6, 0.6]  # della: from 0.4 to 0.8 along a row
    for side in shares:
        assert shares[side].tolist() == pytest.approx(expected, abs=0.03), shares


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("linear", {}),
        ("task_arithmetic", {"layer_granularity": 2, "filters": ["self_attn", "mlp"]}),
        ("ties", {"layer_granularity": 1, "filters": ["mlp"]}),
        ("task_arithmetic", {"layer_granularity": 2, "smooth": True, "allow_negative_weights": True}),
    ],
)
def test_a_migrated_genome_holds_the_merges_that_mergekit_evolve_tries(
    method: str, more: dict[str, object], tmp_path: Path
) -> None:
    """The space of the migrated file has a point for each of them."""
    paths = {
        name: str(write_llama(tmp_path / name, seed, layers=4)) for seed, name in enumerate(("base", "one", "two"))
    }
    base = {} if method == "linear" else {"base_model": paths["base"]}
    genome = {"models": [paths["one"], paths["two"]], "merge_method": method, **base, **more}
    shape = (4 // int(str(more.get("layer_granularity", 4))), 2, len(list(more.get("filters", ()))) + 1)  # type: ignore
    numbers = torch.rand(*shape, 2 if method == "ties" else 1, generator=torch.Generator().manual_seed(1))
    job = [genome, (0.2 + 0.7 * numbers).tolist(), str(tmp_path / "merge.yml")]
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    program = Path(__file__).with_name("mergekit_genomes.py")
    done = subprocess.run([str(MERGEKIT), program, tmp_path / "jobs.json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "genome.yml").write_text(yaml.safe_dump({"genome": genome, "tasks": ["any"]}))
    migrate(tmp_path / "genome.yml", tmp_path / "search.yaml")
    config = load_config(tmp_path / "search.yaml")
    models = open_models(Path(config.base), {s.name: Path(s.path) for s in config.sources})
    space = build_space(config, models)
    if "smooth" in more:  # tensors outside the layers have mergekit's first value, and here the nearest layer's
        space = replace(space, tensors=tuple(t for t in space.tensors if tensor_role(t).layer is not None))
    found = nearest_point(space, load_merge(tmp_path / "merge.yml")[0])
    assert found is not None
    assert found.difference < 1e-6, found.where


def test_an_extracted_adapter_approximates_as_mergekits_does(tmp_path: Path) -> None:
    """The products of the factors agree, and so do the modules that are stored whole."""
    base, one = (write_llama(tmp_path / name, seed) for seed, name in enumerate(("base", "one")))
    command = Path(str(MERGEKIT)).with_name("mergekit-extract-lora")
    options = ["--model", one, "--base-model", base, "--out-path", tmp_path / "theirs", "--max-rank", "4"]
    done = subprocess.run([command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    extract_lora(str(base), [str(one)], tmp_path / "ours", 4)
    ours, theirs = (open_adapter(tmp_path / name, open_checkpoint(base)) for name in ("ours", "theirs"))
    assert ours.changes.keys() == theirs.changes.keys()
    for tensor, change in theirs.changes.items():
        found = ours.changes[tensor]
        if change.low_rank is None:
            assert found.low_rank is None
            assert torch.equal(torch.as_tensor(found.whole), torch.as_tensor(change.whole)), tensor
        else:
            assert found.low_rank is not None
            torch.testing.assert_close(found.low_rank.product(), change.low_rank.product(), rtol=1e-3, atol=1e-5)
