"""Compare two exported models byte by byte, as `evomerge reproduce --check` does."""

from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.files.read import sha256
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.tokenizer import TOKENIZER_FILES


@dataclass(frozen=True)
class ModelDifference:
    """One tensor or file in which two models differ, and how."""

    name: str
    what: str


def model_differences(first: Path, second: Path) -> list[ModelDifference]:
    """The differences between two model folders: every tensor, config.json, generation settings and tokenizer files."""
    a, b = (open_checkpoint(only_file(folder) or folder) for folder in (first, second))
    found = [ModelDifference(name, f"only in {first}") for name in a.tensors.keys() - b.tensors.keys()]
    found += [ModelDifference(name, f"only in {second}") for name in b.tensors.keys() - a.tensors.keys()]
    for name in a.tensors.keys() & b.tensors.keys():
        x, y = a.read(name), b.read(name)
        if x.dtype != y.dtype or x.shape != y.shape:
            found.append(ModelDifference(name, f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"))
        elif (differs := differing_bytes(x, y)) > 0:
            found.append(ModelDifference(name, f"{differs:,} of {x.nbytes:,} bytes differ"))
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        here, there = first / name, second / name
        if here.exists() != there.exists() or (here.exists() and sha256(here) != sha256(there)):
            found.append(ModelDifference(name, "the files differ"))
    return sorted(found, key=lambda d: d.name)


def only_file(folder: Path) -> Path | None:
    """The weights in a folder that has them in one file and no configuration; None for any other folder."""
    found = list(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 and not (folder / "config.json").exists() else None


def differing_bytes(x: torch.Tensor, y: torch.Tensor) -> int:
    """How many bytes of two tensors of one type and shape differ."""
    a, b = x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)
    return int((a != b).sum())
