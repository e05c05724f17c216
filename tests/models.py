"""Real models, small enough to write in milliseconds: two-layer Llamas and LoRA adapters as ordinary folders."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from evomerge.merge.measure.statistics_file import Origin
from evomerge.sources.fingerprint import model_fingerprint

VOCABULARY = ["<pad>", "<s>", "</s>", *" \n=+.?", *"abcdefghijklmnopqrstu", *"0123456789"]  # 40 tokens
HIDDEN, INNER, LAYERS, HEADS = 16, 24, 2, 2
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def llama_shapes(tied: bool = False, layers: int = LAYERS, rows: int = len(VOCABULARY)) -> dict[str, tuple[int, ...]]:
    """Every tensor of the tiny Llama, in the order of the file.  rows: of the embedding and the head."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{block}self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{block}mlp.gate_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{block}mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{block}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{block}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{block}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (rows, HIDDEN)
    return shapes


def llama_config(
    tied: bool = False, dtype: torch.dtype = torch.float32, layers: int = LAYERS, rows: int = len(VOCABULARY)
) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": NAMES[dtype],
    }


def llama_weights(
    seed: int = 0, tied: bool = False, change: float = 0.05, layers: int = LAYERS, rows: int = len(VOCABULARY)
) -> dict[str, torch.Tensor]:
    """Float32 weights.  Seed 0 is the base; any other seed is the base plus `change` times its own noise."""
    shapes = llama_shapes(tied, layers, rows)
    weights = random_tensors(shapes, 0)
    for name in shapes:
        weights[name] = 1 + 0.1 * weights[name] if "norm" in name else 0.2 * weights[name]
    if seed:
        noise = random_tensors(shapes, seed)
        weights = {name: tensor + change * noise[name] for name, tensor in weights.items()}
    return weights


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_llama(
    folder: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    shards: int = 1,
    change: float = 0.05,
    layers: int = LAYERS,
    vocabulary: Sequence[str] = VOCABULARY,
    padding: int = 0,
) -> Path:
    """A tiny Llama with config and tokenizer.  Same seed, same weights; see `llama_weights`.

    padding: rows of embedding and head beyond the vocabulary.
    """
    folder.mkdir(parents=True)
    rows = len(vocabulary) + padding
    weights = {name: tensor.to(dtype) for name, tensor in llama_weights(seed, tied, change, layers, rows).items()}
    write_weights(folder, weights, shards)
    (folder / "config.json").write_text(json.dumps(llama_config(tied, dtype, layers, rows), indent=2))
    write_tokenizer(folder, vocabulary)
    return folder


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> None:
    """model.safetensors, or that many shards with their index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[number::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, vocabulary: Sequence[str] = VOCABULARY) -> None:
    """One token a character.  The first three of the vocabulary are the special tokens."""
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(VOCABULARY[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_family(folder: Path, sources: Iterable[str] = ("one", "two"), **options: object) -> dict[str, Path]:
    """folder/base and one fine-tuned sibling per name (seeds 1, 2, ...); options as for `write_llama`."""
    found = {"base": write_llama(folder / "base", 0, **options)}  # type: ignore[arg-type]
    for seed, name in enumerate(sources, 1):
        found[name] = write_llama(folder / name, seed, **options)  # type: ignore[arg-type]
    return found


def write_adapter(
    folder: Path,
    base: Path,
    seed: int = 1,
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: Iterable[str] = ("q_proj", "v_proj", "down_proj"),
    size: float = 0.3,
    **config: object,
) -> Path:
    """A LoRA adapter for the tiny Llama in PEFT's format; `config` adds to or replaces keys of adapter_config.json."""
    folder.mkdir(parents=True)
    targets = list(targets)
    shapes = {}
    for name, shape in llama_shapes().items():
        if name.split(".")[-2] in targets:
            module = "base_model.model." + name.removesuffix(".weight")
            shapes[f"{module}.lora_A.weight"] = (rank, shape[1])
            shapes[f"{module}.lora_B.weight"] = (shape[0], rank)
    weights = {name: size * tensor for name, tensor in random_tensors(shapes, seed).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | config, indent=2))
    return folder


def write_statistics(file: Path, kind: str, model: Path, base: Path | None = None, seed: int = 0) -> Path:
    """A statistics file for the tiny Llama in `model` (an adapter on `base`), its numbers drawn at random."""
    tied = bool(json.loads(((base or model) / "config.json").read_text()).get("tie_word_embeddings"))
    shapes = llama_shapes(tied)
    if kind == "fisher":
        tensors = {name: x.square() for name, x in random_tensors(shapes, seed).items()}
    else:
        layers = {name: (40, shape[1]) for name, shape in shapes.items() if "proj" in name}
        tensors = {name: x.double().T @ x.double() for name, x in random_tensors(layers, seed).items()}
    items = {"task": [f"item {k}" for k in range(40)]}
    origin = Origin(kind, items, model_fingerprint(model), model_fingerprint(base) if base else {}, size=3.0**0.5)
    save_file(tensors, file, metadata=origin.metadata())
    return file
