"""What is written loads: transformers' own `from_pretrained` finds every tensor of a folder and invents none."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import VOCABULARY, write_family, write_llama, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from evomerge.cli import main
from evomerge.errors import EvomergeError
from evomerge.merge.output.export import export
from evomerge.merge.output.model_card import model_card
from evomerge.merge.recipe.open_bank import open_bank
from evomerge.merge.recipe.recipe import Recipe

TEXT = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "projection_dim": 8,
}  # fmt: skip
SPARSE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 8,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
KINDS = ["linear_attention", "full_attention"] * 2
# Model type -> its configuration, the prefix of its layers in memory, and where it keeps their number.
STACKS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "llama": (TEXT, "model.layers.", ("num_hidden_layers",)),
    "gpt2": (
        {"vocab_size": 40, "n_embd": 16, "n_inner": 24, "n_layer": 4, "n_head": 2, "n_positions": 64},
        "transformer.h.",
        ("n_layer",),
    ),
    "qwen3_next": (TEXT | SPARSE | LINEAR | {"layer_types": KINDS}, "model.layers.", ("num_hidden_layers",)),
    "deepseek_v3": (TEXT | LATENT | {"first_k_dense_replace": 2}, "model.layers.", ("num_hidden_layers",)),
    "gemma3": (
        {"text_config": TEXT | {"sliding_window": 8, "sliding_window_pattern": 2}, "vision_config": VISION,
         "mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
        "model.language_model.layers.",
        ("text_config", "num_hidden_layers"),
    ),
    "llava": (
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"},
         "image_token_index": 5},
        "model.language_model.layers.",
        ("text_config", "num_hidden_layers"),
    ),
}  # fmt: skip


def model_class(folder: Path) -> Any:
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def write_model(folder: Path, kind: str, settings: Mapping[str, Any], seed: int) -> Path:
    """A model with random weights as transformers saves it, with a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    auto = AutoModelForImageTextToText if "vision_config" in settings else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def frankenmerge(folders: Mapping[str, Path], slices: Sequence[Mapping[str, list[int]]], **keys: Any) -> Recipe:
    used = [n for n in folders if n != "base" and any(n in part for part in slices)]
    content = {
        "method": "linear", "dtype": "float32", "base": {"path": str(folders["base"])},
        "sources": [{"name": n, "path": str(folders[n])} for n in used],
        "slices": [{"layers": dict(part)} for part in slices],
    }  # fmt: skip
    return Recipe.model_validate(content | keys)


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, messages = model_class(folder).from_pretrained(folder, output_loading_info=True)
    return model, messages


def layer(state: Mapping[str, Tensor], prefix: str, number: int) -> dict[str, Tensor]:
    start = f"{prefix}{number}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def same(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> bool:
    return bool(x) and x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


# --- Layers of every kind of architecture ---


@pytest.mark.parametrize("kind", STACKS)
def test_every_layer_of_a_frankenmerge_is_found_where_it_belongs(kind: str, tmp_path: Path):
    settings, prefix, path = STACKS[kind]
    folders = {name: write_model(tmp_path / name, kind, settings, seed) for seed, name in enumerate(("base", "one"))}
    first = 1 if kind == "deepseek_v3" else 2  # its dense layers stand before all others
    recipe = frankenmerge(folders, [{"base": [0, first]}, {"one": [1, 4]}, {"base": [2, 4]}])
    rows = [(name, at) for part in recipe.slices for name, (a, b) in part.layers.items() for at in range(a, b)]
    notes: list[str] = []
    export(recipe, open_bank(recipe), tmp_path / "out", model_card, note=notes.append)
    assert notes == []
    model, messages = loaded(tmp_path / "out")
    assert not messages["missing_keys"]
    assert not messages["unexpected_keys"]
    assert not messages["mismatched_keys"]
    written: Any = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in path:
        written = written[key]
    assert written == len(rows)
    found = model.state_dict()
    parents = {name: loaded(folders[name])[0] for name in folders}
    for number, (name, at) in enumerate(rows):
        assert same(layer(found, prefix, number), layer(parents[name].state_dict(), prefix, at)), (number, name, at)
    assert not layer(found, prefix, len(rows))
    for name, tensor in found.items():  # the towers stay as they are
        if "vision" in name or "projector" in name:
            assert torch.equal(tensor, parents["base"].state_dict()[name]), name
    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types is not None:
        kinds = parents["base"].config.get_text_config().layer_types
        assert types == [kinds[at] for _, at in rows]


def test_layers_that_predict_further_tokens_are_left_out_with_a_line(tmp_path: Path):
    settings = STACKS["deepseek_v3"][0] | {"num_nextn_predict_layers": 1}
    base = write_model(tmp_path / "base", "deepseek_v3", settings, 0)
    weights = load_file(base / "model.safetensors")
    more = {n.replace(".3.", ".4.", 1): t.clone() for n, t in weights.items() if n.startswith("model.layers.3.")}
    save_file(weights | more, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvomergeError, match=r"\[0, 5\] goes beyond the 4 layers of base"):
        open_bank(frankenmerge({"base": base, "one": base}, [{"base": [0, 5]}, {"one": [3, 4]}]))
    recipe = frankenmerge({"base": base, "one": base}, [{"base": [0, 4]}, {"one": [3, 4]}])
    notes: list[str] = []
    export(recipe, open_bank(recipe), tmp_path / "out", model_card, note=notes.append)
    assert [f"{len(more)} tensor(s) of the base lie beyond its layers" in note for note in notes] == [True]
    model, messages = loaded(tmp_path / "out")
    assert not messages["missing_keys"]
    assert not messages["unexpected_keys"]
    assert model.config.num_nextn_predict_layers == 0
    assert same(layer(model.state_dict(), "model.layers.", 4), layer(model.state_dict(), "model.layers.", 3))


