"""Methods over tensors that linear algebra or data make: what they promise, and the files that they need."""

import gc
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama_shapes, write_adapter, write_family, write_llama, write_statistics, write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from searches import ROOT, run_cli, write_config
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MixtralConfig

from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.deal import deal
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.loglikelihood import Row
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import items_of
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels import derived
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.regression import regression_mean
from evomerge.merge.kernels.spectral import isotropic, singular_parts
from evomerge.merge.live import destinations, load_live_model, open_live_model
from evomerge.merge.materialise import materialise_tensor
from evomerge.merge.measure.statistics_file import Origin, read_origin
from evomerge.merge.methods.plan import FisherBlend
from evomerge.merge.output.compare import model_differences
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, load_recipe
from evomerge.sources.open_models import open_models
from evomerge.statistics.gather import choose_items, fisher, gather_statistics, gram_shape, grams, linear_layers
from evomerge.statistics.gather import write_statistics as write_statistics_file

MATRIX = "model.layers.0.mlp.up_proj.weight"
CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def singular_values(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x.double())


# --- Singular vectors ---


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (1, 4), (6, 6)])
def test_the_part_of_a_single_source_is_its_task_vector(shape: tuple[int, int]):
    base, source = noise(*shape), noise(*shape, seed=1)
    (part,) = singular_parts(base, [source])
    assert torch.allclose(part, source - base, atol=1e-6)


def test_orthogonal_parts_keep_the_strength_of_every_direction_they_keep():
    base, sources = noise(12, 20), [noise(12, 20, seed=s) for s in (1, 2, 3)]
    parts = singular_parts(base, sources)
    kept = torch.cat([singular_values(x - base)[:4] for x in sources]).sort(descending=True).values
    assert torch.allclose(singular_values(sum(parts)), kept, rtol=1e-5)
    for i, x in enumerate(parts):
        for y in parts[:i]:
            assert torch.allclose(x.T @ y, torch.zeros(20, 20), atol=1e-5)
            assert torch.allclose(x @ y.T, torch.zeros(12, 12), atol=1e-5)


