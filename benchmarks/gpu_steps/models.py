"""Models and recipes that the steps merge: random weights of real shapes."""

import json
from pathlib import Path

import torch
from merge import llama_config, recipe, shapes
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor

from evomerge.merge.bank.bank import Bank
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource

__all__ = ["outputs", "recipe", "shapes", "write_adapter", "write_family", "write_tokenizer", "zero_weight"]


def outputs(bank: Bank, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors to merge into, on the bank's device, filled with what no merge gives."""
    tensors = bank.models.base.tensors.items()
    return {n: torch.full(i.shape, 7.0, dtype=dtype, device=bank.device) for n, i in tensors}


def write_adapter(folder: Path, base: Path, layout: dict[str, tuple[int, ...]], rank: int = 8) -> Path:
    """A LoRA of PEFT's format on some layers of a base."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, shape in layout.items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = 0.05 * torch.randn((rank, shape[1]), generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.05 * torch.randn((shape[0], rank), generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": ["q_proj", "down_proj"], "bias": "none", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def zero_weight(method: str, folders: dict[str, Path], dtype: str) -> Recipe:
    """A recipe of all sources, the first of weight 0."""
    sources = [
        RecipeSource(name=n, path=str(f), parameters={"weight": 0.4 * k})
        for k, (n, f) in enumerate((n, f) for n, f in folders.items() if n != "base")
    ]
    knobs = {"density": 0.5} if method != "task_arithmetic" else {}
    return Recipe(
        method=method, dtype=dtype, seed=3, base=Model(path=str(folders["base"])), sources=sources, parameters=knobs
    )


def write_tokenizer(folder: Path) -> None:
    """One token a character, as the tiny family has it."""
    characters = ["<pad>", "<s>", "</s>", "\n", "=", "+", *"0123456789", *"abcdefghijklmnopqrstuvwxyz", " "]
    tokenizer = Tokenizer(WordLevel({c: k for k, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(characters[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


def write_family(folder: Path) -> None:
    """The tiny family with random weights: a dry run need not wait until it is trained."""
    tensors = shapes("tiny")
    rows = 64
    tensors["model.embed_tokens.weight"] = (rows, tensors["model.norm.weight"][0])
    generator = torch.Generator().manual_seed(0)
    base = {n: 0.05 * torch.randn(s, generator=generator) for n, s in tensors.items()}
    config = llama_config(tensors, "float32") | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name in ("base", "rev", "sort", "count", "add"):
        (folder / name).mkdir(parents=True)
        moved = (
            base
            if name == "base"
            else {n: x + 0.01 * torch.randn(x.shape, generator=generator) for n, x in base.items()}
        )
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder / name)
    (folder / "manifest.json").write_text("{}")
