"""Layer assembly: slices of models, one after the other, are the layers that a hand would have copied or merged."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import llama_shapes, write_adapter, write_llama
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config, Qwen3MoeConfig

from evomerge.errors import EvomergeError
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise, materialise_tensor
from evomerge.merge.methods import METHODS
from evomerge.merge.output.compare import model_differences
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.pinned_inputs import check_fingerprints
from evomerge.merge.recipe.recipe import Recipe, load_recipe
from evomerge.merge.recipe.slices import Slice
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.tensor_names import name_in_layer, tensor_role

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Folders = Mapping[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A base of 3 layers, `one` of 3 and `two` of 4."""
    folder = tmp_path_factory.mktemp("models")
    depths = {"base": 3, "one": 3, "two": 4}
    return {
        name: write_llama(folder / name, seed, layers=depth, change=0.3)
        for seed, (name, depth) in enumerate(depths.items())
    }


def recipe_of(models: Folders, slices: list[dict[str, list[int]]], method: str = "linear", **keys: Any) -> Recipe:
    used = [n for n in models if n != "base" and any(n in layers for layers in slices)]
    content = {
        "method": method,
        "dtype": "float32",
        "base": {"path": str(models["base"])},
        "sources": [{"name": n, "path": str(models[n])} for n in used],
        "slices": [{"layers": layers} for layers in slices],
    }
    return Recipe.model_validate(content | keys)


def merged(recipe: Recipe) -> dict[str, Tensor]:
    """The candidate as the live model gets it."""
    bank = open_bank(recipe)
    model = candidate_model(bank, torch.float32)
    places = destinations(model, bank)
    materialise(recipe, bank, places)
    return places


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def layer(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One layer's tensors under the names of layer 0."""
    return {name_in_layer(n, 0): t for n, t in tensors.items() if tensor_role(n).layer == number}


def same(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


# --- What is assembled ---


def test_one_source_per_slice_stacks_the_layers_of_several_models(models: Folders):
    found = merged(recipe_of(models, [{"one": [0, 2]}, {"two": [1, 4]}, {"one": [1, 2]}]))
    one, two = weights(models["one"]), weights(models["two"])
    expected = [(one, 0), (one, 1), (two, 1), (two, 2), (two, 3), (one, 1)]
    assert max(tensor_role(n).layer or 0 for n in found) == 5
    for number, (source, at) in enumerate(expected):
        assert same(layer(found, number), layer(source, at)), number
    assert torch.equal(found[EMBEDDING], one[EMBEDDING])
    assert torch.equal(found[NORM], one[NORM])
    assert torch.equal(found[HEAD], one[HEAD])


def test_embeddings_come_from_the_first_slice_and_norm_and_head_from_the_last(models: Folders):
    found = merged(recipe_of(models, [{"one": [0, 1]}, {"base": [0, 3], "one": [0, 3], "two": [1, 4]}]))
    one, two = weights(models["one"]), weights(models["two"])
    assert torch.equal(found[EMBEDDING], one[EMBEDDING])
    for name in (NORM, HEAD):
        assert torch.equal(found[name], (one[name] * 0.5 + two[name] * 0.5)), name


@pytest.mark.parametrize("method", ["slerp", "ties", "task_arithmetic"])
def test_each_layer_is_what_the_method_makes_of_the_layers_that_its_slice_names(
    method: str, models: Folders, tmp_path: Path
):
    """Against an ordinary merge of models whose layers were copied into place by hand."""
    knobs = {"t": 0.3} if method == "slerp" else {"weight": 0.7}
    rows = {"base": [2, 0, 1], "one": [0, 1, 2], "two": [3, 1, 0]}
    chosen = ["base", "one"] if method == "slerp" else list(rows)
    slices = [{n: [rows[n][i], rows[n][i] + 1] for n in chosen} for i in range(3)]
    found = merged(recipe_of(models, slices, method, parameters=knobs))
    by_hand = {n: write_llama(tmp_path / n, layers=3) for n in chosen}
    for name, folder in by_hand.items():
        have = weights(models[name])
        built = {n: have[n] for n in have if tensor_role(n).layer is None}
        for i, at in enumerate(rows[name]):
            built |= {name_in_layer(n, i): t.clone() for n, t in layer(have, at).items()}
        save_file(built, folder / "model.safetensors", metadata={"format": "pt"})
    plain = {
        "method": method, "dtype": "float32", "base": {"path": str(by_hand["base"])}, "parameters": knobs,
        "sources": [{"name": n, "path": str(by_hand[n])} for n in chosen[1:]],
    }  # fmt: skip
    assert same(found, merged(Recipe.model_validate(plain)))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.without_base])
