"""Models on disk: what is broken is refused by name, what does not fit together is said before anything is read."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama_weights, write_adapter, write_llama, write_weights
from safetensors.torch import load_file, save_file

from evomerge.errors import EvomergeError
from evomerge.sources.adapter import Adapter, open_adapter
from evomerge.sources.checkpoint import Checkpoint, open_checkpoint
from evomerge.sources.compatibility import check_compatibility
from evomerge.sources.declared_base import declared_base
from evomerge.sources.fingerprint import model_fingerprint
from evomerge.sources.locate import locate
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import KNOWN_MODEL_TYPES, coefficient_layer, layer_count, tensor_role

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "sharded", shards=3)


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_weights(folder: Path, file: str = "model.safetensors", **changes: torch.Tensor | None) -> None:
    """Set tensors of a weight file; None removes a tensor."""
    tensors: dict[str, Any] = load_file(folder / file) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / file, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(EvomergeError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


# Checkpoints


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_reads_what_was_written(tmp_path: Path, shards: int) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path / "m", shards=shards))
    weights = llama_weights()
    assert checkpoint.tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.read(name), tensor)
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype, info.bytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)


def test_a_truncated_file_is_refused(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert refusal(llama).startswith(f"{file}: not a complete safetensors file")


@pytest.mark.parametrize("header", [b"", b"garbage", b"\xff" * 64, b"\x05\0\0\0\0\0\0\0hello", b"<html>404</html>"])
def test_a_garbage_header_is_refused(llama: Path, header: bytes) -> None:
    (llama / "model.safetensors").write_bytes(header)
    assert "model.safetensors: not a complete safetensors file" in refusal(llama)


def test_a_truncated_shard_is_refused_by_name(sharded: Path) -> None:
    file = sharded / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model-00002-of-00003.safetensors: not a complete" in refusal(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "names 1 missing file(s): model-00002-of-00003.safetensors" in refusal(sharded)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(sharded: Path) -> None:
    change_weights(sharded, "model-00001-of-00003.safetensors", **{"model.embed_tokens.weight": None})
    assert "lacks 1 tensor(s) of its index: model.embed_tokens.weight" in refusal(sharded)


@pytest.mark.parametrize("outside", ["../llama/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_cannot_name_files_outside_its_folder(llama: Path, sharded: Path, outside: str) -> None:
    change_json(sharded / INDEX, weight_map={"x": outside})
    assert f"{INDEX}: names a file outside its folder: {outside}" in refusal(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: object) -> None:
    change_json(sharded / INDEX, weight_map=weight_map)
    assert "has no `weight_map`" in refusal(sharded)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_refused_and_not_opened(llama: Path, file: str) -> None:
    (llama / "model.safetensors").rename(llama / file)
    assert f"holds a pickle checkpoint ({file}), which can run code" in refusal(llama)


def test_a_folder_without_weights_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "no model.safetensors and no" in refusal(llama)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"x"', "\0"])
def test_an_unreadable_config_is_refused(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    assert refusal(llama).startswith(f"{llama / 'config.json'}: ")


def test_a_config_that_is_not_utf8_or_missing_is_refused(llama: Path) -> None:
    (llama / "config.json").write_bytes(b"\xff\xfe{}")
    assert "config.json: cannot be read" in refusal(llama)
    (llama / "config.json").unlink()
    assert "is no model folder, it has neither config.json nor adapter_config.json" in refusal(llama)


def test_a_quantised_checkpoint_is_refused_by_its_tensor(llama: Path) -> None:
    change_weights(llama, **{Q_PROJ: torch.zeros(16, 16).to(torch.float8_e4m3fn)})
    assert f"tensor {Q_PROJ} has the type F8_E4M3, which cannot be merged" in refusal(llama)


def test_a_tied_head_that_is_not_stored_reads_as_the_embedding(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_llama(tmp_path / "tied", tied=True))
    assert checkpoint.ties_head
    assert "lm_head.weight" not in checkpoint.tensors
    assert torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("model_type", sorted(KNOWN_MODEL_TYPES))
def test_a_config_silent_about_its_head_has_the_default_of_transformers(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    silent = Checkpoint(Path(), {"model_type": model_type}, {}, {})
    assert silent.ties_head == bool(CONFIG_MAPPING[model_type]().tie_word_embeddings)


# Compatibility


def found(base: Path, source: Path) -> tuple[list[str], list[str]]:
    """(problems, notes) of merging a source called `it` into a base."""
    result = open_models(base, {"it": source}, strict=False).compatibility
    return result.problems, result.notes


def test_models_that_fit_give_no_notes(tmp_path: Path) -> None:
    base, source = write_llama(tmp_path / "base"), write_llama(tmp_path / "it", 1, shards=2)
    assert found(base, source) == ([], [])


def test_a_tensor_of_another_shape_is_named_with_both_shapes(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    change_weights(source, **{Q_PROJ: torch.zeros(8, 16)})
    problems, _ = found(llama, source)
    assert problems == [f"it: 1 tensor(s) of another shape, the first is {Q_PROJ}: (8, 16), in the base model (16, 16)"]


def test_missing_and_extra_tensors_are_named(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    change_weights(source, **{Q_PROJ: None, "model.extra.weight": torch.zeros(1)})
    problems, _ = found(llama, source)
    assert problems == [
        f"it: lacks 1 tensor(s) of the base model: {Q_PROJ}",
        "it: has 1 tensor(s) that the base model lacks: model.extra.weight",
    ]


def test_a_long_list_of_tensors_is_cut_after_three(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    change_weights(source, **{f"x{n}": torch.zeros(1) for n in range(9)})
    assert found(llama, source)[0] == ["it: has 9 tensor(s) that the base model lacks: x0, x1, x2, ..."]


def test_every_mismatch_of_strict_opening_is_in_one_error(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    change_json(source / "config.json", model_type="mistral", num_attention_heads=4)
    change_weights(source, **{Q_PROJ: None})
    with pytest.raises(EvomergeError) as caught:
        open_models(llama, {"it": source})
    assert str(caught.value).split("\n  ") == [
        "these models cannot be merged:",
        "it: model_type is 'mistral', in the base model 'llama'",
        "it: num_attention_heads is 4, in the base model 2",
        f"it: lacks 1 tensor(s) of the base model: {Q_PROJ}",
    ]


def test_heads_tied_in_one_model_alone_are_noted_and_do_not_stop_a_merge(tmp_path: Path) -> None:
    tied, untied = write_llama(tmp_path / "tied", tied=True), write_llama(tmp_path / "untied", 1)
    problems, notes = found(tied, untied)
    assert problems == []
    assert (
        "it: its head, lm_head.weight, differs from its embedding, which the base model uses for both; the merged "
        "model has two matrices (tie_word_embeddings: false)" in notes
    )
    problems, notes = found(untied, tied)
    assert problems == []
    assert "it: its head is tied to its embedding, which is used for lm_head.weight" in notes


def test_a_tokenizer_is_compared_by_its_vocabulary_not_by_its_files(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    content = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(content, indent=7))
    assert found(llama, source) == ([], [])
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    vocabulary["€"] = vocabulary.pop("9")
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert found(llama, source)[0] == [
        "it: another tokenizer: 2 tokens have other ids (the first is 'a'); 1 tokens are not in the base model's "
        "(such as '€'); 1 of the base model's are missing (such as '9')"
    ]


def test_added_tokens_belong_to_the_vocabulary(llama: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = write_llama(tmp_path / "it", 1)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(source / "tokenizer.json"))
    assert found(llama, source)[0] == ["it: another tokenizer: 1 tokens are not in the base model's (such as '<tool>')"]


def test_the_base_needs_a_tokenizer_that_can_be_read_and_a_source_does_not(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    (source / "tokenizer.json").unlink()
    assert found(llama, source) == ([], ["it: has no tokenizer; the base model's is used for it"])
    (llama / "tokenizer.json").write_text("{broken")
    (problem,) = found(llama, source)[0]
    assert problem.startswith(f"base: no tokenizer in {llama}")


def test_vocab_json_of_an_old_model_is_compared_too(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text('{"a": 0}')
    assert found(llama, source)[0][0].startswith("it: another tokenizer: 1 tokens have other ids")


@pytest.mark.parametrize("where", ["config.json", "adapter_config.json", "README.md", "README.md, as a list"])
def test_the_declared_base_model_is_read_wherever_it_is_written(llama: Path, tmp_path: Path, where: str) -> None:
    adapter = where == "adapter_config.json"
    source = write_adapter(tmp_path / "it", llama) if adapter else write_llama(tmp_path / "it", 1)
    if adapter:
        change_json(source / where, base_model_name_or_path="owner/other")
    elif where == "config.json":
        change_json(source / where, base_model="owner/other")
    else:
        value = "[owner/other]" if "list" in where else "owner/other"
        (source / "README.md").write_text(f"---\nlicense: mit\nbase_model: {value}\n---\n# Card\n")
    note = "it: says that it was trained from the hub model 'owner/other'; the base here is 'llama'"
    assert any(line.startswith(note) for line in found(llama, source)[1])


def test_a_declared_base_that_is_the_base_needs_no_note(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    change_json(source / "config.json", base_model="meta/LLaMA")
    assert found(llama, source) == ([], [])


@pytest.mark.parametrize(
    "card", ["", "# No front matter\n---\nbase_model: a/b\n---\n", "---\nbase_model: [a\n---\n", "---\n- a\n---\n",
             "---\ndate: 2024-02-31\nbase_model: a/b\n---\n", "---\nbase_model: [a/b, c/d]\n---\n"]
)  # fmt: skip
def test_a_card_without_one_readable_base_declares_none(llama: Path, card: str) -> None:
    (llama / "README.md").write_text(card)
    assert declared_base(open_checkpoint(llama)) is None


def test_an_unknown_architecture_is_noted_with_the_layers_found(llama: Path, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "it", 1)
    for folder in (llama, source):
        change_json(folder / "config.json", model_type="novel")
    problems, (note,) = found(llama, source)
    assert problems == []
    assert note.startswith("base: unknown architecture 'novel'")
    assert "(2 found)" in note


# Adapters


def adapter_of(tmp_path: Path, **options: Any) -> Adapter:
    base = write_llama(tmp_path / "base")
    return open_adapter(write_adapter(tmp_path / "it", base, **options), open_checkpoint(base))


def adapter_refusal(tmp_path: Path, folder: Path) -> str:
    base = tmp_path / "base"
    with pytest.raises(EvomergeError) as caught:
        open_adapter(folder, open_checkpoint(base if base.exists() else write_llama(base)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"alpha": 8, "rank": 4}, 2),
        ({"alpha": 8, "rank": 4, "use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha": 8, "rank": 4, "alpha_pattern": {"q_proj": 20}}, 5),
        ({"alpha": 8, "rank": 4, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 20}}, 5),
        ({"alpha": 8, "rank": 4, "alpha_pattern": {"k_proj": 20, "proj": 40, "_proj": 60}}, 2),
        ({"alpha": 8, "rank": 4, "alpha_pattern": {"q_proj": 20}, "use_rslora": True}, 10),
        ({"alpha": 8, "rank": 4, "r": 64, "rank_pattern": {"q_proj": 4}}, 2),  # the stored rank is the rank
    ],
)
def test_an_adapter_is_its_base_plus_the_scaled_product(tmp_path: Path, options: dict[str, Any], scale: float) -> None:
    adapter = adapter_of(tmp_path, **options)
    stored = load_file(tmp_path / "it" / "adapter_model.safetensors")
    module = "base_model.model." + Q_PROJ.removesuffix(".weight")
    a, b = stored[f"{module}.lora_A.weight"].double(), stored[f"{module}.lora_B.weight"].double()
    expected = adapter.base.read(Q_PROJ).double() + scale * (b @ a)
    torch.testing.assert_close(adapter.read(Q_PROJ).double(), expected, rtol=1e-6, atol=1e-6)


def test_an_adapter_leaves_other_tensors_alone(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, targets=["q_proj"])
    assert adapter.may_differ(Q_PROJ)
    assert not adapter.may_differ("model.norm.weight")
    assert torch.equal(adapter.read("model.norm.weight"), adapter.base.read("model.norm.weight"))


def test_modules_to_save_replace_the_base_tensor(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    folder = write_adapter(tmp_path / "it", base)
    new = torch.full((40, 16), 0.5)
    change_weights(folder, "adapter_model.safetensors", **{"base_model.model.lm_head.weight": new})
    adapter = open_adapter(folder, open_checkpoint(base))
    assert adapter.may_differ("lm_head.weight")
    assert torch.equal(adapter.read("lm_head.weight"), new)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"o": 3}},
    ],
    ids=["modules_to_save", "embedding", "rslora and patterns"],
)
def test_an_adapter_saved_by_peft_merges_as_peft_merges_it(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = write_llama(tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "it")
    merged = model.merge_and_unload().state_dict()
    adapter = open_adapter(tmp_path / "it", open_checkpoint(base))
    assert any(adapter.may_differ(name) for name in merged)
    for name, expected in merged.items():
        torch.testing.assert_close(
            adapter.read(name), expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_half_a_pair_is_refused_by_its_module(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "it", tmp_path)
    half = "base_model.model." + Q_PROJ.replace(".weight", ".lora_B.weight")
    change_weights(folder, "adapter_model.safetensors", **{half: None})
    assert f"{Q_PROJ} has lora_A but not its other half" in adapter_refusal(tmp_path, folder)


def test_ranks_that_differ_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "it", tmp_path)
    half = "base_model.model." + Q_PROJ.replace(".weight", ".lora_B.weight")
    change_weights(folder, "adapter_model.safetensors", **{half: torch.zeros(16, 5)})
    assert f"{Q_PROJ} has A (4, 16) and B (16, 5), whose ranks differ" in adapter_refusal(tmp_path, folder)


def test_a_pair_of_another_size_than_the_base_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "it", tmp_path)
    half = "base_model.model." + Q_PROJ.replace(".weight", ".lora_B.weight")
    change_weights(folder, "adapter_model.safetensors", **{half: torch.zeros(99, 4)})
    assert f"{Q_PROJ} is 99x16 in the adapter and 16x16 in the base model" in adapter_refusal(tmp_path, folder)


def test_a_module_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "it", tmp_path)
    strangers = {f"base_model.model.vision.fc.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    change_weights(folder, "adapter_model.safetensors", **strangers)
    assert "that the base model" in (message := adapter_refusal(tmp_path, folder))
    assert "the first is vision.fc.weight; is this the adapter's base model?" in message


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("use_dora", True, "use_dora is set"),
        ("peft_type", "IA3", "peft_type is IA3"),
        ("bias", "some", "bias must be one of none, all, lora_only, found 'some'"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("init_lora_weights", "olora", "init_lora_weights is 'olora'"),
        ("layer_replication", [[0, 2], [1, 2]], "layer_replication is set"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(tmp_path: Path, key: str, value: object, word: str) -> None:
    folder = write_adapter(tmp_path / "it", tmp_path, **{key: value})
    message = adapter_refusal(tmp_path, folder)
    assert message.startswith(f"{folder / 'adapter_config.json'}: {word}")


def test_a_pickle_adapter_is_refused_and_not_opened(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "it", tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "holds a pickle adapter" in adapter_refusal(tmp_path, folder)


def test_an_adapter_without_weights_or_cut_short_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "it", tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "not a complete safetensors file" in adapter_refusal(tmp_path, folder)
    file.unlink()
    assert "adapter_model.safetensors: no such file" in adapter_refusal(tmp_path, folder)


def test_a_folder_with_only_an_adapter_config_opens_as_an_adapter(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    models = open_models(base, {"it": write_adapter(tmp_path / "it", base), "full": write_llama(tmp_path / "full", 1)})
    assert isinstance(models.sources["it"], Adapter)
    assert isinstance(models.sources["full"], Checkpoint)
    assert models.compatibility.notes == ["it: LoRA adapter, changes 6 of 21 tensors"]
    assert check_compatibility(models.base, models.sources) == models.compatibility


# Tensor names

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}  # fmt: skip


def names_of(model_type: str, folder: Path) -> list[str]:
    """The tensor names of a tiny checkpoint as transformers saves it."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = SMALL | EXPERTS if model_type.endswith(("moe", "mixtral")) else SMALL
    if model_type == "gpt2":
        sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 2}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).save_pretrained(folder)
    return list(open_checkpoint(folder).tensors)


