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


@functools.cache
def model_class(kind: str) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, KINDS[kind][0])


def new_model(kind: str, seed: int = 0) -> Any:
    """A model with random weights; the same seed gives the same weights."""
    torch.manual_seed(seed)
    made = model_class(kind)
    return made(made.config_class(**KINDS[kind][1])).eval()


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
