"""Sequential merges: a source that is a recipe is the model that recipe would have written, without writing it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import write_adapter, write_family, write_llama
from torch import Tensor
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import NotFinite, materialise
from evomerge.merge.methods import METHODS
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe import nested
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.pinned_inputs import check_fingerprints, without_fingerprints
from evomerge.merge.recipe.recipe import Recipe, dump_recipe, load_recipe, models_on_disk
from evomerge.sources.checkpoint import open_checkpoint

Folders = dict[str, Path]


@pytest.fixture
def family(tmp_path: Path) -> Folders:
    return write_family(tmp_path / "models", ["one", "two", "three"], dtype=torch.bfloat16, change=0.3)


def content(method: str, base: Path, sources: dict[str, Any], dtype: str = "bfloat16", **parameters: Any) -> Any:
    """A recipe as plain data.  sources: a path or another recipe's data by name."""
    listed = [{"name": n, "recipe" if isinstance(s, dict) else "path": s if isinstance(s, dict) else str(s)}
              for n, s in sources.items()]  # fmt: skip
    return {"method": method, "dtype": dtype, "base": {"path": str(base)}, "sources": listed, "parameters": parameters}


def three_in_a_row(family: Folders, inner: str = "ties", outer: str = "slerp", dtype: str = "bfloat16") -> Recipe:
    """one with two, the result with three."""
    knobs = {k: 0.5 for k, v in METHODS[inner].knobs.items() if v.default is None}
    first = content(inner, family["base"], {"one": family["one"], "two": family["two"]}, dtype, **knobs)
    knobs = {k: 0.5 for k, v in METHODS[outer].knobs.items() if v.default is None}
    return Recipe.model_validate(content(outer, family["base"], {"ab": first, "three": family["three"]}, **knobs))


