"""A merge as a LoRA adapter: PEFT's model with it computes what the merged model computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_adapter, write_family, write_llama
from safetensors.torch import load_file, save_file
from small_models import model_class, new_model
from test_adapters import load, logits, peft, trained, write_base

from evomerge.api.lora import extract_lora
from evomerge.api.merge import merge
from evomerge.errors import EvomergeError
from evomerge.merge.output.lora.card import base_and_revision
from evomerge.merge.output.lora.factors import SMALL, truncated
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
SOME: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}


def recipe_of(base: Path, method: str, weights: dict[str, Any], **sources: Path) -> Recipe:
    listed = [
        RecipeSource(name=name, path=str(path), parameters={"weight": weights[name]} if name in weights else {})
        for name, path in sources.items()
    ]
    return Recipe(method=method, dtype="float32", base=Model(path=str(base)), sources=listed)


def both(recipe: Recipe, folder: Path, lora: int | str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the merged model, and of PEFT's model with the adapter that is written to folder/lora."""
    merge(recipe, out=folder / "model", show=False)
    merge(recipe, out=folder / "lora", lora=lora, show=False)
    model = peft.PeftModel.from_pretrained(load(Path(recipe.base.path)), folder / "lora").eval()
    return logits(load(folder / "model")), logits(model)


# architecture, what is adapted by the first and by the second adapter, keys of the base's configuration
EXACT: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "other layers, ranks and scales": (
        "llama",
        SOME | {"alpha_pattern": {"q_proj": 1}},
        {"target_modules": ["q_proj", "up_proj"], "r": 3, "use_rslora": True, "layers_to_transform": [1]},
        {},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"]}, {"target_modules": ["c_proj", "lm_head"], "r": 4}, {}),
    "biases": ("qwen2", SOME | {"bias": "lora_only"}, {"target_modules": ["k_proj"], "lora_bias": True}, {}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}, SOME, {}),
    "a tied embedding": ("llama", {"target_modules": ["embed_tokens"]}, SOME, {"tie_word_embeddings": True}),
    "whole modules": ("llama", SOME | {"modules_to_save": ["lm_head", "norm"]}, {"target_modules": ["up_proj"]}, {}),
    "attention of a mixture": ("qwen3_moe", {"target_modules": ["q_proj"]}, {"target_modules": ["o_proj"]}, {}),
    "trained tokens": ("llama", SOME | {"trainable_token_indices": [4, 7]}, SOME | {"r": 1}, {}),
}


USUAL = ("other layers, ranks and scales", "biases", "a tied embedding")  # the others run in `make test-slow`


