"""Adapters and ties: the merged model computes what PEFT's own model, or transformers', computes of the same files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, llama_weights, write_adapter, write_llama, write_tokenizer, write_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.errors import EvomergeError
from evomerge.files.write import write_text
from evomerge.merge.live import candidate_model, destinations, open_live_model
from evomerge.merge.materialise import materialise
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, dump_recipe
from evomerge.sources.adapter import open_adapter
from evomerge.sources.adapter import peft_config as decisions
from evomerge.sources.adapter.parameter_names import ParameterNames
from evomerge.sources.checkpoint import open_checkpoint

peft = pytest.importorskip("peft", reason="compares with peft, which is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(3, 30)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMMON = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTURE = COMMON | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen2": COMMON,
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_inner": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mixtral": COMMON | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": MIXTURE,
    "olmoe": {k: v for k, v in MIXTURE.items() if k != "head_dim"},
    "gpt_oss": COMMON | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v3": COMMON | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    },
}  # fmt: skip


def write_base(folder: Path, architecture: str, **config: Any) -> Path:
    """A model of an architecture with random weights, as transformers saves it."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture] | config)
    model = AutoModelForCausalLM.from_config(known, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trained(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter that PEFT made on a base and saved, every weight of it moved at random."""
    wanted = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False} | config
    model = peft.get_peft_model(load(base), peft.LoraConfig(**wanted))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def recipe_of(base: Path, method: str = "linear", **sources: Path) -> Recipe:
    listed = [RecipeSource(name=name, path=str(path)) for name, path in sources.items()]
    return Recipe(method=method, base=Model(path=str(base)), sources=listed, parameters={"weight": 1}, dtype="float32")


def merged(folder: Path, recipe: Recipe) -> tuple[Any, str]:
    """The model that the command `merge` writes, as transformers loads it, and what it printed."""
    write_text(folder.with_suffix(".yaml"), dump_recipe(recipe))
    done = CliRunner().invoke(app, ["merge", str(folder.with_suffix(".yaml")), "--out", str(folder)])
    assert done.exit_code == 0, done.output
    model, loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loaded.values()), loaded
    return model.eval(), done.output


def scored(recipe: Recipe) -> Any:
    """The live model of a search with a recipe in it."""
    bank = open_bank(recipe)
    live = candidate_model(bank, torch.float32)
    materialise(recipe, bank, destinations(live, bank))
    return live


def check_as_peft(base: Path, adapter: Path, out: Path) -> tuple[Any, str]:
    """The merged model and the live one have the logits of PEFT's model."""
    expected = logits(peft.PeftModel.from_pretrained(load(base), adapter))
    assert (expected - logits(load(base))).abs().max() > 1e-2
    recipe = recipe_of(base, it=adapter)
    model, said = merged(out, recipe)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(scored(recipe)), expected, rtol=1e-4, atol=1e-4)
    return model, said


# --- Which way a weight lies, and which tensor it is ---

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, Conv1D and Linear": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]}),
    "gpt2, all told to be turned": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True}),
    "gpt2, one Linear told to be turned": ("gpt2", {"target_modules": ["lm_head"], "fan_in_fan_out": True}),
    "gpt2, biases": ("gpt2", {"target_modules": ["c_proj"], "bias": "all"}),
    "qwen2, biases of its layers": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "qwen2, lora_bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "mixtral": ("mixtral", {"target_modules": "all-linear"}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": "all-linear"}),
    "olmoe": ("olmoe", {"target_modules": "all-linear"}),
    "deepseek_v3": ("deepseek_v3", {"target_modules": "all-linear"}),
    "one of two parameters": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "stacked in the file": (
        "gpt_oss", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
    "whole experts": ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "config"), LAYERS.values(), ids=LAYERS)
