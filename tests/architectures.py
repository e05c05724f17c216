"""Small checkpoints of several architectures, written by transformers as it writes real ones."""

import json
from pathlib import Path
from typing import Any

import torch
from models import NAMES, VOCABULARY, random_tensors, write_tokenizer
from safetensors.torch import save_file

LAYERS = 4
COMMON = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": COMMON | GROUPED | {"tie_word_embeddings": False},
    "qwen2": COMMON | GROUPED | {"tie_word_embeddings": True},
    "gemma2": COMMON | GROUPED | {"tie_word_embeddings": True},
    "gpt2": {"vocab_size": len(VOCABULARY), "n_embd": 16, "n_inner": 24, "n_layer": LAYERS, "n_head": 2,
             "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip


def weights_of(architecture: str) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """The configuration and the shape of every tensor that a checkpoint of this architecture stores."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    shapes = {name: p.shape for name, p in model.named_parameters() if name not in tied}
    return config.to_dict() | {"architectures": [type(model).__name__]}, shapes


def write_architectures(
    folder: Path, architecture: str, dtype: torch.dtype, sources: tuple[str, ...] = ("one", "two", "three")
) -> None:
    """folder/base and its fine-tunes, folder/NAME, which differ from it by noise of their own."""
    config, shapes = weights_of(architecture)
    shared = random_tensors(shapes, 0)
    for seed, name in enumerate(("base", *sources)):
        noise = random_tensors(shapes, seed)
        weights = {
            n: ((1.0 if "norm" in n else 0.0) + 0.2 * shared[n] + (0.05 * noise[n] if seed else 0.0)).to(dtype)
            for n in shapes
        }
        (folder / name).mkdir(parents=True)
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        content = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": NAMES[dtype]}
        (folder / name / "config.json").write_text(json.dumps(content))
        write_tokenizer(folder / name)