def written(recipe: Recipe, folder: Path) -> Path:
    export(recipe, open_bank(recipe), folder, model_card)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def as_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The same merge with every nested recipe written to disk first."""
    plain = recipe.model_copy(deep=True)
    for source in plain.sources:
        if source.recipe:
            source.path = str(written(as_paths(source.recipe, folder / source.name), folder / source.name / "model"))
            source.recipe = None
    return plain


# --- The result ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("inner", "outer"), [("ties", "slerp"), ("slerp", "dare_ties"), ("dare_linear", "linear")])
def test_a_nested_recipe_is_the_model_that_it_would_have_written(
    inner: str, outer: str, dtype: str, family: Folders, tmp_path: Path
):
    recipe = three_in_a_row(family, inner, outer, dtype)
    stepwise = as_paths(recipe, tmp_path / "steps")
    assert same(tensors(written(recipe, tmp_path / "nested")), tensors(written(stepwise, tmp_path / "stepwise")))


def test_recipes_nest_to_any_depth_and_in_any_order(family: Folders, tmp_path: Path):
    base = family["base"]
    inner = content("linear", base, {"one": family["one"], "two": family["two"]}, weight=[0.2, 0.8])
    middle = content("slerp", family["one"], {"three": family["three"], "inner": inner}, t=0.25)  # another base
    sources = {"middle": middle, "one": family["one"], "again": inner}
    recipe = Recipe.model_validate(content("task_arithmetic", base, sources, weight=0.4))
    stepwise = as_paths(recipe, tmp_path / "steps")
    assert same(tensors(written(recipe, tmp_path / "nested")), tensors(written(stepwise, tmp_path / "stepwise")))


def test_an_adapter_may_be_in_a_nested_recipe(family: Folders, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", family["base"])
    first = content("linear", family["base"], {"lora": adapter, "two": family["two"]})
    recipe = Recipe.model_validate(content("slerp", family["base"], {"ab": first, "three": family["three"]}, t=0.5))
    stepwise = as_paths(recipe, tmp_path / "steps")
    assert same(tensors(written(recipe, tmp_path / "nested")), tensors(written(stepwise, tmp_path / "stepwise")))


def test_slices_may_take_layers_of_a_nested_recipe_and_be_nested(family: Folders, tmp_path: Path):
    stack = content("linear", family["base"], {"one": family["one"], "two": family["two"]})
    stack["slices"] = [{"layers": {"one": [0, 2]}}, {"layers": {"two": [0, 2]}}]
    deep = write_llama(tmp_path / "deep", 7, layers=4, dtype=torch.bfloat16)
    recipe = content("slerp", deep, {"stack": stack}, t=0.5)
    assert Recipe.model_validate(recipe).sources[0].recipe is not None
    recipe["slices"] = [{"layers": {"base": [1, 3], "stack": [2, 4]}}]
    loaded = Recipe.model_validate(recipe)
    stepwise = as_paths(loaded, tmp_path / "steps")
    assert same(tensors(written(loaded, tmp_path / "nested")), tensors(written(stepwise, tmp_path / "stepwise")))
    recipe.pop("slices")
    whole = Recipe.model_validate(recipe)
    assert open_bank(whole).layers == 4


def test_the_live_model_gets_what_is_exported(family: Folders, tmp_path: Path):
    recipe = three_in_a_row(family)
    bank = open_bank(recipe)
    model = candidate_model(bank, torch.bfloat16)
    places = destinations(model, bank)
    materialise(recipe, bank, places)
    assert same(dict(places), tensors(written(recipe, tmp_path / "out")))


def test_nothing_but_single_tensors_is_held_when_there_is_no_room(family: Folders, monkeypatch: pytest.MonkeyPatch):
    """Without capacity every nested tensor is merged once per outer tensor, and let go before the next."""
    recipe = three_in_a_row(family, "ties", "ties")
    reads: list[str] = []
    read = nested.NestedMerge.read

    def counted(self: nested.NestedMerge, name: str) -> Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(nested.NestedMerge, "read", counted)
    bank = open_bank(recipe, capacity=0)
    expected = open_bank(recipe)
    places = {n: torch.empty(t.shape, dtype=torch.bfloat16) for n, t in bank.layout.tensors.items()}
    again = {n: torch.empty_like(t) for n, t in places.items()}
    materialise(recipe, bank, places)
    assert sorted(reads) == sorted(bank.names)
    assert not [key for key in bank.device_cache.held if key[0] == "ab"]
    assert len(bank.device_cache.in_use) <= 1
    source = bank.models.sources["ab"]
    assert isinstance(source, nested.NestedMerge)
    assert not source.bank.measurement_cache
    materialise(recipe, expected, again)
    assert same(places, again)


# --- Broken ones ---


def test_nan_inside_a_nested_merge_is_found(tmp_path: Path):
    family = write_family(tmp_path / "models", ["one", "two"])
    name = "model.layers.1.mlp.up_proj.weight"
    first = content("linear", family["base"], {"one": family["one"], "two": family["two"]}, "float32",
                    weight=3e38, normalize=False)  # fmt: skip
    recipe = Recipe.model_validate(content("ties", family["base"], {"ab": first}, weight=0.0))
    bank = open_bank(recipe)
    with pytest.raises(NotFinite, match=r"in the recipe of source ab: .* is not finite after merging"):
        materialise(recipe, bank, {name: torch.empty(bank.layout.tensors[name].shape)})
    with pytest.raises(EvomergeError, match="this recipe makes no usable model: in the recipe of source ab"):
        export(recipe, bank, tmp_path / "out", model_card)


def test_what_does_not_fit_is_named_with_its_place(family: Folders, tmp_path: Path):
    deep = write_llama(tmp_path / "deep", 7, layers=4)
    first = content("linear", family["base"], {"one": family["one"], "deep": deep})
    recipe = content("slerp", family["base"], {"ab": first}, t=0.5)
    with pytest.raises(EvomergeError, match="in the recipe of source ab: these models cannot be merged:\n  deep: num_"):
        open_bank(Recipe.model_validate(recipe))
    deep_merge = content("linear", deep, {"deep": deep})
    with pytest.raises(EvomergeError, match="cannot be merged:\n  ab: num_hidden_layers is 4, in the base model 2"):
        open_bank(Recipe.model_validate(content("slerp", family["base"], {"ab": deep_merge}, t=0.5)))
    wrong = content("linear", family["base"], {"one": family["one"]}, weight=[1, 2, 3])
    with pytest.raises(EvomergeError, match=re.escape("source ab: parameters.weight: has 3 values")):
        open_bank(Recipe.model_validate(content("slerp", family["base"], {"ab": wrong}, t=0.5)))


@pytest.mark.parametrize("source", [{}, {"path": "/m", "recipe": {}}, {"path": ""}])
def test_a_source_has_a_path_or_a_recipe(source: dict[str, Any]):
    inner = content("linear", Path("/base"), {"one": Path("/one")})
    if "recipe" in source:
        source = source | {"recipe": inner}
    recipe = content("linear", Path("/base"), {}) | {"sources": [{"name": "ab", **source}]}
    with pytest.raises(ValueError, match="needs a `path` or a `recipe`, and not both"):
        Recipe.model_validate(recipe)


def test_a_mistake_in_a_nested_recipe_is_named_with_its_place(tmp_path: Path):
    inner = content("linear", Path("/base"), {"one": Path("/one")}, wait=1)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content("slerp", Path("/base"), {"ab": inner}, t=0.5)))
    with pytest.raises(EvomergeError, match=re.escape("sources.0.recipe: parameters.wait: not a coefficient of")):
        load_recipe(file)


# --- Files ---


@st.composite
def recipes(draw: st.DrawFn, depth: int = 3) -> dict[str, Any]:
    names = draw(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3, unique=True))
    sources = {n: draw(recipes(depth - 1)) if depth and draw(st.booleans()) else Path("/m") / n for n in names}
    recipe = content("linear", Path("/base"), sources, draw(st.sampled_from(["float32", "bfloat16"])))
    if draw(st.booleans()):
        recipe["slices"] = [{"layers": {n: [start, start + 2] for n in names}}
                            for start in draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))]  # fmt: skip
    recipe["seed"] = draw(st.integers(0, 9))
    recipe["base"]["sha256"] = draw(st.dictionaries(st.just("config.json"), st.text("0f", max_size=8)))
    return recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(data=recipes())
def test_a_dumped_recipe_with_recipes_and_slices_loads_as_itself(data: dict[str, Any], tmp_path: Path):
    recipe = Recipe.model_validate(data)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_relative_paths_count_from_the_file_at_any_depth(tmp_path: Path):
    inner = content("linear", Path("./base"), {"one": Path("./one")})
    outer = content("linear", Path("./base"), {"in": content("linear", Path("./base"), {"deep": inner})})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(outer).replace("path: base", "path: ./base").replace("path: one", "path: ./one"))
    found = {name: model.path for name, model in models_on_disk(load_recipe(file))}
    base, one = str(tmp_path / "base"), str(tmp_path / "one")
    assert found == {"base": base, "in/base": base, "in/deep/base": base, "in/deep/one": one}


def test_every_leaf_is_signed_and_checked(family: Folders, tmp_path: Path):
    recipe = three_in_a_row(family)
    full = export(recipe, open_bank(recipe), tmp_path / "out", model_card)
    assert {name: bool(model.sha256) for name, model in models_on_disk(full)} == dict.fromkeys(
        ["base", "ab/base", "ab/one", "ab/two", "three"], True
    )
    assert not any(model.sha256 for _, model in models_on_disk(without_fingerprints(full)))
    check_fingerprints(full)
    (family["two"] / "tokenizer_config.json").write_text("{}")
    with pytest.raises(EvomergeError) as caught:
        check_fingerprints(full)
    assert str(caught.value).splitlines()[1:] == [f"  {family['two'] / 'tokenizer_config.json'}"]


def test_the_card_names_every_model(family: Folders, tmp_path: Path):
    recipe = three_in_a_row(family)
    (family["two"] / "README.md").write_text("---\nlicense: mit\n---\n")
    card = model_card(recipe)
    assert "| ab/two | two | mit |" in card
    assert "| three | three | not stated |" in card
    assert str(family["base"].parent) not in card


def test_the_command_line_merges_and_reproduces(family: Folders, tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(three_in_a_row(family)))
    out, again = tmp_path / "out", tmp_path / "again"
    run(["merge", str(file), "--out", str(out)])
    assert "the bytes agree" in run(["reproduce", str(out / "recipe.yaml"), "--out", str(again), "--check", str(out)])


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_flat_recipe_opens_as_before(family: Folders):
    flat = Recipe.model_validate(content("linear", family["base"], {"one": family["one"]}))
    bank = open_bank(flat)
    assert isinstance(bank, Bank)
    assert bank.layout.tensors is bank.models.base.tensors
    assert not bank.layout.origins