def test_a_method_without_the_base_gives_the_same_when_the_base_is_another(name: str, models: Folders, tmp_path: Path):
    knobs = METHODS[name].knobs
    given = {k: 0.4 for k, v in knobs.items() if v.default is None}
    most = METHODS[name].sources[1] or 2
    slices = [dict(list({"one": [0, 2], "two": [2, 4]}.items())[:most])]
    models = {n: models[n] for n in ("base", *slices[0])}
    other = write_llama(tmp_path / "other", 9, layers=1)
    first = merged(recipe_of(models, slices, name, parameters=given))
    second = merged(recipe_of(models | {"base": other}, slices, name, parameters=given))
    assert same(first, second)


def test_a_slice_of_the_base_alone_is_the_base(models: Folders):
    found = merged(recipe_of(models, [{"base": [1, 3]}, {"one": [0, 1], "base": [0, 1]}], "ties",
                             parameters={"weight": 1}))  # fmt: skip
    base = weights(models["base"])
    assert same(layer(found, 0), layer(base, 1))
    assert same(layer(found, 1), layer(base, 2))
    assert torch.equal(found[EMBEDDING], base[EMBEDDING])


def test_an_adapter_gives_its_layers(models: Folders, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", models["base"])
    found = merged(recipe_of(models | {"lora": adapter}, [{"lora": [1, 2]}, {"lora": [0, 1]}]))
    plain = merged(recipe_of(models | {"lora": adapter}, [{"lora": [0, 3]}]))
    assert same(layer(found, 0), layer(plain, 1))
    assert same(layer(found, 1), layer(plain, 0))
    assert not same(layer(found, 0), layer(weights(models["base"]), 1))


def test_lists_of_coefficients_count_the_output_layers(models: Folders):
    slices = [{"one": [0, 2], "base": [0, 2]}, {"one": [0, 2], "base": [0, 2]}]
    found = merged(recipe_of(models, slices, "slerp", parameters={"t": [0.0, 1.0, 1.0, 0.0]}))
    one, base = weights(models["one"]), weights(models["base"])
    for number, (source, at) in enumerate([(base, 0), (one, 1), (one, 0), (base, 1)]):
        assert same(layer(found, number), layer(source, at)), number
    assert torch.equal(found[EMBEDDING], base[EMBEDDING])
    assert torch.equal(found[HEAD], base[HEAD])


def test_repeated_layers_have_random_masks_of_their_own(models: Folders):
    slices = [{"one": [0, 1], "base": [0, 1]}] * 2
    recipe = recipe_of(models, slices, "dare_linear", parameters={"weight": 1, "density": 0.5})
    found = merged(recipe)
    assert not same(layer(found, 0), layer(found, 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(parts=st.lists(st.tuples(st.sampled_from(["one", "two"]), st.integers(0, 2), st.integers(1, 3)), min_size=1))
def test_any_frankenmerge_is_a_list_of_copied_layers(parts: list[tuple[str, int, int]], models: Folders):
    parts = [(n, start, min(start + length, 3)) for n, start, length in parts]
    recipe = recipe_of(models, [{n: [start, end]} for n, start, end in parts])
    bank = open_bank(recipe)
    expected = [(n, at) for n, start, end in parts for at in range(start, end)]
    assert bank.layers == len(expected) == bank.layout.config["num_hidden_layers"]
    assert set(bank.names) == set(llama_shapes(layers=len(expected)))
    name = "model.layers.0.mlp.up_proj.weight"
    for number, (source, at) in enumerate(expected):
        out = torch.empty(bank.layout.tensors[name].shape)
        materialise_tensor(recipe, bank, name_in_layer(name, number), out)
        assert torch.equal(out, bank.models.sources[source].read(name_in_layer(name, at)))


def test_components_of_two_models_are_put_together_by_weights_of_one_and_zero(models: Folders):
    sources = [
        {"name": "one", "path": str(models["one"]), "parameters": {"weight": {"attention": 1, "default": 0}}},
        {"name": "base", "path": str(models["base"]), "parameters": {"weight": {"attention": 0, "default": 1}}},
    ]
    content = {"method": "linear", "dtype": "float32", "base": {"path": str(models["base"])}, "sources": sources}
    found = merged(Recipe.model_validate(content))
    one, base = weights(models["one"]), weights(models["base"])
    for name, tensor in found.items():
        assert torch.equal(tensor, (one if tensor_role(name).component == "attention" else base)[name]), name


# --- What is written ---


@pytest.mark.parametrize("slices", [
    [{"one": [0, 3]}, {"two": [1, 4]}],
    [{"base": [0, 1], "one": [1, 2], "two": [2, 3]}],
])  # fmt: skip
def test_what_is_scored_is_what_is_written_and_can_be_made_again(
    slices: list[dict[str, list[int]]], models: Folders, tmp_path: Path
):
    recipe = recipe_of(models, slices, dtype="bfloat16")
    bank = open_bank(recipe)
    live = candidate_model(bank, torch.bfloat16)
    materialise(recipe, bank, destinations(live, bank))
    full = export(recipe, bank, tmp_path / "out", model_card, shard_bytes=5000)
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == full
    check_fingerprints(full)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.num_hidden_layers == bank.layers
    for (name, here), (other, there) in zip(live.named_parameters(), opened.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(here, there), name
    assert opened.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False).shape[1] > 3
    again = load_recipe(tmp_path / "out" / "recipe.yaml")
    export(again, open_bank(again), tmp_path / "again", model_card, shard_bytes=5000)
    assert model_differences(tmp_path / "out", tmp_path / "again") == []


def test_a_candidate_overwrites_every_weight_of_the_live_model(models: Folders):
    bank = open_bank(recipe_of(models, [{"one": [0, 3]}, {"two": [0, 4]}]))
    live = candidate_model(bank, torch.float32)
    places = destinations(live, bank)
    assert sum(t.numel() for t in places.values()) == sum(p.numel() for p in live.parameters())


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        (Gemma2Config(head_dim=8), "layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1), "max_window_layers", 0),
        (Qwen2Config(), "max_window_layers", 3),
        (Qwen3MoeConfig(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, mlp_only_layers=[1], head_dim=8),
         "mlp_only_layers", [0]),
    ],
    ids=["gemma2", "qwen2, sliding", "qwen2", "qwen3_moe"],
)  # fmt: skip
def test_what_a_config_says_of_single_layers_moves_with_them(config: Any, key: str, expected: Any, tmp_path: Path):
    sizes = {
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40, "hidden_size": 16,
        "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    special = {k: v for k, v in config.to_diff_dict().items() if k != "layer_types"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(config)(**special | sizes))
    model.save_pretrained(tmp_path / "m")
    write_llama(tmp_path / "tokens")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokens" / file).rename(tmp_path / "m" / file)
    models = {"base": tmp_path / "m", "one": tmp_path / "m"}
    recipe = recipe_of(models, [{"one": [1, 3]}, {"one": [2, 3]}] if key != "layer_types" else
                       [{"one": [1, 3]}, {"one": [0, 1]}])  # fmt: skip
    bank = open_bank(recipe)
    export(recipe, bank, tmp_path / "out", model_card)
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == expected
    opened, messages = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not messages["missing_keys"]
    assert not messages["unexpected_keys"]
    live = candidate_model(bank, torch.float32)
    materialise(recipe, bank, destinations(live, bank))
    ids = torch.arange(3, 23)[None]
    assert torch.equal(live(ids).logits, opened(ids).logits)


# --- What is refused ---

REFUSED: dict[str, tuple[list[dict[str, list[int]]], str, dict[str, Any], str]] = {
    "too many layers": ([{"one": [0, 4]}], "linear", {}, "slices.0.layers.one: [0, 4] goes beyond the 3 layers of one"),
    "a list of the wrong length": (
        [{"one": [0, 3]}, {"one": [0, 1]}],
        "linear",
        {"parameters": {"weight": [1, 1, 1]}},
        "parameters.weight: has 3 values, but the slices have 4 layers",
    ),
}


@pytest.mark.parametrize(("slices", "method", "keys", "line"), REFUSED.values(), ids=REFUSED)
def test_slices_that_the_models_do_not_have_are_refused(
    slices: list[dict[str, list[int]]], method: str, keys: dict[str, Any], line: str, models: Folders
):
    with pytest.raises(EvomergeError, match=re.escape(line)):
        open_bank(recipe_of(models, slices, method, **keys))


BAD: dict[str, tuple[list[dict[str, list[int]]], dict[str, Any], str]] = {
    "unequal ranges": ([{"one": [0, 2], "two": [0, 3]}], {}, "equally long, here are one 2, two 3"),
    "backwards": ([{"one": [2, 1]}], {}, "layers.one: [2, 1] is not a range"),
    "negative": ([{"one": [-1, 1]}], {}, "layers.one: [-1, 1] is not a range"),
    "nobody": ([{"one": [0, 1]}, {}], {}, "layers: names no model"),
    "a stranger": ([{"one": [0, 1]}, {"six": [0, 1]}], {}, "slices.1.layers: 'six' is not one of base, one"),
    "no base for ties": (
        [{"one": [0, 1]}],
        {"method": "ties", "parameters": {"weight": 1}},
        "slices.0.layers: ties needs the base's layers too: `base: [start, end]`",
    ),
    "no base for slerp's one source": (
        [{"one": [0, 1]}],
        {"method": "slerp", "parameters": {"t": 0.5}},
        "slices.0.layers: slerp needs the base's layers too",
    ),
    "a source called base": (
        [{"base": [0, 1]}],
        {"sources": [{"name": "base", "path": "/models/one"}]},
        "sources: 'base' is the base's name in slices",
    ),
    "an idle source": (
        [{"one": [0, 1]}],
        {"sources": [{"name": n, "path": f"/models/{n}"} for n in ("one", "two")]},
        "slices: two has no layer in any of them",
    ),
    "too many in one slice": (
        [{"one": [0, 1], "two": [0, 1], "three": [0, 1]}],
        {"method": "passthrough"},
        "slices.0.layers: passthrough takes 1, here are 3",
    ),
}


@pytest.mark.parametrize(("slices", "keys", "line"), BAD.values(), ids=BAD)
def test_impossible_slices_are_refused_with_a_line_that_says_why(
    slices: list[dict[str, list[int]]], keys: dict[str, Any], line: str
):
    folders = {n: Path("/models") / n for n in ("base", "one", "two", "three")}
    with pytest.raises(ValueError, match=re.escape(line)):
        recipe_of(folders, slices, **keys)


def test_more_sources_than_the_method_takes_are_fine_if_no_slice_has_more(models: Folders):
    recipe = recipe_of(models | {"three": models["one"]}, [{"one": [0, 1], "two": [0, 1]}, {"base": [0, 1],
                       "three": [0, 1]}], "slerp", parameters={"t": 1.0})  # fmt: skip
    assert same(layer(merged(recipe), 0), layer(weights(models["two"]), 0))


def test_layers_of_different_widths_are_refused(models: Folders, tmp_path: Path):
    odd = write_llama(tmp_path / "odd", 5, layers=3)
    changed = weights(odd)
    name = "model.layers.2.mlp.up_proj.weight"
    changed[name] = changed[name][:-1].clone()
    save_file(changed, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvomergeError, match=re.escape("model.layers.1.mlp.up_proj.weight: is made of")):
        open_bank(recipe_of(models | {"odd": odd}, [{"one": [0, 2], "odd": [1, 3]}]))


def test_layers_of_different_tensors_are_refused(models: Folders, tmp_path: Path):
    odd = write_llama(tmp_path / "odd", 5, layers=3)
    more = weights(odd) | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(16)}
    save_file(more, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvomergeError, match=r"layer 1 of odd have different tensors, such as model\.layers\.0\.self"):
        open_bank(recipe_of(models | {"odd": odd}, [{"one": [0, 1], "odd": [1, 2]}]))


def test_a_bank_of_other_slices_is_refused(models: Folders):
    recipe = recipe_of(models, [{"one": [0, 2]}])
    with pytest.raises(EvomergeError, match="other `slices`"):
        materialise(recipe_of(models, [{"one": [0, 1]}]), open_bank(recipe), {})


def test_a_slice_knows_its_length():
    assert Slice(layers={"one": (2, 5)}).length == 3


def test_a_deeper_source_needs_slices(models: Folders):
    content = recipe_of(models, [{"two": [0, 1]}]).model_dump(exclude={"slices"})
    with pytest.raises(EvomergeError, match="num_hidden_layers is 4, in the base model 3"):
        open_bank(Recipe.model_validate(content))
    assert open_checkpoint(models["two"]).config["num_hidden_layers"] == 4
