"""Write safetensors files tensor by tensor: only the tensor in hand is in memory, however large the file."""

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
PLAIN = {"format": "pt"}  # the metadata of a model's file
Shape = tuple[torch.dtype, tuple[int, ...]]


def size_of(shape: Shape) -> int:
    """Bytes of a tensor of this type and shape."""
    return math.prod(shape[1]) * shape[0].itemsize


def plan_shards(tensors: Mapping[str, Shape], limit: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensor names, in order, each file at most `limit` bytes unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        if shards[-1] and filled + size_of(shape) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size_of(shape)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


class Writer:
    """An open safetensors file (https://huggingface.co/docs/safetensors): its header is written, the data follows."""

    def __init__(self, file: IO[bytes], tensors: Mapping[str, Shape], metadata: Mapping[str, str]) -> None:
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
        """The next tensor of the header, contiguous and on the CPU."""
        name, (dtype, shape) = next(self.expected)
        assert tensor.dtype == dtype, name
        assert tuple(tensor.shape) == shape, name
        self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def open_writer(path: Path, tensors: Mapping[str, Shape], metadata: Mapping[str, str] = PLAIN) -> Iterator[Writer]:
    """A new safetensors file to be filled in the order of `tensors`.  EvomergeError if the disk is too full for it."""
    needed, free = sum(map(size_of, tensors.values())), shutil.disk_usage(path.parent).free
    if needed > free:
        raise EvomergeError(
            f"{path}: the disk is full ({needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free); "
            "nothing that was finished is lost. Free some space and try again"
        )
    with path.open("wb") as file:
        yield Writer(file, tensors, metadata)
