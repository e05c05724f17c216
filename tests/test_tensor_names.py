"""Every tensor of transformers' architectures has a component; the names come from its classes on the meta device."""

import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import coefficient_problems, value_at
from evomerge.sources.quantised import packed_tensor
from evomerge.sources.tensor_names import coefficient_layer, is_computed_buffer, layer_count, tensor_role

# Tensors that are `other`, by a pattern of their names, and why no component is theirs.
OTHER = {
    r"\.altup[._]|altup_projections": "Gemma 3n mixes several residual streams",
    r"\.laurel\.": "Gemma 3n's low-rank residual",
    r"per_layer_(?:input_gate|projection|model_projection)": "Gemma 3n and 4 bring embeddings into every layer",
    r"\.layer_scalar$": "one factor for a whole layer",
    r"\.hc_head\.": "DeepSeek V4 joins its residual streams",
    r"\.z_L_init$": "HRM's first state",
    r"input_hidden_states_(?:scale|bias)$|_residual$|\.final_input\.": "the residual stream's own weights",
    r"\.layers\.\d+\.linear\.": "Zamba2's way out of the shared block",
    r"pooler": "BERT's pooler, which no language model uses",
    r"rotary_emb\.alpha$": "a factor of rotary positions",
    r"\.protein_encoder\.|\.adapter\.": "a protein's tower and what joins it, in Evolla",
    r"^action_\w+\.": "a robot's movements",
    r"^(?:model\.)?encoder\.(?:input_linear|out|out_mid|neck)\.": "the front and the end of a tower called `encoder`",
}  # fmt: skip