@pytest.mark.parametrize(
    ("model_type", "samples"),
    [
        ("llama", {"model.layers.1.self_attn.q_proj.weight": (1, "attention"), "model.norm.weight": (None, "norm"),
                   "model.layers.1.post_attention_layernorm.weight": (1, "norm"), "lm_head.weight": (None, "head")}),
        ("mistral", {"model.layers.2.mlp.down_proj.weight": (2, "mlp")}),
        ("qwen2", {"model.layers.0.self_attn.k_proj.bias": (0, "attention")}),
        ("qwen3", {"model.layers.0.self_attn.q_norm.weight": (0, "norm")}),
        ("gemma", {"model.embed_tokens.weight": (None, "embedding")}),
        ("gemma2", {"model.layers.1.pre_feedforward_layernorm.weight": (1, "norm")}),
        ("gpt2", {"transformer.h.1.attn.c_attn.weight": (1, "attention"), "transformer.h.2.mlp.c_fc.bias": (2, "mlp"),
                  "transformer.wpe.weight": (None, "embedding"), "transformer.h.0.ln_1.weight": (0, "norm"),
                  "transformer.ln_f.weight": (None, "norm")}),
        ("gpt_neox", {"gpt_neox.layers.1.attention.query_key_value.weight": (1, "attention"),
                      "gpt_neox.embed_in.weight": (None, "embedding"), "embed_out.weight": (None, "head")}),
        ("phi", {"model.layers.1.self_attn.dense.weight": (1, "attention"),
                 "model.final_layernorm.weight": (None, "norm")}),
        ("phi3", {"model.layers.1.self_attn.qkv_proj.weight": (1, "attention")}),
        ("mixtral", {"model.layers.1.block_sparse_moe.experts.0.w1.weight": (1, "mlp"),
                     "model.layers.1.block_sparse_moe.gate.weight": (1, "mlp")}),
        ("qwen2_moe", {"model.layers.1.mlp.experts.1.down_proj.weight": (1, "mlp"),
                       "model.layers.1.mlp.shared_expert_gate.weight": (1, "mlp")}),
        ("qwen3_moe", {"model.layers.2.mlp.experts.0.up_proj.weight": (2, "mlp")}),
    ],
)  # fmt: skip
def test_every_tensor_of_a_known_architecture_has_its_layer_and_component(
    tmp_path: Path, model_type: str, samples: dict[str, tuple[int | None, str]]
) -> None:
    names = names_of(model_type, tmp_path / "m")
    assert samples.keys() <= set(names)
    assert {name: (tensor_role(name).layer, tensor_role(name).component) for name in samples} == samples
    assert layer_count(names) == 3
    assert [name for name in names if tensor_role(name).component == "other"] == []
    per_layer = [{tensor_role(n).component for n in names if tensor_role(n).layer == layer} for layer in range(3)]
    assert per_layer == [{"attention", "mlp", "norm"}] * 3