@pytest.mark.parametrize(
    ("architecture", "first", "second", "config"),
    [pytest.param(*case, id=name, marks=() if name in USUAL else pytest.mark.slow) for name, case in EXACT.items()],
)
def test_a_sum_of_adapters_is_an_adapter(
    architecture: str, first: dict[str, Any], second: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", architecture, **config)
    one, two = trained(base, tmp_path / "one", **first), trained(base, tmp_path / "two", **second)
    recipe = recipe_of(base, "task_arithmetic", {"one": 0.6, "two": [0.9, -0.4]}, one=one, two=two)
    expected, found = both(recipe, tmp_path, "exact")
    assert (expected - logits(load(base))).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_exact_adapter_has_the_sum_of_the_ranks_and_only_where_sources_count(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    one, two = trained(base, tmp_path / "one", **SOME), trained(base, tmp_path / "two", r=3, target_modules=["q_proj"])
    recipe = recipe_of(base, "task_arithmetic", {"one": [0.5, 0.0], "two": [1.0, 1.0]}, one=one, two=two)
    both(recipe, tmp_path, "exact")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    ranks = dict.fromkeys(("layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"), config["r"])
    ranks |= {name.removeprefix("model."): rank for name, rank in config["rank_pattern"].items()}
    assert ranks == {"layers.0.self_attn.q_proj": 5, "layers.0.mlp.down_proj": 2, "layers.1.self_attn.q_proj": 3}
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert sorted(config["target_modules"]) == ["model.layers.0.mlp.down_proj", "q_proj"]
    merged = peft.PeftModel.from_pretrained(load(base), tmp_path / "lora").merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_an_exact_adapter_is_what_peft_concatenates(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    one, two = trained(base, tmp_path / "one", **SOME), trained(base, tmp_path / "two", r=3, target_modules=["q_proj"])
    model = peft.PeftModel.from_pretrained(load(base), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.2], "both", combination_type="cat")
    model.set_adapter("both")
    recipe = recipe_of(base, "task_arithmetic", {"one": 0.7, "two": 0.2}, one=one, two=two)
    torch.testing.assert_close(both(recipe, tmp_path, "exact")[1], logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "weights", "reason"),
    [
        ("ties", {"one": 1.0, "two": 1.0}, "ties is not linear in its sources; give a rank instead of `exact`"),
        ("task_arithmetic", {"one": 1.0, "full": 1.0}, "source full is not a LoRA adapter"),
        ("linear", {"one": 0.2, "two": 0.3}, "the coefficients of linear add up to 0.5 at lm_head.weight"),
    ],
)
def test_other_merges_have_no_exact_adapter(
    method: str, weights: dict[str, float], reason: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "llama")
    folders = {name: trained(base, tmp_path / name, **SOME) for name in ("one", "two") if name in weights}
    if "full" in weights:
        merge(recipe_of(base, "linear", {}, one=folders["one"]), out=tmp_path / "full", show=False)
        folders["full"] = tmp_path / "full"
    recipe = recipe_of(base, method, weights, **folders)
    if method == "linear":
        recipe.parameters["normalize"] = False
    with pytest.raises(EvomergeError) as error:
        merge(recipe, out=tmp_path / "lora", lora="exact", show=False)
    assert reason in str(error.value)
    assert not (tmp_path / "lora").exists()


def test_a_rank_that_suffices_loses_nothing_and_a_smaller_one_the_least(tmp_path: Path) -> None:
    """The squared difference is what the smaller singular values hold, the least that this rank can lose."""
    base = write_base(tmp_path / "base", "llama")
    one, two = trained(base, tmp_path / "one", **SOME), trained(base, tmp_path / "two", r=3, target_modules=["q_proj"])
    recipe = recipe_of(base, "ties", {"one": 1.0, "two": 0.5}, one=one, two=two)
    recipe.parameters["density"] = 0.5
    expected, found = both(recipe, tmp_path, 16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    merge(recipe, out=tmp_path / "small", lora=2, show=False)
    merged = peft.PeftModel.from_pretrained(load(base), tmp_path / "small").merge_and_unload().state_dict()
    whole, origin = open_checkpoint(tmp_path / "model"), open_checkpoint(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    values = torch.linalg.svdvals(whole.read(name) - origin.read(name))
    lost = (merged[name] - whole.read(name)).square().sum()
    assert float(lost) == pytest.approx(float(values[2:].square().sum()), rel=1e-3)


def test_fine_tunes_become_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms, embeddings and head, which change too, are stored whole; with `embed_lora` the matrices are not."""
    family = write_family(tmp_path)
    extract_lora(str(family["base"]), [str(family["one"]), f"b={family['two']}"], tmp_path / "out", 16)
    assert "stored whole, as they have no low rank" in capsys.readouterr().out
    for name, folder in (("one", "one"), ("b", "two")):
        model = peft.PeftModel.from_pretrained(load(family["base"]), tmp_path / "out" / name)
        torch.testing.assert_close(logits(model), logits(load(family[folder])), rtol=1e-4, atol=1e-5)
    extract_lora(str(family["base"]), [str(family["one"])], tmp_path / "small", 2, embed_lora=True)
    said = capsys.readouterr().out
    assert "an adapter of rank 2, 16 matrices; it keeps" in said
    assert "stored whole, as they have no low rank: 5" in said


def test_a_large_matrix_keeps_the_energy_of_a_full_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SMALL + 200, SMALL + 100, generator=generator) * torch.linspace(1, 0.05, SMALL + 100)
    factors = truncated(x, 12, 0.0)
    assert factors is not None
    values = torch.linalg.svdvals(x.double())
    best = float(values[:12].square().sum() / values.square().sum())
    lost = float((x - factors.left @ factors.right).double().square().sum() / x.double().square().sum())
    assert factors.energy == pytest.approx(best, rel=1e-3)
    assert 1 - lost == pytest.approx(factors.energy, rel=1e-5)


def test_an_adapted_embedding_is_a_pair_though_peft_saves_a_copy_of_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    one = trained(base, tmp_path / "one", target_modules=["embed_tokens"])
    two = trained(base, tmp_path / "two", target_modules=["lm_head"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(one / "adapter_model.safetensors")
    expected, found = both(
        recipe_of(base, "task_arithmetic", {"one": 0.6, "two": 0.9}, one=one, two=two), tmp_path, "exact"
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert {name.rpartition(".lora_")[1] for name in load_file(tmp_path / "lora" / "adapter_model.safetensors")} == {
        ".lora_"
    }


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 1e38])
def test_an_adapter_that_is_not_finite_is_refused_as_the_model_is(spoilt: float, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    one = write_adapter(tmp_path / "one", base)
    tensors = load_file(one / "adapter_model.safetensors")
    save_file({k: v * spoilt for k, v in tensors.items()}, one / "adapter_model.safetensors")
    for lora in (None, "exact", 2):
        with pytest.raises(EvomergeError, match=r"this recipe makes no usable .*_proj.weight is not finite"):
            merge(
                recipe_of(base, "task_arithmetic", {"one": 1.0}, one=one), out=tmp_path / "out", lora=lora, show=False
            )
    assert not (tmp_path / "out").exists()


def test_a_classifier_whose_head_is_the_base_s_is_opened_by_peft(tmp_path: Path) -> None:
    """PEFT demands a copy of the head of an adapter that says it is one of a classifier."""
    base, folder = new_model("bert"), tmp_path / "base"
    base.save_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "one")
    one = recipe_of(folder, "task_arithmetic", {"one": 0.5}, one=tmp_path / "one")
    merge(one, out=tmp_path / "lora", lora="exact", show=False)
    merge(one, out=tmp_path / "model", show=False)
    found = peft.PeftModel.from_pretrained(model_class("bert").from_pretrained(folder), tmp_path / "lora")
    expected = model_class("bert").from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-5)
    assert "from transformers import BertForSequenceClassification" in (tmp_path / "lora" / "README.md").read_text()


def test_an_adapter_names_the_commit_of_its_base() -> None:
    def base(path: str) -> Recipe:
        return Recipe(method="passthrough", base=Model(path=path), sources=[RecipeSource(name="a", path="a")])

    assert base_and_revision(base("lab/small@0123abc")) == ("lab/small", "0123abc")
    assert base_and_revision(base("/models/small")) == ("/models/small", None)
