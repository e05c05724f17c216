"""Statistics files: what `evomerge statistics` gathered about a source's weights on the source's own items.

It is a safetensors file whose tensors have the checkpoint's names: for `fisher` float32 of the tensor's shape, for
`regmean` float64 (in, in).  Its metadata say as JSON what it was made of (`Origin`).
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.files.read import sha256
from evomerge.merge.methods.method import Statistics
from evomerge.sources.adapter import Adapter
from evomerge.sources.checkpoint import Checkpoint, is_head
from evomerge.sources.open_models import Models
from evomerge.sources.safetensors_files import open_safetensors
from evomerge.sources.tensor_names import is_computed_buffer

KEY = "evomerge"  # of the metadata


@dataclass(frozen=True)
class Origin:
    """What a statistics file was made of.

    kind: the kind of statistics.
    items: task -> the items' ids.
    model: file name -> SHA-256 of the source.
    base: the same of an adapter's base.
    size: for `fisher`, the root mean square over the whole model.
    transposed: for `regmean`, the layers that are stored as (in, out).
    """

    kind: str
    items: dict[str, list[str]]
    model: dict[str, str]
    base: dict[str, str] = field(default_factory=dict)
    size: float = 1.0
    transposed: list[str] = field(default_factory=list)

    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        return {KEY: json.dumps(asdict(self))}


@dataclass(frozen=True)
class StatisticsFile:
    """An open statistics file, memory-mapped.

    names: of its tensors.
    tied: the embedding's name, if the model's head is tied to it.
    """

    path: Path
    origin: Origin
    names: frozenset[str]
    tied: str | None
    handle: Any = field(repr=False)

    @property
    def size(self) -> float:
        """The root mean square of the Fisher information over the whole model."""
        return self.origin.size

    def stored(self, name: str) -> str | None:
        """The name under which the file holds a tensor; a tied head is its embedding."""
        if name in self.names:
            return name
        return self.tied if is_head(name) and self.tied in self.names else None

    def covers(self, name: str) -> bool:
        """Whether the file has statistics of a tensor."""
        return self.stored(name) is not None

    def read(self, name: str) -> Tensor:
        """The statistics of a tensor."""
        tensor: Tensor = self.handle.get_tensor(self.stored(name))
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor's statistics."""
        return tuple(self.handle.get_slice(self.stored(name)).get_shape())

    def is_transposed(self, name: str) -> bool:
        """Whether the layer is stored as (in, out)."""
        return name in self.origin.transposed


def read_origin(path: Path) -> tuple[Origin, Any]:
    """What a statistics file was made of, and the open file.  EvomergeError if it is not one."""
    handle = open_safetensors(path)
    try:
        return TypeAdapter(Origin).validate_json((handle.metadata() or {})[KEY]), handle
    except (KeyError, ValueError):
        raise EvomergeError(f"{path}: not a statistics file; make one with `evomerge statistics`") from None


def open_statistics_file(path: Path, kind: Statistics, source: str, models: Models) -> StatisticsFile:
    """The statistics of a source, checked against the models.

    EvomergeError if the file is of another kind, was made of other files than the source's, or lacks a tensor.
    """
    origin, handle = read_origin(path)
    if origin.kind != kind:
        raise EvomergeError(f"{path}: holds {origin.kind} statistics, but {kind} ones are needed for {source!r}")
    model = models.sources[source]
    pairs = [(model.path, origin.model)]
    if isinstance(model, Adapter):
        pairs.append((models.base.path, origin.base))
    for folder, files in pairs:
        other = [f for f, digest in files.items() if not os.path.isfile(folder / f) or sha256(folder / f) != digest]
        if other or not files:
            raise EvomergeError(
                f"{path}: was made of another model than {folder} ({other[0] if other else 'no base'} differs); "
                f"gather it again with `evomerge statistics --kind {kind}`"
            )
    base = models.base
    tied = base.embedding_name if model.ties_head else None
    found = StatisticsFile(path, origin, frozenset(handle.keys()), tied, handle)
    if problem := missing(found, base):
        raise EvomergeError(f"{path}: {problem}; gather it again with `evomerge statistics --kind {kind}`")
    return found


def missing(found: StatisticsFile, base: Checkpoint) -> str | None:
    """What a file has too much or too little, compared with the base's tensors; None if it fits."""
    if unknown := sorted(found.names - base.tensors.keys()):
        return f"has {unknown[0]}, which is not a tensor of {base.path}"
    if found.origin.kind == "fisher":
        for name, info in base.tensors.items():
            if not info.dtype.is_floating_point or is_computed_buffer(name):
                continue
            if not found.covers(name):
                return f"lacks the tensor {name} of {base.path}"
            if found.shape(name) != info.shape:
                return f"{name} is {found.shape(name)}, in {base.path} {info.shape}"
        return None
    for name in sorted(found.names):
        shape = base.tensors[name].shape
        size = shape[0 if found.is_transposed(name) else -1]
        if len(shape) != 2 or found.shape(name) != (size, size):
            return f"{name} is {found.shape(name)}, which does not fit {shape} in {base.path}"
    return None if found.names else "is empty"
