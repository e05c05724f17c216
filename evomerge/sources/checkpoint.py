"""Open a safetensors checkpoint, one file or many, by memory map; nothing is read before it is needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import EvomergeError
from evomerge.files import read_json
from evomerge.sources.anatomy import layer_count
from evomerge.sources.architecture import known_config
from evomerge.sources.config_differences import LAYER_COUNTS
from evomerge.sources.quantised import quantisation_problem
from evomerge.sources.safetensors_header import open_safetensors, weight_files
from evomerge.sources.tokenizer import Vocabulary, read_vocabulary

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
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
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

    @cached_property
    def ties_head(self) -> bool:
        """Whether the head shares the embedding's weights: by the configuration, unless the files hold two different
        matrices all the same (transformers' rule)."""
        if not says_tied(self.config):
            return False
        head, embedding = self.head_name, self.embedding_name
        return head is None or embedding is None or torch.equal(self.read(head), self.read(embedding))

    @cached_property
    def embedding_name(self) -> str | None:
        """The input embedding's tensor, which a tied head stands for."""
        return next((name for name in self.tensors if is_embedding(name)), None)

    @cached_property
    def head_name(self) -> str | None:
        """The head's tensor; None if it is not stored."""
        return next((name for name in self.tensors if is_head(name)), None)

    def stored_name(self, name: str) -> str:
        """The tensor that holds `name`: of a tied pair only one may be stored."""
        if name in self.tensors:
            return name
        if is_head(name):
            return self.head_name or self.embedding_name or name
        return (is_embedding(name) and self.head_name) or name

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
        name = self.stored_name(name)
        tensor: torch.Tensor = self.handles[self.tensors[name].file].get_tensor(name)
        return tensor


@dataclass
class Untied(Checkpoint):
    """A model with a head of its own, equal to the embedding that its files tie it to."""

    inner: Checkpoint = field(repr=False)

    def stores(self, name: str) -> bool:
        return self.inner.stores(name)

    def read(self, name: str) -> torch.Tensor:
        return self.inner.read(name)


def untied(model: Checkpoint, head: str) -> Checkpoint:
    """The same model with its head, called `head`, as a matrix of its own, in its configuration too."""
    assert model.embedding_name is not None, f"{model.path} has no embedding"
    config = model.config | {"tie_word_embeddings": False}
    if isinstance(text := config.get("text_config"), dict) and "tie_word_embeddings" in text:
        config["text_config"] = text | {"tie_word_embeddings": False}
    tensors = {head: model.tensors[model.embedding_name], **model.tensors}
    return Untied(model.path, config, {n: tensors[n] for n in (*model.tensors, head)}, {}, model)


def is_head(name: str) -> bool:
    """Whether a tensor is the matrix from hidden states to logits."""
    return ".".join(name.split(".")[-2:]) in HEADS


def is_embedding(name: str) -> bool:
    """Whether a tensor is the matrix from tokens to hidden states."""
    return name.endswith(EMBEDDINGS)


def says_tied(config: Mapping[str, Any]) -> bool:
    """`tie_word_embeddings`, or what it is by default in transformers."""
    if (tied := config.get("tie_word_embeddings")) is not None:
        return bool(tied)
    return bool(getattr(known_config(config), "tie_word_embeddings", False))


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


def stored_tensors(folder: Path) -> tuple[dict[Path, Any], dict[str, tuple[Path, Any]]]:
    """The files of a checkpoint, opened, and for each tensor its file and its header's entry; no type is refused.

    EvomergeError says what is missing or broken.
    """
    handles: dict[Path, Any] = {}
    parts: dict[str, tuple[Path, Any]] = {}
    files, promised = weight_files(folder)
    for file in files:
        handles[file] = handle = open_safetensors(file)
        parts |= {name: (file, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    if lacking := [name for name in promised if name not in parts]:
        raise EvomergeError(f"{folder}: lacks {len(lacking)} tensor(s) of its index: {', '.join(lacking[:3])}")
    return handles, parts


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder` (Hugging Face layout).

    EvomergeError says what is missing or broken, or how it is quantised: packed weights cannot be merged.
    """
    config = read_config(folder)
    handles, parts = stored_tensors(folder)
    if problem := quantisation_problem(folder, config, {name: part.get_dtype() for name, (_, part) in parts.items()}):
        raise EvomergeError(problem)
    tensors = {
        name: TensorInfo(tuple(part.get_shape()), mergeable(file, name, part), file)
        for name, (file, part) in parts.items()
    }
    if (layers := layer_count(list(tensors))) > LAYERS:
        raise EvomergeError(f"{folder}: has a tensor of layer {layers - 1:,}; no model has more than {LAYERS:,} layers")
    return Checkpoint(folder, config, tensors, handles)


def mergeable(file: Path, name: str, part: Any) -> torch.dtype:
    """The type of a tensor.  EvomergeError if it is none that can be merged."""
    dtype = DTYPES.get(part.get_dtype())
    if dtype is None:
        raise EvomergeError(f"{file}: tensor {name} has the type {part.get_dtype()}, which cannot be merged")
    return dtype
