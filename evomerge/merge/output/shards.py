"""Divide tensors among safetensors files (shards) and write each file tensor by tensor, with one of them in memory."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from evomerge.errors import EvomergeError
from evomerge.sources.checkpoint import DTYPES

SHARD_BYTES = 4 << 30
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MODEL_METADATA = {"format": "pt"}  # of a model's file, as transformers writes it
TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""The type and the shape of a tensor."""


def size_of(spec: TensorSpec) -> int:
    """The bytes of a tensor of this type and shape."""
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def plan_shards(
    tensors: Mapping[str, TensorSpec], limit: int = SHARD_BYTES, stem: str = "model"
) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order.  A file has at most `limit` bytes, unless one tensor is larger.

    stem: what the names of files begin with.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + size_of(spec) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size_of(spec)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


class Writer:
    """A safetensors file (https://huggingface.co/docs/safetensors) that is being written.

    The header is written at once; `write` then appends the tensors in the same order.
    """

    def __init__(self, file: IO[bytes], tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.file = file
        self.expected = iter(tensors.items())
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + size_of((dtype, shape))
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next tensor.  tensor: contiguous, on the CPU, of the type and shape in the header."""
        name, (dtype, shape) = next(self.expected)
        assert tensor.dtype == dtype, name
        assert tuple(tensor.shape) == shape, name
        self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def open_writer(
    path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] = MODEL_METADATA
) -> Iterator[Writer]:
    """Create a safetensors file.

    tensors: in the order in which they will be written.
    metadata: text by name, for the header.

    EvomergeError if the disk has not enough free space for it.
    """
    needed, free = sum(map(size_of, tensors.values())), shutil.disk_usage(path.parent).free
    if needed > free:
        raise EvomergeError(
            f"{path}: the disk is full ({needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free); "
            "nothing that was finished is lost. Free some space and try again"
        )
    with path.open("wb") as file:
        yield Writer(file, tensors, metadata)