def test_equal_sources_share_their_directions():
    base, source = noise(8, 6), noise(8, 6, seed=1)
    parts = singular_parts(base, [source, source])
    u, s, vt = torch.linalg.svd((source - base).double(), full_matrices=False)
    assert torch.allclose(sum(parts).double(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)


def test_what_an_adapter_leaves_alone_and_its_missing_rank_take_no_part():
    base = noise(16, 16)
    low = base + 0.1 * noise(16, 2, seed=1) @ noise(2, 16, seed=2)
    alone, with_base = singular_parts(base, [low])[0], singular_parts(base, [low, base])
    assert torch.allclose(with_base[0], alone, atol=1e-5)
    assert not with_base[1].any()
    (isotropic_low,) = isotropic(base, [low])
    values = singular_values(isotropic_low)
    assert torch.allclose(values[:2], singular_values(low - base)[:2].mean().expand(2), rtol=1e-4)
    assert float(values[2]) < 1e-5


def test_more_sources_than_directions_still_merge():
    base = noise(2, 5)
    parts = singular_parts(base, [noise(2, 5, seed=s) for s in (1, 2, 3)])
    assert len(parts) == 3
    assert all(p.isfinite().all() for p in parts)


def test_the_isotropic_matrix_has_one_strength_and_the_direction_of_the_sum():
    base, sources = noise(7, 10), [noise(7, 10, seed=s) for s in (1, 2)]
    total = sum(x - base for x in sources)
    (found,) = isotropic(base, sources)
    assert torch.allclose(singular_values(found), singular_values(total).mean().expand(7), rtol=1e-5)
    assert float((found * total).sum()) == pytest.approx(float(singular_values(total).sum() * found.norm() / 7**0.5))


@pytest.mark.parametrize("make", [singular_parts, isotropic])
def test_equal_models_have_no_directions(make: Any):
    assert not any(x.any() for x in make(noise(4, 6), [noise(4, 6)] * 2))


def merged(recipe: Recipe, bank: Bank, name: str) -> Tensor:
    out = torch.empty(bank.base(name).shape)
    materialise_tensor(recipe, bank, name, out)
    return out


def recipe_over(folders: dict[str, Path], method: str, statistics: str | None = None, **parameters: Any) -> Recipe:
    """A recipe over every folder but the base; statistics: the ending of their files beside the folders."""
    sources = [
        RecipeSource(name=n, path=str(f), statistics=f"{f}.{statistics}" if statistics else None)
        for n, f in folders.items()
        if n != "base"
    ]
    base = Model(path=str(folders["base"]))
    return Recipe(method=method, dtype="float32", base=base, sources=sources, parameters=parameters)


def bank_of(folders: dict[str, Path], cache: Path | None = None) -> Bank:
    sources = {n: f for n, f in folders.items() if n != "base"}
    return Bank(open_models(folders["base"], sources), cache=cache)


@pytest.mark.parametrize("method", ["tsv", "iso_c"])
def test_derived_tensors_are_made_once_and_survive_in_a_folder(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = write_family(tmp_path / "models")
    recipe, cache = recipe_over(folders, method), tmp_path / "cache"
    threads = torch.get_num_threads()
    first = merged(recipe, bank_of(folders), MATRIX)
    assert torch.get_num_threads() == threads
    assert torch.equal(merged(recipe, bank_of(folders, cache), MATRIX), first)
    (file,) = (cache / "derived").iterdir()

    monkeypatch.setattr(derived, "derive", lambda *_: pytest.fail("made again"))
    again = bank_of(folders, cache)
    monkeypatch.setattr("evomerge.merge.bank.derived_tensors.derive", lambda *_: pytest.fail("made again"))
    assert torch.equal(merged(recipe, again, MATRIX), first)
    assert not torch.equal(merged(recipe.model_copy(update={"parameters": {"lambda": 0.5}}), again, MATRIX), first)
    monkeypatch.undo()

    file.write_bytes(file.read_bytes()[:100])  # half a file is no file
    assert torch.equal(merged(recipe, bank_of(folders, cache), MATRIX), first)
    shutil.copy(folders["one"] / "model.safetensors", folders["two"] / "model.safetensors")
    assert not torch.equal(merged(recipe, bank_of(folders, cache), MATRIX), first)


def test_adapters_merge_by_their_directions(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base")}
    for seed, name in enumerate(("one", "two"), 1):
        folders[name] = write_adapter(tmp_path / name, folders["base"], seed)
    bank = bank_of(folders)
    touched, untouched = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    for method in ("tsv", "iso_c"):
        recipe = recipe_over(folders, method)
        assert torch.equal(merged(recipe, bank, untouched), bank.base(untouched).float())
        values = singular_values(merged(recipe, bank, touched) - bank.base(touched))
        assert float(values[8]) < 1e-4 < float(values[7])  # two ranks of four


# --- Fisher ---


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fisher_weighs_each_element_by_its_information(data: st.DataObject):
    count, size = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 7, 40]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    base, sources = noise(size), [torch.randn(size, generator=rng) for _ in range(count)]
    spread = data.draw(st.sampled_from([0.0, 4.0]))
    information = [(spread * torch.randn(size, generator=rng)).exp() for _ in range(count)]
    information = [f * (torch.rand(size, generator=rng) > 0.3) for f in information]
    weights = tuple(data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])) for _ in range(count))
    scales = tuple(data.draw(st.sampled_from([1.0, 1e3, 0.25])) for _ in range(count))
    out = torch.empty(size)
    execute(FisherBlend(weights, scales, 1e-6), out, Operands(base, sources, information))
    exact = [w * (f.double() * s).clamp(1e-6) for w, f, s in zip(weights, information, scales, strict=True)]
    assert oracle.fisher(base, sources, exact).allows(out).all()


def test_without_information_fisher_is_the_weighted_mean():
    out = torch.empty(3)
    sources, nothing = [torch.full((3,), 1.0), torch.full((3,), 4.0)], [torch.zeros(3)] * 2
    execute(FisherBlend((2.0, 1.0), (1.0, 1.0), 1e-6), out, Operands(torch.zeros(3), sources, nothing))
    assert out.tolist() == pytest.approx([2.0, 2.0, 2.0])


# --- RegMean ---


def squared_error(layer: Tensor, sources: Sequence[Tensor], inputs: Sequence[Tensor]) -> float:
    """How far a layer's (out, in) answers are from each source's on that source's inputs."""
    pairs = zip(sources, inputs, strict=True)
    return sum(float((x.double() @ (layer - w).double().T).square().sum()) for w, x in pairs)