def test_names_of_old_gpt2_files_have_no_prefix() -> None:
    assert (tensor_role("h.11.attn.c_proj.weight").layer, tensor_role("h.11.attn.c_proj.weight").component) == (
        11,
        "attention",
    )
    assert tensor_role("wte.weight").component == "embedding"


def test_an_unknown_architecture_gets_its_layers_from_the_numbers() -> None:
    names = ["tower.0.mixer.in.weight", "tower.1.mixer.in.weight", "inp.weight"]
    assert layer_count(names) == 2
    assert [tensor_role(n).layer for n in names] == [0, 1, None]
    assert [tensor_role(n).component for n in names] == ["mixer", "mixer", "other"]


def test_names_without_numbers_are_no_layers() -> None:
    assert layer_count(["a.weight", "b.weight"]) == 0
    assert coefficient_layer(tensor_role("a.weight"), 0) == 0


def test_embeddings_take_the_first_layers_coefficients_and_the_head_the_last() -> None:
    depths = {
        n: coefficient_layer(tensor_role(n), 12)
        for n in (
            "model.embed_tokens.weight",
            "model.layers.4.mlp.up_proj.weight",
            "model.norm.weight",
            "lm_head.weight",
        )
    }
    assert list(depths.values()) == [0, 4, 11, 11]


