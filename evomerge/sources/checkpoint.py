"""Open a safetensors checkpoint, one file or many, by memory map; nothing is read before it is needed."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import EvomergeError
from evomerge.files import read_json
from evomerge.sources.anatomy import layer_count
from evomerge.sources.header import open_safetensors
from evomerge.sources.tokenizer import Vocabulary, is_there, read_vocabulary

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "smollm3")  # transformers' own defaults
TIED_HEADS = ("lm_head.weight", "embed_out.weight")
LAYER_COUNTS = ("num_hidden_layers", "n_layer")
LAYERS = 10_000  # more than any model has; recipes are written out layer by layer


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Checkpoint:
    """A model on disk: its config and its tensors by name.

    path: the folder.  tensors: name -> TensorInfo, in file order.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    handles: dict[Path, Any] = field(repr=False)

    @property
    def ties_head(self) -> bool:
        """Whether the head shares the embedding's weights (`tie_word_embeddings`)."""
        return bool(self.config.get("tie_word_embeddings", self.config.get("model_type") in TIED_BY_DEFAULT))

    @cached_property
    def embedding_name(self) -> str | None:
        """The input embedding's tensor, which a tied head stands for."""
        ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
        return next((name for name in self.tensors if name.endswith(ends)), None)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Its tokenizer's; None if it has none that can be read."""
        return read_vocabulary(self.path)

    def touches(self, name: str) -> bool:
        """Whether the tensor may differ from the base's."""
        return True

    def stores(self, name: str) -> bool:
        """Whether reading this tensor maps a file and computes nothing."""
        return True

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, a view of the mapped file.  A tied head that is not stored is the embedding."""
        if name not in self.tensors and name in TIED_HEADS and self.embedding_name:
            name = self.embedding_name
        tensor: torch.Tensor = self.handles[self.tensors[name].file].get_tensor(name)
        return tensor


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of a checkpoint folder and the tensors that its index, if it has one, promises.

    EvomergeError if there are none (a pickle checkpoint is refused by name), or the index names a file that
    is missing or lies outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index, unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise EvomergeError(f"{index}: has no `weight_map`")
        names = sorted({str(name) for name in weight_map.values()})
        if bad := [name for name in names if name in ("", "..") or Path(name).name != name]:
            raise EvomergeError(f"{index}: names a file outside its folder: {bad[0]}")
        if missing := [name for name in names if not is_there(folder / name)]:
            raise EvomergeError(f"{index}: names {len(missing)} missing file(s): {', '.join(missing[:3])}")
        return [folder / name for name in names], list(weight_map)
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"], []
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise EvomergeError(
            f"{folder}: holds a pickle checkpoint ({pickles[0]}), which can run code when it is opened; "
            "save the model again with safe_serialization (model.safetensors)"
        )
    raise EvomergeError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.  EvomergeError if it is not one."""
    file = folder / "config.json"
    config = read_json(file)
    for key, kind in (("model_type", str), ("auto_map", dict)):
        if not isinstance(config.get(key), (kind, type(None))):
            raise EvomergeError(f"{file}: {key} must be a {kind.__name__}, found {config[key]!r:.60}")
    for key in LAYER_COUNTS:
        count = config.get(key)
        if count is not None and not (type(count) is int and 0 <= count <= LAYERS):
            raise EvomergeError(f"{file}: {key} must be a number up to {LAYERS:,}, found {count!r:.60}")
    return config


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder` (Hugging Face layout).  EvomergeError says what is missing or broken."""
    config = read_config(folder)
    handles: dict[Path, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    files, promised = weight_files(folder)
    for file in files:
        handles[file] = handle = open_safetensors(file)
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            part = handle.get_slice(name)
            tensors[name] = TensorInfo(tuple(part.get_shape()), mergeable(file, name, part), file)
    if lacking := [name for name in promised if name not in tensors]:
        raise EvomergeError(f"{folder}: lacks {len(lacking)} tensor(s) of its index: {', '.join(lacking[:3])}")
    if (layers := layer_count(list(tensors))) > LAYERS:
        raise EvomergeError(f"{folder}: has a tensor of layer {layers - 1:,}; no model has more than {LAYERS:,} layers")
    return Checkpoint(folder, config, tensors, handles)


def mergeable(file: Path, name: str, part: Any) -> torch.dtype:
    """The type of a tensor.  EvomergeError if it is none that can be merged."""
    dtype = DTYPES.get(part.get_dtype())
    if dtype is None:
        raise EvomergeError(f"{file}: tensor {name} has the type {part.get_dtype()}, which cannot be merged")
    return dtype