def test_the_regression_mean_answers_most_like_the_sources_on_their_inputs():
    base, sources = noise(5, 8), [noise(5, 8, seed=s) for s in (1, 2, 3)]
    inputs = [noise(30, 8, seed=s) @ noise(8, 8, seed=s + 9) for s in (4, 5, 6)]  # (positions, in), correlated
    found = [x.double().T @ x.double() for x in inputs]
    best = base + regression_mean(base, sources, found, [1.0] * 3, alpha=1.0, transposed=False)
    least = squared_error(best, sources, inputs)
    for seed in range(20):
        assert squared_error(best + 1e-3 * noise(5, 8, seed=seed + 50), sources, inputs) > least
    assert least < 0.9 * squared_error(sum(sources) / 3, sources, inputs)
    turned = regression_mean(base.T, [x.T for x in sources], found, [1.0] * 3, alpha=1.0, transposed=True)
    assert torch.allclose(base.T + turned, best.T, atol=1e-5)


def test_inputs_that_never_came_leave_the_weighted_mean():
    base, sources = noise(3, 4), [noise(3, 4, seed=s) for s in (1, 2)]
    seen = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]).double())
    other = torch.diag(torch.tensor([3.0, 0.0, 5.0, 0.0]).double())
    found = base + regression_mean(base, sources, [seen, other], [3.0, 1.0], alpha=0.9, transposed=False)
    a, b = sources
    wanted = torch.stack([0.5 * a[:, 0] + 0.5 * b[:, 0], a[:, 1], b[:, 2], 0.75 * a[:, 3] + 0.25 * b[:, 3]], 1)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_gram_matrices_that_are_none_are_refused():
    base = noise(3, 4)
    with pytest.raises(EvomergeError, match="not positive semidefinite"):
        regression_mean(base, [base], [-torch.eye(4).double()], [1.0], alpha=1.0, transposed=False)


# --- Gathering ---


def rows_of(model: Any, tokenizer: Any) -> list[list[Row]]:
    task = open_tasks([TaskConfig(task=str(ROOT / "evals" / "tiny" / "rev.yaml"))])[0]
    engine = Engine(model, tokenizer, 1)
    return [engine.requests.gold_rows(task, item) for item in items_of(task, task.lm.eval_docs)[:5]]


def silent(done: int) -> None:
    pass


