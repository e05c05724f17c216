"""Open a safetensors checkpoint of one file or several by memory map; tensors are read when they are needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import EvomergeError
from evomerge.files.read import read_json, refuse_stray_link
from evomerge.sources.architecture import known_config
from evomerge.sources.config_differences import LAYER_COUNTS
from evomerge.sources.quantised import quantisation_problem
from evomerge.sources.safetensors_files import open_safetensors, weight_files
from evomerge.sources.tensor_names import layer_count
from evomerge.sources.tokenizer import TOKENIZER_FILES, Vocabulary, read_vocabulary

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
MODEL_CONFIGS = ("config.json", "adapter_config.json")
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
LAYERS = 10_000  # more than any model has; recipes are written out layer by layer


@dataclass(frozen=True)
class TensorInfo:
    """Shape, type and file of one tensor, from the file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Checkpoint:
    """A model on disk: its configuration and its tensors by name.

    path: the folder, or the file of a model without a configuration.
    config: the content of config.json; empty without one.
    tensors: name -> TensorInfo, in file order.
    handles: the opened files.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    handles: dict[Path, Any] = field(repr=False)

    @cached_property
    def ties_head(self) -> bool:
        """Whether the head shares the weights of the embedding.

        The configuration decides, unless the files hold two different matrices (the rule of transformers).
        """
        if not config_ties_head(self.config):
            return False
        head, embedding = self.head_name, self.embedding_name
        return head is None or embedding is None or torch.equal(self.read(head), self.read(embedding))

    @cached_property
    def embedding_name(self) -> str | None:
        """The name of the embedding's matrix; None if there is none."""
        return next((name for name in self.tensors if is_embedding(name)), None)

    @cached_property
    def head_name(self) -> str | None:
        """The name of the head's matrix; None if it is not stored."""
        return next((name for name in self.tensors if is_head(name)), None)

    def stored_name(self, name: str) -> str:
        """The name of the stored tensor that holds `name`; of a tied embedding and head only one may be stored."""
        if name in self.tensors:
            return name
        if is_head(name):
            return self.head_name or self.embedding_name or name
        return (is_embedding(name) and self.head_name) or name

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of its tokenizer; None if it has none that can be read."""
        return read_vocabulary(self.path)

    def may_differ(self, name: str) -> bool:
        """Whether the tensor may differ from the base's (an adapter leaves most tensors alone)."""
        return True

    def is_stored(self, name: str) -> bool:
        """Whether the tensor is read from a file as it is, so that reading it computes nothing."""
        return True

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, a view of the mapped file.  For a tied head that is not stored, the embedding."""
        name = self.stored_name(name)
        tensor: torch.Tensor = self.handles[self.tensors[name].file].get_tensor(name)
        return tensor


@dataclass
class UntiedCheckpoint(Checkpoint):
    """A model whose files tie its head to its embedding, seen as one with a head of its own.

    tied: the model as it is stored.
    """

    tied: Checkpoint = field(repr=False)

    def is_stored(self, name: str) -> bool:
        return self.tied.is_stored(name)

    def read(self, name: str) -> torch.Tensor:
        return self.tied.read(name)


def with_untied_head(model: Checkpoint, head: str) -> Checkpoint:
    """The same model with a head of its own, equal to the embedding.

    head: the name of the new tensor.  The configuration of the result says `tie_word_embeddings: false`.
    """
    assert model.embedding_name is not None, f"{model.path} has no embedding"
    config = model.config | {"tie_word_embeddings": False}
    if isinstance(text := config.get("text_config"), dict) and "tie_word_embeddings" in text:
        config["text_config"] = text | {"tie_word_embeddings": False}
    tensors = {head: model.tensors[model.embedding_name], **model.tensors}
    return UntiedCheckpoint(model.path, config, {n: tensors[n] for n in (*model.tensors, head)}, {}, model)


def is_head(name: str) -> bool:
    """Whether a tensor is the matrix from hidden states to logits."""
    return ".".join(name.split(".")[-2:]) in HEADS


def is_embedding(name: str) -> bool:
    """Whether a tensor is the matrix from tokens to hidden states."""
    return name.endswith(EMBEDDINGS)


def config_ties_head(config: Mapping[str, Any]) -> bool:
    """Whether a configuration ties the head to the embedding: `tie_word_embeddings`, or transformers' default."""
    if (tied := config.get("tie_word_embeddings")) is not None:
        return bool(tied)
    return bool(getattr(known_config(config), "tie_word_embeddings", False))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model's config.json; empty for a model that is one file.

    EvomergeError if it cannot be read, a key has a wrong type, or a file that a merge would copy is a stray link.
    """
    if folder.is_file():
        return {}
    file = folder / "config.json"
    for name in (file.name, "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES):
        refuse_stray_link(folder / name)
    if not file.exists():
        near = sorted(f.parent for name in MODEL_CONFIGS for f in folder.glob(f"*/{name}"))
        hint = f"; {', '.join(str(f) for f in near[:2])} {'is one' if len(near) == 1 else 'are some'}" if near else ""
        raise EvomergeError(f"{folder}: is no model folder, it has neither {' nor '.join(MODEL_CONFIGS)}{hint}")
    config = read_json(file)
    for key, kind in (("model_type", str), ("auto_map", dict)):
        if not isinstance(config.get(key), (kind, type(None))):
            raise EvomergeError(f"{file}: {key} must be a {kind.__name__}, found {config[key]!r:.60}")
    for key in LAYER_COUNTS:
        count = config.get(key)
        if count is not None and not (type(count) is int and 0 <= count <= LAYERS):
            raise EvomergeError(f"{file}: {key} must be a number up to {LAYERS:,}, found {count!r:.60}")
    return config


def open_weight_files(folder: Path) -> tuple[dict[Path, Any], dict[str, tuple[Path, Any]]]:
    """Open the weight files of a checkpoint, whatever the types of its tensors.

    Returns the opened files, and for each tensor its file and its slice, which knows type and shape.
    EvomergeError says what is missing or broken.
    """
    handles: dict[Path, Any] = {}
    slices: dict[str, tuple[Path, Any]] = {}
    files, listed = weight_files(folder)
    for file in files:
        handles[file] = handle = open_safetensors(file)
        slices |= {name: (file, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    if lacking := [name for name in listed if name not in slices]:
        raise EvomergeError(f"{folder}: lacks {len(lacking)} tensor(s) of its index: {', '.join(lacking[:3])}")
    return handles, slices


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder` (Hugging Face layout), or the .safetensors file of that name.

    EvomergeError says what is missing or broken, or how it is quantised: packed weights cannot be merged.
    """
    config = read_config(folder)
    handles, slices = open_weight_files(folder)
    dtypes = {name: stored.get_dtype() for name, (_, stored) in slices.items()}
    if problem := quantisation_problem(folder, config, dtypes):
        raise EvomergeError(problem)
    tensors = {
        name: TensorInfo(tuple(stored.get_shape()), mergeable_dtype(file, name, stored), file)
        for name, (file, stored) in slices.items()
    }
    if (layers := layer_count(list(tensors))) > LAYERS:
        raise EvomergeError(f"{folder}: has a tensor of layer {layers - 1:,}; no model has more than {LAYERS:,} layers")
    return Checkpoint(folder, config, tensors, handles)


def mergeable_dtype(file: Path, name: str, stored: Any) -> torch.dtype:
    """The type of a tensor.  stored: its slice in the opened file.  EvomergeError if such a type cannot be merged."""
    dtype = DTYPES.get(stored.get_dtype())
    if dtype is None:
        raise EvomergeError(f"{file}: tensor {name} has the type {stored.get_dtype()}, which cannot be merged")
    return dtype
