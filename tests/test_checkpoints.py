"""Quantised checkpoints, tables of integers, and configurations that give the same weights another meaning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import write_adapter, write_llama
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.live import open_live_model
from evomerge.merge.recipe.recipe import load_recipe
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.config_differences import compare_configs
from evomerge.sources.open_models import open_models
from evomerge.sources.quantised import packed_tensor
from evomerge.sources.tensor_names import is_computed_buffer

Q = "model.layers.0.self_attn.q_proj"
U8, I8, I32, F8 = torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn


def change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return folder


def change_weights(folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
    return folder


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(dtype)


# Quantised checkpoints.  Names, types and shapes as bitsandbytes 0.50 and the other libraries write them.

PACKED: dict[str, tuple[dict[str, torch.Tensor | None], dict[str, Any]]] = {
    "bitsandbytes, 4 bit": (
        {f"{Q}.weight": zeros(U8, 128, 1), f"{Q}.weight.absmax": zeros(torch.float32, 4),
         f"{Q}.weight.quant_map": zeros(torch.float32, 16),
         f"{Q}.weight.quant_state.bitsandbytes__nf4": zeros(U8, 77)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}),
    "bitsandbytes, 8 bit": (
        {f"{Q}.weight": zeros(I8, 16, 16), f"{Q}.SCB": zeros(torch.float32, 16), f"{Q}.weight_format": zeros(U8, 1)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "GPTQ": (
        {f"{Q}.weight": None, f"{Q}.qweight": zeros(I32, 2, 16), f"{Q}.qzeros": zeros(I32, 1, 2),
         f"{Q}.scales": zeros(torch.float16, 1, 16), f"{Q}.g_idx": zeros(I32, 16)},
        {"quant_method": "gptq", "bits": 4}),
    "AWQ": (
        {f"{Q}.weight": None, f"{Q}.qweight": zeros(I32, 16, 2), f"{Q}.qzeros": zeros(I32, 1, 2),
         f"{Q}.scales": zeros(torch.float16, 1, 16)},
        {"quant_method": "awq", "bits": 4}),
    "FP8": (
        {f"{Q}.weight": zeros(F8, 16, 16), f"{Q}.weight_scale_inv": zeros(torch.float32, 2, 2)},
        {"quant_method": "fp8", "weight_block_size": [8, 8]}),
    "compressed-tensors": (
        {f"{Q}.weight": None, f"{Q}.weight_packed": zeros(I32, 16, 2), f"{Q}.weight_scale": zeros(torch.float16, 16, 1),
         f"{Q}.weight_shape": torch.tensor([16, 16])},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "MXFP4": (
        {"model.layers.0.mlp.experts.gate_up_proj_blocks": zeros(U8, 2, 16, 1, 16),
         "model.layers.0.mlp.experts.gate_up_proj_scales": zeros(U8, 2, 16, 1)},
        {"quant_method": "mxfp4"}),
    "HQQ": (
        {f"{Q}.weight": None, f"{Q}.W_q": zeros(U8, 8, 16), f"{Q}.scale": zeros(torch.float16, 1),
         f"{Q}.zero": zeros(torch.float16, 1)},
        {"quant_method": "hqq"}),
    "torchao": (
        {f"{Q}.weight": None, f"{Q}.weight_qdata": zeros(I8, 16, 16), f"{Q}.weight_scale": zeros(torch.float32, 16)},
        {"quant_method": "torchao"}),
    "MLX": (
        {f"{Q}.weight": torch.zeros((16, 2), dtype=torch.uint32), f"{Q}.scales": zeros(torch.float16, 16, 1),
         f"{Q}.biases": zeros(torch.float16, 16, 1)},
        {"bits": 4, "group_size": 64}),
}  # fmt: skip


@pytest.mark.parametrize("said", [True, False], ids=["said", "by names alone"])
@pytest.mark.parametrize("kind", PACKED)
def test_a_quantised_base_and_source_are_never_merged(tmp_path: Path, kind: str, said: bool) -> None:
    tensors, settings = PACKED[kind]
    base, source = (change_weights(write_llama(tmp_path / n, seed), **tensors) for n, seed in (("base", 0), ("it", 1)))
    plain = write_llama(tmp_path / "plain")
    if said:
        change_config(base, quantization_config=settings)
        change_config(source, text_config={"quantization_config": settings})
    for models in ((base, source), (plain, source), (base, plain)):
        with pytest.raises(EvomergeError, match=r"is quantised \(.*cannot be merged.*unquantised model"):
            open_models(models[0], {"it": models[1]}, strict=False)


def test_the_message_names_the_kind_a_tensor_and_the_python_that_dequantises(tmp_path: Path) -> None:
    tensors, _ = PACKED["bitsandbytes, 4 bit"]
    folder = change_weights(write_llama(tmp_path / "it"), **tensors)
    with pytest.raises(EvomergeError) as caught:
        open_checkpoint(folder)
    assert f"is quantised (bitsandbytes, 4 bit): tensor {Q}.weight has the type U8" in str(caught.value)
    assert f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).dequantize().save_pretrained(" in str(caught.value)


def test_merge_inspect_and_an_adapter_refuse_a_quantised_base(tmp_path: Path) -> None:
    tensors, settings = PACKED["bitsandbytes, 8 bit"]
    base = change_config(write_llama(tmp_path / "base"), quantization_config=settings)
    adapter = write_adapter(tmp_path / "lora", base)
    change_weights(base, **tensors)
    recipe = {"method": "linear", "base": {"path": "base"}, "sources": [{"name": "it", "path": "lora"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"parameters": {"weight": 1.0}}))
    commands = [
        ["inspect", str(base), str(adapter)],
        ["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "o")],
    ]
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, EvomergeError) or result.exit_code == 2
        assert "bitsandbytes, 8 bit" in str(result.exception) + result.output
    assert not (tmp_path / "o").exists()


def test_an_adapter_of_a_quantised_base_merges_onto_the_plain_one_with_a_note(tmp_path: Path) -> None:
    base, trained_on = write_llama(tmp_path / "base"), write_llama(tmp_path / "packed" / "base")
    change_config(trained_on, quantization_config=PACKED["bitsandbytes, 4 bit"][1])
    for number, declared in enumerate((str(trained_on), "somebody/base-bnb-4bit")):
        adapter = write_adapter(tmp_path / f"lora{number}", base, base_model_name_or_path=declared)
        notes = open_models(base, {"it": adapter}).compatibility.notes
        assert [n for n in notes if n.startswith(f"it: was trained on a quantised model, {declared} (b")]


def test_plain_weights_whose_config_asks_for_quantisation_are_refused_with_the_cure(tmp_path: Path) -> None:
    folder = change_config(write_llama(tmp_path / "it"), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(EvomergeError, match=r"`quantization_config` \(gptq, 4 bit\), but no tensor is packed"):
        open_checkpoint(folder)
    assert open_checkpoint(change_config(folder, quantization_config=None)).tensors


def test_a_folder_of_gguf_files_says_how_it_becomes_safetensors(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "it")
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    with pytest.raises(EvomergeError, match=r"gguf_file='model-Q4_K_M\.gguf'"):
        open_checkpoint(folder)


def test_a_model_that_lacks_a_tensor_is_not_scored(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "it")
    left = load_file(folder / "model.safetensors")
    del left["model.layers.1.mlp.down_proj.weight"]
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvomergeError, match=r"lacks 1 tensor\(s\) of .*: model.layers.1.mlp.down_proj.weight"):
        open_live_model(folder, None, "float32", torch.device("cpu"))


def test_the_line_that_dequantises_fp8_gives_the_weights_in_float64(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = write_llama(tmp_path / "it")
    plain = load_file(folder / "model.safetensors")
    truth, changes = {n: x.double() for n, x in plain.items()}, {}
    for name, x in plain.items():
        if "proj" in name:
            blocks = x.unflatten(1, (-1, 8)).unflatten(0, (-1, 8))  # (rows / 8, 8, columns / 8, 8)
            scale = blocks.abs().amax((1, 3)) / 448
            packed = (blocks / scale[:, None, :, None]).to(F8)
            truth[name] = (packed.double() * scale.double()[:, None, :, None]).reshape(x.shape)
            changes |= {name: packed.reshape(x.shape), f"{name}_scale_inv": scale}
    change_weights(folder, **changes)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(EvomergeError) as caught:
        open_checkpoint(folder)
    live, _ = open_live_model(folder, None, "float32", torch.device("cpu"))  # `evaluate` leaves it to transformers
    for name, parameter in live.named_parameters():
        torch.testing.assert_close(parameter.double(), truth[name], rtol=1e-6, atol=1e-7)
    line = str(caught.value).split("transformers: ")[1]
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "FineGrainedFP8Config": FineGrainedFP8Config}
    eval(line.replace("FOLDER", "OUT"), names | {"OUT": tmp_path / "plain"})
    found = open_checkpoint(tmp_path / "plain")
    assert found.tensors.keys() == plain.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(found.read(name).double(), tensor, rtol=1e-6, atol=1e-7)


def test_tables_that_plain_models_store_are_not_taken_for_packed_weights() -> None:
    tables = {"h.0.attn.bias": "U8", "h.0.attn.masked_bias": "F32", "embeddings.position_ids": "I64",
              "model.layers.0.mlp.gate.tid2eid": "I32", "model.layers.0.mlp.gate.weight": "F32",
              "a.batch_norm.num_batches_tracked": "I64", "a.batch_norm.running_mean": "F32"}  # fmt: skip
    assert packed_tensor(tables) is None


# Tables beside the weights


def test_integers_that_differ_are_refused_and_equal_ones_are_the_bases(tmp_path: Path) -> None:
    table = "model.layers.0.mlp.gate.tid2eid"
    base = change_weights(write_llama(tmp_path / "base"), **{table: torch.arange(4)})
    same = change_weights(write_llama(tmp_path / "same", 1), **{table: torch.arange(4)})
    other = change_weights(write_llama(tmp_path / "other", 1), **{table: torch.arange(4) + 1})
    kind = change_weights(write_llama(tmp_path / "kind", 1), **{table: torch.arange(4).float()})
    assert open_models(base, {"it": same}).compatibility.notes == []
    problems = open_models(base, {"it": other, "kind": kind}, strict=False).compatibility.problems
    assert [p.split(":")[0] for p in problems] == ["it", "kind"]
    assert f"the integers of {table} are not the base model's" in problems[0]


@pytest.mark.parametrize("owner", ["base", "it"])
@pytest.mark.parametrize(
    "table", ["model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.masked_bias", "a.position_ids"]
)
def test_computed_tables_of_one_model_are_left_out_with_a_note(tmp_path: Path, owner: str, table: str) -> None:
    folders = {"base": write_llama(tmp_path / "base"), "it": write_llama(tmp_path / "it", 1)}
    plain = open_checkpoint(folders["base"]).tensors.keys()
    change_weights(folders[owner], **{table: torch.ones(4)})
    models = open_models(folders["base"], {"it": folders["it"]})
    assert models.base.tensors.keys() == plain
    assert [n for n in models.compatibility.notes if n.startswith(f"{owner}: stores 1 table(s)") and table in n]


# Configurations


def llama(**settings: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, **settings}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (llama(), llama(rope_theta=10000.0, rms_norm_eps=1e-6, num_key_value_heads=2, head_dim=8, hidden_act="silu")),
        (llama(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}),
         llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})),
        (llama(attention_dropout=0.1, torch_dtype="float16"), llama(dtype="float32", use_cache=False)),
        ({"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4}, {"model_type": "gemma3_text"}),
        ({"model_type": "phi", "partial_rotary_factor": 0.5}, {"model_type": "phi"}),
        ({"model_type": "nobodys", "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
         {"model_type": "nobodys", "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}}),
    ],
)  # fmt: skip
def test_equal_meaning_is_no_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert compare_configs(ours, theirs) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (llama(), llama(rope_theta=5e5), [("rope_parameters.rope_theta", "rope_theta")]),
        (llama(), llama(rope_scaling={"rope_type": "linear", "factor": 2.0}),
         [("rope_parameters.factor", "rope_scaling"), ("rope_parameters.rope_type", "rope_scaling")]),
        (llama(max_position_embeddings=64), llama(max_position_embeddings=128), [("max_position_embeddings", "note")]),
        (llama(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
         llama(max_position_embeddings=128, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
         [("max_position_embeddings", "rope_scaling")]),
        (llama(), llama(rms_norm_eps=1e-5), [("rms_norm_eps", "note")]),
        (llama(), llama(hidden_act="gelu"), [("hidden_act", "structure")]),
        (llama(), llama(num_key_value_heads=1), [("num_key_value_heads", "structure")]),
        ({"model_type": "gemma2"},
         {"model_type": "gemma2", "final_logit_softcapping": 10.0, "query_pre_attn_scalar": 9},
         [("final_logit_softcapping", "note"), ("query_pre_attn_scalar", "note")]),
        ({"model_type": "granite"}, {"model_type": "granite", "embedding_multiplier": 12.0},
         [("embedding_multiplier", "note")]),
        ({"model_type": "qwen3"}, {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 99},
         [("sliding_window", "note"), ("use_sliding_window", "note")]),
        ({"model_type": "gemma3", "text_config": {}}, {"model_type": "gemma3", "text_config": {"rope_theta": 7.0}},
         [("text_config.rope_parameters.full_attention.rope_theta", "rope_theta")]),
        ({"model_type": "nobodys"}, {"model_type": "nobodys", "strange_scale": 3}, [("strange_scale", "note")]),
    ],
)  # fmt: skip
def test_what_gives_weights_another_meaning_is_found(
    ours: dict[str, Any], theirs: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    found = {(d.key, d.kind) for d in compare_configs(ours, theirs)}
    assert set(expected) <= found
    if ours["model_type"] != "qwen3":  # whose sliding window changes the layers' types, too
        assert found == set(expected)


def test_another_rope_base_is_refused_unless_the_recipe_allows_it_by_name(tmp_path: Path) -> None:
    write_llama(tmp_path / "base")
    change_config(write_llama(tmp_path / "it", 1), rope_theta=5e5, rms_norm_eps=1e-5)
    content = {"method": "linear", "base": {"path": "base"}, "sources": [{"name": "it", "path": "it"}],
               "parameters": {"weight": 1.0}}  # fmt: skip
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(content))
    refused = CliRunner().invoke(app, ["merge", str(file), "--out", str(out)])
    assert "rope_parameters.rope_theta is 500000.0, in the base model 10000.0" in str(refused.exception)
    assert "allow_differences: [rope_theta]" in str(refused.exception)
    file.write_text(yaml.safe_dump(content | {"allow_differences": ["rope_theta"]}))
    merged = CliRunner().invoke(app, ["merge", str(file), "--out", str(out)])
    assert merged.exit_code == 0, merged.output
    assert "rope_parameters.rope_theta is 500000.0, in the base model 10000.0; the output has the base" in merged.output
    assert "rms_norm_eps is 1e-05, in the base model 1e-06; the output has the base model's" in merged.output
    assert load_recipe(out / "recipe.yaml").allow_differences == ["rope_theta"]
    again = ["reproduce", str(out / "recipe.yaml"), "--out", str(tmp_path / "again"), "--check", str(out)]
    assert CliRunner().invoke(app, again).exit_code == 0


def test_a_difference_of_another_name_cannot_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_differences"):
        SearchConfig.model_validate({"allow_differences": ["hidden_size"]})
    assert not is_computed_buffer("model.layers.0.self_attn.q_proj.bias")