@pytest.mark.parametrize("tied", [False, True])
def test_fisher_is_the_mean_square_of_every_items_gradient(tied: bool, tmp_path: Path):
    folder = write_llama(tmp_path / "model", tied=tied)
    model = load_live_model(folder, torch.float32, CPU)
    rows = rows_of(model, AutoTokenizer.from_pretrained(folder))
    found = fisher(model, Bank(open_models(folder, {})), rows, silent)
    assert found.keys() == llama_shapes(tied).keys()

    twin = AutoModelForCausalLM.from_pretrained(folder)
    expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for (row,) in rows:
        ids = torch.tensor([row.tokens])
        answer = slice(len(row.tokens) - row.scored, None)
        chosen = log_softmax(twin(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        chosen[slice(answer.start - 1, None)].sum().backward()
        for name, p in twin.named_parameters():
            expected[name] += p.grad**2 / len(rows)
            p.grad = None
    for name, x in expected.items():
        assert torch.allclose(found[name], x, rtol=1e-3, atol=1e-6 * float(x.max())), name
    assert not any(p.requires_grad for p in model.parameters())


def test_gram_matrices_are_those_of_the_layers_inputs(tmp_path: Path):
    folder = write_llama(tmp_path / "model")
    model = load_live_model(folder, torch.float32, CPU)
    rows = rows_of(model, AutoTokenizer.from_pretrained(folder))
    shapes, matrices = grams(model, linear_layers(model, Bank(open_models(folder, {}))), rows, silent)
    found = dict(zip(shapes, matrices, strict=True))
    assert {name: (x.dtype, tuple(x.shape)) for name, x in found.items()} == shapes
    assert found.keys() == {n for n in llama_shapes() if "proj" in n or n == "lm_head.weight"}
    assert all(torch.equal(g, g.T) for g in found.values())
    block = model.model.layers[0]
    inputs = [
        block.input_layernorm(model.model.embed_tokens(torch.tensor(row.tokens[:-1]))).detach() for (row,) in rows
    ]
    expected = sum(x.double().T @ x.double() for x in inputs)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.allclose(found[f"model.layers.0.self_attn.{name}.weight"], expected, rtol=1e-6)
    assert not model.model.layers[0].self_attn.q_proj._forward_pre_hooks


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_one_group_of_gram_matrices_is_in_memory_at_a_time(room: int, tmp_path: Path):
    folder = write_llama(tmp_path / "model")
    model = load_live_model(folder, torch.float32, CPU)
    rows = rows_of(model, AutoTokenizer.from_pretrained(folder))
    layers = linear_layers(model, Bank(open_models(folder, {})))
    sizes = {gram_shape(x) for x in layers.values()}
    alive: list[int] = []

    def count(done: int) -> None:
        gc.collect()
        alive.append(sum(type(x) is Tensor and x.dtype == torch.float64 and x.shape in sizes for x in gc.get_objects()))

    def rest(out: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(out, "pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata()  # noqa: SIM118

    origin = Origin("regmean", {"rev": ["1"]}, {"model.safetensors": "0"}, transposed=["ä"])
    gc.collect()
    gc.freeze()  # else a million objects of other tests are looked through at every count
    try:
        shapes, matrices = grams(model, layers, rows, count, room)
        write_statistics_file(tmp_path / "out.regmean", shapes, matrices, origin, folder)
    finally:
        gc.unfreeze()
    groups = len(layers) if room == 1 else 1
    assert len(alive) == len(rows) * groups
    assert max(alive) == len(layers) // groups

    tensors, metadata = rest(tmp_path / "out.regmean")
    save_file(tensors, tmp_path / "whole.regmean", metadata)
    assert (tmp_path / "out.regmean").read_bytes() == (tmp_path / "whole.regmean").read_bytes()
    assert metadata == origin.metadata()


def test_a_layer_that_no_item_reaches_has_no_matrix(tmp_path: Path):
    folder = write_llama(tmp_path / "model")
    model = load_live_model(folder, torch.float32, CPU)
    rows = rows_of(model, AutoTokenizer.from_pretrained(folder))
    layers = linear_layers(model, Bank(open_models(folder, {})))
    shapes, matrices = grams(model, layers | {"a": torch.nn.Linear(3, 2), "z": torch.nn.Linear(3, 2)}, rows, silent, 1)
    assert shapes.keys() == layers.keys()
    assert len(list(matrices)) == len(layers)


def write_gathered(
    kind: Any, folder: Path, tasks: Sequence[Path], count: int, out: Path, search: SearchConfig | None = None
) -> None:
    """What `evomerge statistics` does, without a process of its own."""
    opened = open_tasks([TaskConfig(task=str(t)) for t in tasks])
    live = open_live_model(folder, None, "float32", CPU)
    gather_statistics(kind, folder, None, live, opened, choose_items(opened, count, search), out)


SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
SIZES |= {"vocab_size": 40, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ODD = {
    "gpt2": GPT2Config(**SIZES),  # weights stored (in, out), names without the model's prefix
    "mixtral": MixtralConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, num_local_experts=3),
}


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_statistics_have_the_checkpoints_names(config: Any, kind: str, tmp_path: Path):
    torch.manual_seed(0)
    folders = {}
    for name in ("base", "one", "two"):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name)
        folders[name] = tmp_path / name
    task = ROOT / "evals" / "tiny" / "rev.yaml"
    for name in ("one", "two"):
        write_gathered(kind, folders[name], [task], 3, Path(f"{folders[name]}.{kind}"))
    bank, recipe = bank_of(folders), recipe_over(folders, kind, kind)
    live = load_live_model(folders["base"], torch.float32, CPU)
    for name in destinations(live, bank):
        out = merged(recipe, bank, name)
        assert out.isfinite().all()
        if kind == "regmean" and bank.statistics(recipe)[0].covers(name):
            sources = [bank.source(s, name) for s in ("one", "two")]
            turn = bank.statistics(recipe)[0].is_transposed(name)
            gram = [g.read(name) for g in bank.statistics(recipe)]
            expected = oracle.regmean(
                bank.base(name).T if turn else bank.base(name), [x.T if turn else x for x in sources], gram, [1, 1], 0.9
            ).exact
            assert torch.allclose(out.double(), expected.T if turn else expected, atol=1e-4), name


# --- Files that do not fit ---


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and two siblings, beside them ONE.fisher and ONE.regmean."""
    folders = write_family(tmp_path / "models")
    for name in ("one", "two"):
        for kind in ("fisher", "regmean"):
            write_statistics(tmp_path / "models" / f"{name}.{kind}", kind, folders[name])
    return folders


def refused(recipe: Recipe, folders: dict[str, Path]) -> str:
    with pytest.raises(EvomergeError) as caught:
        merged(recipe, bank_of(folders), MATRIX)
    return str(caught.value)


def test_statistics_of_the_other_kind_are_refused(family: dict[str, Path]):
    assert "holds regmean statistics, but fisher ones" in refused(recipe_over(family, "fisher", "regmean"), family)


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
def test_a_bank_that_merged_without_statistics_merges_with_them(kind: str, family: dict[str, Path]):
    bank, recipe = bank_of(family), recipe_over(family, kind, kind)
    for _ in range(2):  # the second time with the operands of the first
        plain = merged(recipe_over(family, "task_arithmetic", weight=0.5), bank, MATRIX)
    found = merged(recipe, bank, MATRIX)
    assert torch.equal(found, merged(recipe, bank_of(family), MATRIX))
    assert not torch.equal(found, plain)


def test_statistics_of_another_model_are_refused(family: dict[str, Path]):
    shutil.copy(family["two"].with_suffix(".fisher"), family["one"].with_suffix(".fisher"))
    message = refused(recipe_over(family, "fisher", "fisher"), family)
    assert "made of another model than" in message
    assert "model.safetensors differs" in message


def test_an_adapters_statistics_belong_to_its_base(tmp_path: Path):
    folders = {"base": write_llama(tmp_path / "base")}
    folders["one"] = write_adapter(tmp_path / "one", folders["base"])
    write_statistics(tmp_path / "one.fisher", "fisher", folders["one"], folders["base"])
    recipe = recipe_over(folders, "fisher", "fisher")
    assert merged(recipe, bank_of(folders), MATRIX).isfinite().all()
    other = write_llama(tmp_path / "other", 5)
    assert f"another model than {other}" in refused(recipe, folders | {"base": other})


def without_the_matrix(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Take a tensor out of a statistics file; what is left in it, and its metadata."""
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    del tensors[MATRIX]
    save_file(tensors, file, metadata)
    return tensors, metadata


def test_a_file_that_lacks_a_tensor_is_refused(family: dict[str, Path]):
    file = family["two"].with_suffix(".fisher")
    tensors, metadata = without_the_matrix(file)
    assert f"lacks the tensor {MATRIX}" in refused(recipe_over(family, "fisher", "fisher"), family)
    save_file(tensors | {MATRIX: torch.ones(2)}, file, metadata)
    assert f"{MATRIX} is (2,), in" in refused(recipe_over(family, "fisher", "fisher"), family)


def test_two_files_over_different_layers_are_refused(family: dict[str, Path]):
    file = family["two"].with_suffix(".regmean")
    without_the_matrix(file)
    assert f"only one of them has {MATRIX}" in refused(recipe_over(family, "regmean", "regmean"), family)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_no_statistics_is_refused(content: bytes | None, family: dict[str, Path]):
    file = family["two"].with_suffix(".fisher")
    if content is None:
        shutil.copy(family["two"] / "model.safetensors", file)
    else:
        file.write_bytes(content)
    assert str(file) in refused(recipe_over(family, "fisher", "fisher"), family)
    file.unlink()
    assert "no such file" in refused(recipe_over(family, "fisher", "fisher"), family)


def test_a_recipe_says_which_source_has_no_statistics(family: dict[str, Path]):
    with pytest.raises(ValueError, match=r"sources\.one\.statistics: fisher needs a file there"):
        recipe_over(family, "fisher")


# --- From the command line, over the trained family ---

SKILLS = ("rev", "add")


@pytest.fixture(scope="module")
def files(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SKILL.fisher and SKILL.regmean."""
    folder = tmp_path_factory.mktemp("statistics")
    for skill in SKILLS:
        for kind in ("fisher", "regmean"):
            task = ROOT / "evals" / "tiny" / f"{skill}.yaml"
            write_gathered(kind, tiny_family / skill, [task], 16, folder / f"{skill}.{kind}")
    return folder


def write_recipe(file: Path, family: Path, method: str, files: Path) -> Path:
    sources = [{"name": s, "path": str(family / s)} for s in SKILLS]
    if method in ("fisher", "regmean"):
        for s in sources:
            s["statistics"] = os.path.relpath(files / f"{s['name']}.{method}", file.parent)
    content = {"method": method, "dtype": "float32", "base": {"path": str(family / "base")}, "sources": sources}
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("method", ["tsv", "iso_c", "fisher", "regmean"])
def test_a_merge_of_trained_models_opens_and_is_made_again(method: str, tiny_family: Path, files: Path, tmp_path: Path):
    recipe = load_recipe(write_recipe(tmp_path / "recipe.yaml", tiny_family, method, files))
    folders = {"base": tiny_family / "base"} | {s: tiny_family / s for s in SKILLS}
    export(recipe, bank_of(folders), tmp_path / "out", model_card)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[5, 9, 11]])).logits.isfinite().all()
    export(load_recipe(tmp_path / "out" / "recipe.yaml"), bank_of(folders), tmp_path / "again", model_card)
    assert model_differences(tmp_path / "out", tmp_path / "again") == []


def test_reproduce_names_a_statistics_file_that_changed(tiny_family: Path, files: Path, tmp_path: Path):
    copies = tmp_path / "copies"
    shutil.copytree(files, copies)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_family, "fisher", copies)
    assert run_cli("merge", recipe, "--out", tmp_path / "out").returncode == 0
    done = run_cli("reproduce", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "same")
    assert "the bytes agree" in done.stdout
    content = bytearray((copies / "add.fisher").read_bytes())
    content[-1] ^= 1
    (copies / "add.fisher").write_bytes(content)
    done = run_cli("reproduce", tmp_path / "out" / "recipe.yaml", "--out", tmp_path / "again")
    assert done.returncode == 2
    assert str(copies / "add.fisher") in done.stderr


def test_statistics_are_the_same_twice(tiny_family: Path, files: Path, tmp_path: Path):
    task = ROOT / "evals" / "tiny" / "rev.yaml"
    arguments = ["--kind", "fisher", "--model", tiny_family / "rev", "--task", task, "--items", "16"]
    assert run_cli("statistics", *arguments, "--out", tmp_path / "again").returncode == 0
    assert (tmp_path / "again").read_bytes() == (files / "rev.fisher").read_bytes()


def test_statistics_of_a_search_take_its_search_items_alone(tiny_family: Path, tmp_path: Path):
    task, dealt = ROOT / "evals" / "tiny" / "rev.yaml", write_config(tmp_path, tiny_family)
    arguments = ["--kind", "fisher", "--model", tiny_family / "rev", "--task", task, "--search", dealt]
    done = run_cli("statistics", *arguments, "--out", tmp_path / "rev.fisher")
    assert done.returncode == 0, done.stderr
    (opened,) = open_tasks([TaskConfig(task=str(task))])
    config = load_config(dealt)
    wanted = [item.id for item in deal(opened, config.splits, config.seed)["search"]]
    assert read_origin(tmp_path / "rev.fisher")[0].items == {"tiny_rev": wanted}


def test_bad_arguments_of_statistics_are_one_message(tiny_family: Path, files: Path, tmp_path: Path):
    task = ROOT / "evals" / "tiny" / "rev.yaml"
    given = ["--model", tiny_family / "rev", "--task", task]
    for arguments, words in (
        (["--kind", "hessian", "--out", tmp_path / "x"], "'hessian' is not one of fisher, regmean"),
        (["--kind", "fisher", "--out", files / "rev.fisher"], "exists already"),
    ):
        done = run_cli("statistics", *given, *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def searchable(folder: Path, family: Path, method: str, files: Path | None, **changes: Any) -> Path:
    sources = [{"name": s, "path": str(family / s)} for s in SKILLS]
    for s in sources if files else []:
        s["statistics"] = str(files / f"{s['name']}.{method}")
    space: dict[str, Any] = {"weight": [0.0, 2.0]} if method != "iso_c" else {"lambda": [0.0, 2.0]}
    changes = {"method": method, "sources": sources, "space": space, "budget": {"trials": 8}} | changes
    return write_config(folder, family, **changes)


def test_a_search_refuses_statistics_of_the_items_it_judges_by(tiny_family: Path, files: Path, tmp_path: Path):
    splits = {"search": 10, "selection": 10, "holdout": 400}
    config = searchable(tmp_path, tiny_family, "fisher", files, splits=splits)
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()
    assert "belong to this search's" in done.stderr


@pytest.mark.parametrize("method", ["fisher", *(pytest.param(m, marks=pytest.mark.slow) for m in ("regmean", "tsv"))])
def test_weights_of_a_data_method_can_be_searched(method: str, tiny_family: Path, tmp_path: Path):
    files = tmp_path if method != "tsv" else None
    dealt = write_config(tmp_path, tiny_family)  # the same tasks, splits and seed
    for skill in SKILLS if files else ():
        task, out = ROOT / "evals" / "tiny" / f"{skill}.yaml", tmp_path / f"{skill}.{method}"
        write_gathered(method, tiny_family / skill, [task], 8, out, load_config(dealt))
    config = searchable(tmp_path, tiny_family, method, files)
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = run_cli("export", tmp_path / "run", "--out", tmp_path / "out", "--trial", "7")
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