# Locating and fingerprints


def test_locate_finds_folders_absolute_relative_and_in_the_home(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(llama)) == llama
    assert locate("llama", relative_to=llama.parent) == llama
    monkeypatch.setenv("HOME", str(llama.parent))
    assert locate("~/llama") == llama
    monkeypatch.chdir(llama.parent)
    assert locate("llama") == llama


@pytest.mark.parametrize("text", ["nowhere", "./owner/model", "a/b/c", "~nosuchuser", "x" * 300, "a\0b", ""])
def test_locate_refuses_what_is_neither_a_folder_nor_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text == "":
        assert locate(text) == tmp_path
        return
    with pytest.raises(EvomergeError, match="no such folder"):
        locate(text)


def test_locate_refuses_a_file(llama: Path) -> None:
    with pytest.raises(EvomergeError, match="is a file; a model is a folder"):
        locate(str(llama / "config.json"))


@pytest.mark.parametrize("text", ["owner/model", "owner/model@v1.0", "owner/mo--del"])
def test_the_error_for_a_hub_id_names_the_folder_and_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = text.split("@")[0]
    with pytest.raises(EvomergeError) as caught:
        locate(text, relative_to=tmp_path)
    message = f"{repository}: there is no folder {tmp_path / text}, and the hub did not give a model of that name ("
    assert str(caught.value).startswith(message)


def test_a_fingerprint_covers_what_decides_the_model_and_nothing_else(llama: Path) -> None:
    before = model_fingerprint(llama)
    assert set(before) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    weights = (llama / "model.safetensors").read_bytes()
    assert before["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    (llama / "README.md").write_text("words")
    (llama / "checkpoint.json").mkdir()
    assert model_fingerprint(llama) == before
    (llama / "merges.txt").write_text("a b")
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    assert set(model_fingerprint(llama)) - set(before) == {"merges.txt", "chat_template.jinja"}


def test_a_fingerprint_changes_with_one_weight_and_is_the_same_for_a_copy(llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    assert model_fingerprint(copy) == model_fingerprint(llama)
    weights = llama_weights()
    weights[Q_PROJ][0, 0] += 1e-6
    write_weights(copy, weights)
    changed = {name for name, digest in model_fingerprint(copy).items() if digest != model_fingerprint(llama)[name]}
    assert changed == {"model.safetensors"}