# What cannot be built of its default configuration, and why.  A value: the settings with which it can.
SETTINGS: dict[str, dict[str, Any]] = {
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
UNBUILT = {
    "needs settings that have no default": {
        "aya_vision", "chameleon", "cohere_compass", "cohere_compass_text", "deepseek_ocr2", "diffusion_gemma",
        "dots1", "emu3", "granite4_vision", "hunyuan_vl", "lfm2_moe", "musicgen", "musicgen_melody",
        "qwen4_exp", "qwen4_exp_text"},
    "its class contradicts its own default configuration": {
        "dbrx", "gemma4_assistant", "gemma4_unified_assistant", "qwen3_omni_moe"},
    "its tower is built by timm, which needs Pillow": {"fast_vlm", "gemma3n", "perception_lm"},
}  # fmt: skip

MAIN = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gpt2 gpt_neox gptj phi phi3 qwen2_moe qwen3_moe olmo olmo2 olmoe
    stablelm smollm3 qwen3_next deepseek_v3 deepseek_v4 gpt_oss granite granitemoehybrid falcon_h1 falcon_mamba mamba2
    jamba bamba nemotron_h zamba2 recurrent_gemma rwkv xlstm bert bloom mpt opt lfm2 minimax cohere2 glm4_moe
    llama4_text t5 bart llava qwen2_vl qwen3_vl gemma3 mllama smolvlm voxtral
""".split()


def mappings() -> list[Any]:
    """transformers' tables of language models: causal, encoder-decoder, with towers."""
    from transformers.models.auto import modeling_auto as auto

    return [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    ]


def classes() -> Iterator[tuple[Any, Any]]:
    """Configuration and class of every language model of transformers."""
    seen = set()
    for mapping in mappings():
        for config, model in mapping.items():
            for kind in model if isinstance(model, tuple) else (model,):
                if (config.model_type, kind) not in seen:
                    seen.add((config.model_type, kind))
                    yield config, kind


def tensors_of(config: Any, model: Any) -> dict[str, bool]:
    """Name of every tensor that a class stores -> whether it is a parameter."""
    settings = config(**SETTINGS.get(config.model_type, {}))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built = model(settings)
        except AttributeError:  # a class of the language model alone
            built = model(settings.get_text_config())
    parameters = {n for n, _ in built.named_parameters()}
    return {n: n in parameters for n in built.state_dict().keys() | parameters}


def misplaced(tensors: dict[str, bool]) -> list[str]:
    """Names that are `other` without a reason, parameters taken for computed tables."""
    other = [n for n in tensors if tensor_role(n).component == "other" and not any(re.search(p, n) for p in OTHER)]
    return other + [n for n, is_parameter in tensors.items() if is_parameter and is_computed_buffer(n)]


@cache
def names(model_type: str) -> tuple[str, ...]:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    model = next(mapping[config] for mapping in mappings() if config in mapping)
    return tuple(tensors_of(config, model[0] if isinstance(model, tuple) else model))


@pytest.mark.parametrize("model_type", MAIN)
def test_no_tensor_of_a_main_architecture_is_other_without_a_reason(model_type: str) -> None:
    assert misplaced(dict.fromkeys(names(model_type), False)) == []


@pytest.mark.slow
def test_no_tensor_of_any_language_model_of_transformers_is_other_without_a_reason() -> None:
    wrong, unbuilt = {}, {}
    for config, model in classes():
        try:
            tensors = tensors_of(config, model)
        except Exception as error:
            unbuilt[config.model_type] = str(error)
            continue
        if found := misplaced(tensors):
            wrong[f"{config.model_type} {model.__name__}"] = found[:3]
        assert packed_tensor(dict.fromkeys(tensors, "F32")) is None, config.model_type
    assert wrong == {}
    assert unbuilt.keys() == set().union(*UNBUILT.values()), unbuilt


@pytest.mark.parametrize(
    ("name", "layer", "component"),
    [
        ("model.layers.3.linear_attn.in_proj_qkvz.weight", 3, "attention"),
        ("backbone.layers.5.mixer.in_proj.weight", 5, "mixer"),
        ("model.layers.2.mamba.conv1d.weight", 2, "mixer"),
        ("model.layers.2.mlp.experts.gate_up_proj", 2, "mlp"),
        ("model.layers.2.mlp.experts.7.down_proj.weight", 2, "mlp"),
        ("model.layers.2.mlp.shared_expert.up_proj.weight", 2, "mlp"),
        ("model.layers.2.mlp.gate.weight", 2, "mlp"),
        ("backbone.layers.4.mixer.shared_experts.up_proj.weight", 4, "mlp"),
        ("backbone.layers.4.mixer.q_proj.weight", 4, "attention"),
        ("model.layers.1.self_attn.q_norm.weight", 1, "norm"),
        ("rwkv.blocks.1.feed_forward.key.weight", 1, "mlp"),
        ("backbone.blocks.1.mlstm_layer.q.weight", 1, "mixer"),
        ("model.vision_tower.encoder.layers.20.self_attn.q_proj.weight", None, "vision"),
        ("model.visual.blocks.9.mlp.fc1.weight", None, "vision"),
        ("model.audio_tower.layers.9.fc1.weight", None, "audio"),
        ("model.multi_modal_projector.linear_1.weight", None, "projector"),
        ("model.language_model.layers.1.mlp.up_proj.weight", 1, "mlp"),
        ("mtp.layers.0.self_attn.q_proj.weight", None, "attention"),
        ("decoder.block.1.layer.2.DenseReluDense.wo.weight", 1, "mlp"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", None, "attention"),
        ("roberta.encoder.layer.4.attention.self.query.weight", 4, "attention"),
    ],
)
def test_a_tensor_is_what_it_is_called(name: str, layer: int | None, component: str) -> None:
    assert (tensor_role(name).layer, tensor_role(name).component) == (layer, component)


@pytest.mark.parametrize(
    ("model_type", "path"),
    [("llava", "text_config.num_hidden_layers"), ("qwen2_vl", "text_config.num_hidden_layers"),
     ("gemma3", "text_config.num_hidden_layers"), ("voxtral", "text_config.num_hidden_layers"),
     ("t5", "num_decoder_layers"), ("bart", "decoder_layers"), ("jamba", "num_hidden_layers"),
     ("xlstm", "num_hidden_layers"), ("bert", "num_hidden_layers")],
)  # fmt: skip
def test_layers_are_counted_as_the_decoders_configuration_counts_them(model_type: str, path: str) -> None:
    from transformers import CONFIG_MAPPING

    config: Any = CONFIG_MAPPING[model_type]()
    for part in path.split("."):
        config = getattr(config, part)
    assert layer_count(list(names(model_type))) == config


def test_a_towers_tensors_never_share_the_decoders_layers() -> None:
    for model_type in ("llava", "qwen2_vl", "voxtral", "smolvlm"):
        towers = [n for n in names(model_type) if tensor_role(n).component in ("vision", "audio", "projector")]
        assert towers
        assert all(tensor_role(n).layer is None and coefficient_layer(tensor_role(n), 32) == 0 for n in towers)
        inside = [n for n in names(model_type) if tensor_role(n).layer is not None]
        assert all("vision" not in n and "visual" not in n and "audio" not in n for n in inside)


def test_an_encoders_layers_are_told_from_the_decoders_and_use_the_coefficients_of_the_same_number() -> None:
    encoder = tensor_role("model.encoder.layers.3.self_attn.q_proj.weight")
    assert (encoder.layer, encoder.encoder_layer) == (None, 3)
    assert value_at([0.0, 0.1, 0.2, 0.3], encoder, 4) == 0.3
    assert value_at([0.0, 0.1], encoder, 2) == 0.1  # a decoder of fewer layers
    assert layer_count(["encoder.block.0.layer.0.SelfAttention.q.weight"]) == 1


def test_coefficients_for_the_basic_components_are_enough_and_the_rest_is_other() -> None:
    weights = {"attention": 1.0, "mlp": 2.0, "norm": 3.0, "embedding": 4.0, "head": 5.0, "other": 6.0}
    knob = METHODS["linear"].knobs["weight"]
    assert coefficient_problems("weight", weights, knob) == []
    assert value_at(weights, tensor_role("model.vision_tower.layers.0.fc1.weight"), 2) == 6.0
    assert value_at({**weights, "vision": 7.0}, tensor_role("model.vision_tower.layers.0.fc1.weight"), 2) == 7.0
    assert "needs `default`" in coefficient_problems("weight", {"vision": 1.0}, knob)[0]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention.q"),
        ("model.layers.3.self_attn.k_proj.bias", "attention.k"),
        ("model.layers.3.self_attn.v_proj.weight", "attention.v"),
        ("model.layers.3.self_attn.o_proj.weight", "attention.o"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp.gate"),
        ("model.layers.3.mlp.up_proj.weight", "mlp.up"),
        ("model.layers.3.mlp.down_proj.weight", "mlp.down"),
        ("model.layers.3.mlp.experts.5.w2.weight", "mlp.down"),
        ("transformer.h.3.attn.c_proj.weight", "attention.o"),
        ("transformer.h.3.mlp.c_proj.weight", "mlp.down"),
        ("transformer.h.3.mlp.c_fc.weight", "mlp.up"),
        ("transformer.h.3.attn.c_attn.weight", None),  # q, k and v together
        ("model.layers.3.self_attn.qkv_proj.weight", None),
        ("model.layers.3.mlp.gate_up_proj.weight", None),
        ("model.layers.3.self_attn.q_norm.weight", None),
        ("model.layers.3.input_layernorm.weight", None),
        ("model.layers.3.mlp.gate.weight", None),  # a router
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_the_parts_of_attention_and_mlp(name: str, part: str | None) -> None:
    role = tensor_role(name)
    assert role.part == part
    assert role.finest == (part or role.component)


def test_a_coefficient_of_a_part_comes_before_that_of_its_component() -> None:
    value = {"attention.q": 0.1, "attention": 0.2, "default": 0.3}
    found = [
        value_at(value, tensor_role(f"model.layers.0.{n}.weight"), 1)
        for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ]
    assert found == [0.1, 0.2, 0.3]