def test_every_layer_is_merged_as_peft_merges_it(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": False} if architecture == "gpt2" else {}
    base = write_base(tmp_path / "base", architecture, **tied)
    adapter = trained(base, tmp_path / "it", **config)
    check_as_peft(base, adapter, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_an_adapter_on_single_experts_is_merged_into_them(tmp_path: Path) -> None:
    """As transformers 4 trained them, which kept experts one by one in memory, too."""
    base = write_base(tmp_path / "base", "mixtral")
    shapes = {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, load_file(base / "model.safetensors")
    for layer, expert, (part, (out, inner)) in ((x, e, s) for x in (0, 1) for e in range(3) for s in shapes.items()):
        module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
        a, b = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + 3 * b @ a
    adapter = write_adapter(tmp_path / "it", base, rank=2, alpha=6, targets=[])
    save_file(tensors, adapter / "adapter_model.safetensors")
    opened = open_adapter(adapter, open_checkpoint(base))
    assert len(opened.changes) == len(tensors) / 2
    for name, tensor in expected.items():
        torch.testing.assert_close(opened.read(name), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.", ""])
@pytest.mark.parametrize("stored", ["model.language_model.", "language_model.model.", "model.", ""])
def test_a_layer_is_found_under_the_name_of_another_version(stored: str, prefix: str) -> None:
    name = "layers.1.self_attn.q_proj.weight"
    names = ParameterNames(None, {f"{stored}{name}": (16, 16), f"vision_tower.{name}": (16, 16)})
    found = names.parts_of(f"{prefix}{name}")
    assert found is not None
    assert [part.tensor for part in found] == [f"{stored}{name}"]


def test_a_name_that_two_layers_could_have_is_none_of_them() -> None:
    names = ParameterNames(None, {"model.layers.0.weight": (1,), "language_model.layers.0.weight": (1,)})
    assert names.parts_of("transformer.layers.0.weight") is None


@pytest.mark.parametrize("turned", [None, True, False])
def test_a_square_layer_of_an_unknown_architecture_needs_fan_in_fan_out(turned: bool | None, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "novel", "architectures": ["Novel"]}))
    adapter = write_adapter(tmp_path / "it", base, targets=["q_proj"], fan_in_fan_out=turned)
    if turned is None:
        with pytest.raises(EvomergeError, match=r"self_attn\.q_proj\.weight is square, and transformers does not know"):
            open_adapter(adapter, open_checkpoint(base))
        return
    name = "model.layers.0.self_attn.q_proj"
    stored = load_file(adapter / "adapter_model.safetensors")
    delta = 2 * stored[f"base_model.model.{name}.lora_B.weight"] @ stored[f"base_model.model.{name}.lora_A.weight"]
    expected = llama_weights()[f"{name}.weight"] + (delta.T if turned else delta)
    torch.testing.assert_close(open_adapter(adapter, open_checkpoint(base)).read(f"{name}.weight"), expected)


# --- Tied embeddings ---

PLAIN = {"target_modules": ["q_proj"]}
TIES: dict[str, tuple[dict[str, Any], bool]] = {  # and whether the head is still the embedding
    "nothing of the pair": (PLAIN, True),
    "a whole embedding": (PLAIN | {"modules_to_save": ["embed_tokens"]}, False),
    "a whole head": (PLAIN | {"modules_to_save": ["lm_head"]}, False),
    "both whole": (PLAIN | {"modules_to_save": ["lm_head", "embed_tokens"]}, False),
    "both whole, kept tied": (PLAIN | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "an adapted embedding": ({"target_modules": ["embed_tokens"]}, False),
    "an adapted head": ({"target_modules": ["lm_head"]}, False),
    "both adapted": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "both adapted, kept tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "head named, kept tied": ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, True),
    "tokens": (PLAIN | {"trainable_token_indices": [3, 7]}, True),
    "tokens of the head": (PLAIN | {"trainable_token_indices": {"lm_head": [3, 7]}}, False),
    "tokens of both": (PLAIN | {"trainable_token_indices": {"lm_head": [3, 7], "embed_tokens": [9]}}, False),
    "the same tokens": (PLAIN | {"trainable_token_indices": {"lm_head": [3, 7], "embed_tokens": [3, 7]}}, True),
}  # fmt: skip


@pytest.mark.parametrize(("config", "tied"), TIES.values(), ids=TIES)
def test_a_tie_is_kept_or_broken_as_in_pefts_model(config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """PEFT's model before it is merged: `merge_and_unload` adds into the shared matrix (with `ensure_weight_tying`
    twice), of which PEFT warns."""
    base = write_llama(tmp_path / "base", tied=True)
    model, said = check_as_peft(base, trained(base, tmp_path / "it", **config), tmp_path / "out")
    assert model.config.tie_word_embeddings == tied
    assert (HEAD in load_file(tmp_path / "out" / "model.safetensors")) == (not tied)
    assert ("the merged model has two matrices (tie_word_embeddings: false)" in said) == (not tied)


def test_an_adapter_of_an_untied_base_with_trained_tokens(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    check_as_peft(base, trained(base, tmp_path / "it", **PLAIN, trainable_token_indices=[3, 7]), tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_an_adapter_made_longer(tied: bool, tmp_path: Path) -> None:
    """PEFT saves embedding and head of a resized model whole; the adapter's tokenizer has the new tokens."""
    base = write_llama(tmp_path / "base", tied=tied)
    longer = load(base)
    torch.manual_seed(3)
    longer.resize_token_embeddings(43)
    model = peft.get_peft_model(
        longer, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "it", save_embedding_layers=True)
    write_tokenizer(tmp_path / "it", [*VOCABULARY, "v", "w", "x"])
    ids = torch.arange(3, 43)[None]
    recipe = recipe_of(base, it=tmp_path / "it").model_copy(update={"vocabulary": "it"})
    found, _ = merged(tmp_path / "out", recipe)
    assert found.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits(found, ids), logits(model.eval(), ids), rtol=1e-4, atol=1e-4)
    live, tokenizer = open_live_model(tmp_path / "it", base, "float32", torch.device("cpu"))
    torch.testing.assert_close(logits(live, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert tokenizer("vwx").input_ids == [40, 41, 42]


def test_rows_without_a_token_are_not_dropped_silently(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = write_adapter(tmp_path / "it", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    longer = {f"base_model.model.{name}": torch.ones(43, 16) for name in (EMBEDDING, HEAD)}
    save_file(tensors | longer, adapter / "adapter_model.safetensors")
    _, said = merged(tmp_path / "out", recipe_of(base, it=adapter))
    assert "it: has 43 rows in its embedding, the base model 40; the last 3 belong to no token" in said


UNTIED: dict[str, tuple[bool, dict[str, bool]]] = {  # whether base and sources are tied
    "the source is not": (True, {"one": False}),
    "the base is not": (False, {"one": True}),
    "one of two is not": (True, {"one": True, "two": False}),
    "none is": (False, {"one": False, "two": False}),
    "all are": (True, {"one": True, "two": True}),
}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
@pytest.mark.parametrize(("base_tied", "tied"), UNTIED.values(), ids=UNTIED)
def test_a_trained_head_is_merged_whichever_model_is_tied(
    base_tied: bool, tied: dict[str, bool], method: str, tmp_path: Path
) -> None:
    base = write_llama(tmp_path / "base", tied=base_tied)
    folders = {name: write_llama(tmp_path / name, seed, tied=t) for seed, (name, t) in enumerate(tied.items(), 1)}
    recipe = recipe_of(base, method, **folders)
    model, said = merged(tmp_path / "out", recipe)
    every = base_tied and all(tied.values())
    assert model.config.tie_word_embeddings == every
    assert ("the merged model has two matrices" in said) == (base_tied and not every)
    heads = [load(folder).lm_head.weight.double() for folder in folders.values()]
    if method == "linear":
        expected = sum(heads) / len(heads)
        torch.testing.assert_close(model.lm_head.weight.double(), expected, rtol=1e-6, atol=1e-6)
    live = scored(recipe)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live.state_dict()[name]), name
    again = merged(tmp_path / "again", Recipe(method="linear", base=Model(path=str(base)), dtype="float32", parameters={
        "weight": 1}, sources=[RecipeSource(name="inner", recipe=recipe)]))[0]  # fmt: skip
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_though_tied_is_tied_if_it_is_the_embedding(same: bool, tmp_path: Path) -> None:
    """As transformers loads it: two different matrices are never tied, whatever the configuration says."""
    folders = {}
    for seed, name in enumerate(("base", "one", "two")):
        folders[name] = write_llama(tmp_path / name, seed, tied=True)
        weights = llama_weights(seed)
        if same:
            weights[HEAD] = weights[EMBEDDING].clone()
        write_weights(folders[name], weights)
        assert open_checkpoint(folders[name]).ties_head == same
    recipe = recipe_of(folders.pop("base"), "dare_ties", **folders).model_copy(
        update={"parameters": {"weight": 1, "density": 0.5}}
    )
    model, _ = merged(tmp_path / "out", recipe)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == same
    live = scored(recipe)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live.state_dict()[name]), name


def test_a_broken_source_without_its_head_is_refused(tmp_path: Path) -> None:
    base, source = write_llama(tmp_path / "base"), write_llama(tmp_path / "one", 1)
    write_weights(source, {name: tensor for name, tensor in llama_weights(1).items() if name != HEAD})
    with pytest.raises(EvomergeError, match=r"one: lacks 1 tensor\(s\) of the base model: lm_head.weight"):
        open_bank(recipe_of(base, one=source))


# --- PEFT's configuration ---


def test_every_key_of_pefts_configuration_is_decided() -> None:
    decided = decisions.HONOURED | decisions.WITHOUT_EFFECT | decisions.REFUSED.keys()
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} - decided == set()
    kinds = (decisions.HONOURED, decisions.WITHOUT_EFFECT, frozenset(decisions.REFUSED))
    assert sum(map(len, kinds)) == len(decided), "a key has two decisions"


def test_pefts_defaults_are_merged(tmp_path: Path) -> None:
    peft.LoraConfig().save_pretrained(tmp_path)
    assert decisions.config_problem(json.loads((tmp_path / "adapter_config.json").read_text())) is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("alora_invocation_tokens", [3, 4], "it acts only after its invocation tokens"),
        ("kasa_config", {"a": 1}, "KaSA changes the base model's weights too"),
        ("use_qalora", True, "its base is quantised"),
        ("use_bdlora", {"a": 1}, "block-diagonal"),
        ("arrow_config", {"a": 1}, "routes between several adapters"),
        ("monteclora_config", {"a": 1}, "its weights are sampled"),
        ("megatron_config", {"a": 1}, "Megatron's parallel layers"),
        ("layer_replication", [[0, 2]], "layers are not the base model's"),
        ("init_lora_weights", "novel", "which may change the base model too"),
        ("some_new_setting", 3, "a setting of a newer PEFT"),
        ("modules_to_save", "lm_head", "must be a list of names"),
        ("trainable_token_indices", ["a"], "must be lists of token ids"),
        ("trainable_token_indices", {"lm_head": 3}, "must be lists of token ids"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_its_key(key: str, value: Any, words: str) -> None:
    problem = decisions.config_problem({key: value})
    assert problem is not None
    assert problem.startswith(key)
    assert words in problem


@pytest.mark.parametrize("unset", [None, False, [], {}, ""])
def test_a_new_key_that_is_not_used_stops_nothing(unset: Any) -> None:
    assert decisions.config_problem({"some_new_setting": unset, "use_dora": unset}) is None


def test_a_bias_for_a_layer_that_has_none_is_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    adapter = trained(base, tmp_path / "it", **PLAIN, lora_bias=True)
    with pytest.raises(EvomergeError, match=r"lora_bias is set, but model\.layers\.0\.self_attn\.q_proj has no bias"):
        open_adapter(adapter, open_checkpoint(base))
