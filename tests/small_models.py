"""Small models that are no language models, one class of transformers each, with random weights: made in a moment."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 4}
ENCODER_DECODER = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 3,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", SMALL | TEXT | {"num_labels": 3}),
    "embedding": ("BertModel", SMALL | TEXT),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2,
                                          "num_heads": 2, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", SMALL | IMAGE | {"num_labels": 3}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "clip": ("CLIPModel", {"text_config": SMALL | TEXT, "vision_config": SMALL | IMAGE, "projection_dim": 8}),
    "wav2vec2": ("Wav2Vec2ForCTC", SMALL | {
        "vocab_size": 20, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}),
    "whisper": ("WhisperForConditionalGeneration", TEXT | ENCODER_DECODER | {
        "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}),
}  # fmt: skip

# Language models with towers, and hybrids of attention with layers that keep a state instead of keys and values.
DECODER = SMALL | {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
                   "eos_token_id": 2, "num_key_value_heads": 1}  # fmt: skip
HEADS = {"head_dim": 8}
IMAGE_TOKENS = {"image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002,
                "vision_end_token_id": 1003}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
EYE = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 2,
          "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4}  # fmt: skip
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}
MAMBA_HEADS = MAMBA | {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", IMAGE_TOKENS | {
        "text_config": DECODER | {"rope_parameters": SECTIONS}, "tie_word_embeddings": True,
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
                          "patch_size": 4}}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", IMAGE_TOKENS | {
        "text_config": DECODER | {"rope_parameters": SECTIONS}, "vision_config": EYE | {"fullatt_block_indexes": [1]}}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", IMAGE_TOKENS | {
        "text_config": DECODER | HEADS | {"rope_parameters": SECTIONS},
        "vision_config": EYE | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}}),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", IMAGE_TOKENS | {
        "text_config": DECODER | HEADS | LINEAR | {"rope_parameters": SECTIONS | {"partial_rotary_factor": 1.0}},
        "vision_config": EYE | {"num_position_embeddings": 16}}),
    "gemma3": ("Gemma3ForConditionalGeneration", {
        "text_config": DECODER | HEADS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
                                          "query_pre_attn_scalar": 8},
        "vision_config": SMALL | IMAGE | {"vision_use_head": False}, "mm_tokens_per_image": 4,
        "image_token_index": 1000, "boi_token_index": 1002, "eoi_token_index": 1003}),
    "llava": ("LlavaForConditionalGeneration", {
        "text_config": DECODER | {"model_type": "llama", "vocab_size": 41}, "vision_feature_layer": -1,
        "vision_config": SMALL | IMAGE | {"model_type": "clip_vision_model", "projection_dim": 8},
        "image_token_index": 40}),
}  # fmt: skip
HYBRID: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextForCausalLM", DECODER | HEADS | LINEAR | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    "jamba": ("JambaForCausalLM", DECODER | MAMBA | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 2, "num_experts_per_tok": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "bamba": ("BambaForCausalLM", DECODER | MAMBA_HEADS | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1ForCausalLM", DECODER | HEADS | MAMBA_HEADS | {"mamba_d_ssm": 32}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", DECODER | MAMBA_HEADS | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 8}),
    "lfm2": ("Lfm2ForCausalLM", DECODER | {
        "layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "block_ff_dim": 24}),
}  # fmt: skip
EVERY = KINDS | SEEING | HYBRID


@functools.cache
def model_class(kind: str) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, EVERY[kind][0])


def new_model(kind: str, seed: int = 0) -> Any:
    """A model with random weights; the same seed gives the same weights."""
    torch.manual_seed(seed)
    made = model_class(kind)
    return made(made.config_class(**copy.deepcopy(EVERY[kind][1]))).eval()


def write_small(
    folder: Path,
    kind: str,
    sources: Sequence[str] = ("one", "two"),
    beside: Callable[[Path], None] = lambda folder: None,
) -> Any:
    """folder/base and folder/NAME for each source, which differ from it by noise of their own.

    beside: writes what lies beside the weights into each folder.  Returns the base.
    """
    base = new_model(kind)
    for seed, name in enumerate(("base", *sources)):
        torch.manual_seed(seed)
        other = copy.deepcopy(base)
        with torch.no_grad():
            for tensor in other.state_dict().values():
                if seed and tensor.is_floating_point():
                    tensor.add_(0.05 * torch.rand_like(tensor))
        other.save_pretrained(folder / name)
        beside(folder / name)
    return base