REFUSED: dict[str, tuple[str, dict[str, Any], list[dict[str, list[int]]], str]] = {
    "an encoder-decoder": (
        "t5", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        [{"base": [0, 2]}, {"one": [1, 2]}], "base has several stacks of layers (a decoder, an encoder)",
    ),
    "dense layers after sparse ones": (
        "deepseek_v3", TEXT | LATENT | {"first_k_dense_replace": 2}, [{"base": [0, 4]}, {"one": [0, 2]}],
        "transformers would not load this model correctly",
    ),
    "layers scaled by their number": (
        "gpt2", STACKS["gpt2"][0] | {"scale_attn_by_inverse_layer_idx": True}, [{"base": [0, 2]}, {"one": [0, 2]}],
        "base has layers whose position decides what they compute (scale_attn_by_inverse_layer_idx)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "slices", "line"), REFUSED.values(), ids=REFUSED)
def test_slices_that_no_configuration_can_say_are_refused_before_anything_is_written(
    kind: str, settings: dict[str, Any], slices: list[dict[str, list[int]]], line: str, tmp_path: Path
):
    if kind == "t5":
        torch.manual_seed(0)
        config = transformers.T5Config(**settings)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
        write_tokenizer(tmp_path / "base")
    else:
        write_model(tmp_path / "base", kind, settings, 0)
    recipe = frankenmerge({"base": tmp_path / "base", "one": tmp_path / "base"}, slices)
    with pytest.raises(EvomergeError) as caught:
        export(recipe, open_bank(recipe), tmp_path / "out", model_card)
    assert line in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- Whole models ---


def plain(folders: Mapping[str, Path]) -> Recipe:
    sources = [{"name": n, "path": str(f)} for n, f in folders.items() if n != "base"]
    content = {"method": "linear", "dtype": "float32", "base": {"path": str(folders["base"])}, "sources": sources}
    return Recipe.model_validate(content)


def change(folders: Mapping[str, Path], **changes: Tensor | None) -> None:
    """Add or replace tensors of every model; None takes one away."""
    for folder in folders.values():
        weights: dict[str, Any] = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({UP: None}, f"1 tensor(s) are missing, transformers would fill them with random numbers: {UP}"),
    "misshapen": ({UP: torch.zeros(20, 16)}, f"1 tensor(s) have another shape: {UP}, (20, 16) for (24, 16)"),
}


@pytest.mark.parametrize(("changes", "line"), BROKEN.values(), ids=BROKEN)
def test_a_folder_that_would_not_load_is_refused_before_anything_is_written(
    changes: dict[str, Tensor | None], line: str, tmp_path: Path
):
    folders = write_family(tmp_path)
    change(folders, **changes)
    recipe = plain(folders)
    with pytest.raises(EvomergeError) as caught:
        export(recipe, open_bank(recipe), tmp_path / "out", model_card)
    assert line in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_the_loader_ignores_in_the_base_is_written_with_a_line(tmp_path: Path):
    folders = write_family(tmp_path)
    change(folders, **{"v_head.summary.weight": torch.ones(1, 16), "model.layers.0.self_attn.rotary_emb.inv_freq":
                       torch.ones(4)})  # fmt: skip
    recipe, notes = plain(folders), list[str]()
    export(recipe, open_bank(recipe), tmp_path / "out", model_card, note=notes.append)
    assert notes == ["transformers does not read 1 tensor(s) of the base: v_head.summary.weight"]
    assert "v_head.summary.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_an_architecture_that_transformers_does_not_know_is_written_with_a_line(tmp_path: Path):
    folders = write_family(tmp_path)
    for folder in folders.values():
        config = json.loads((folder / "config.json").read_text()) | {
            "model_type": "homegrown",
            "architectures": ["Own"],
        }
        (folder / "config.json").write_text(json.dumps(config))
    recipe, notes = plain(folders), list[str]()
    export(recipe, open_bank(recipe), tmp_path / "out", model_card, note=notes.append)
    assert [note.partition(",")[0] for note in notes] == ["transformers does not know the architecture 'homegrown'"]


def test_a_tied_head_and_a_mixture_that_is_stacked_in_memory_pass(tmp_path: Path):
    tied = write_llama(tmp_path / "tied", tied=True)
    mixture = write_model(tmp_path / "mixture", "qwen3_next", STACKS["qwen3_next"][0], 0)
    for number, folder in enumerate((tied, mixture)):
        recipe, notes = plain({"base": folder, "one": folder}), list[str]()
        export(recipe, open_bank(recipe), tmp_path / f"out{number}", model_card, note=notes.append)
        assert notes == []
        assert not loaded(tmp_path / f"out{number}")[1]["missing_keys"]


def test_a_search_whose_models_would_not_load_is_refused_before_there_is_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folders = write_family(tmp_path)
    change(folders, **{UP: None})
    (tmp_path / "search.yaml").write_text(
        json.dumps({
            "name": "x", "base": "base", "sources": [{"name": n, "path": n} for n in ("one", "two")],
            "method": "linear", "space": {"weight": [0, 1]}, "tasks": [{"task": "x"}],
        })
    )  # fmt: skip
    monkeypatch.setattr(
        "sys.argv", ["evomerge", "search", str(tmp_path / "search.yaml"), "--run", str(tmp_path / "run")]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f"1 tensor(s) are missing, transformers would fill them with random numbers: {UP}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
