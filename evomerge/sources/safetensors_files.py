"""What a safetensors file says it holds, checked before the library maps it.

The library itself checks offsets, types and sizes (https://huggingface.co/docs/safetensors, "Format"); here is what it
leaves open: files that are none, headers of absurd length, a tensor named twice, shapes beyond what torch can count.
"""

import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evomerge.errors import EvomergeError
from evomerge.files import opened
from evomerge.parse import parse_json

HEADER_BYTES = 32 << 20  # 150 bytes a tensor; the largest models have 100,000
NAME_LENGTH = 500
DIMENSIONS = 8
ELEMENTS = 1 << 48


def open_safetensors(path: Path) -> Any:
    """A memory-mapped safetensors file.  EvomergeError if it is missing, truncated, not safetensors, or absurd."""
    check_header(path)
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise incomplete(path, str(error)) from error


def incomplete(path: Path, reason: str) -> EvomergeError:
    return EvomergeError(f"{path}: not a complete safetensors file ({reason}); copy or download it again")


def check_header(path: Path) -> None:
    """EvomergeError if a file's header cannot be what it should be."""
    text = read_header(path)
    try:
        header = parse_json(text, "its header", unique=True)
    except EvomergeError as error:
        raise incomplete(path, str(error)) from error
    if not isinstance(header, dict):
        raise incomplete(path, f"its header is a {type(header).__name__}")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not 0 < len(name) <= NAME_LENGTH or not name.isprintable():
            raise EvomergeError(f"{path}: {name[:60]!r} is no name of a tensor")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(x) is int and x >= 0 for x in shape):
            raise incomplete(path, f"the shape of {name} is no list of sizes")
        # Zeros aside: torch multiplies the others to find the strides of an empty tensor.
        if len(shape) > DIMENSIONS or math.prod(x for x in shape if x) > ELEMENTS:
            raise EvomergeError(f"{path}: {name} has a shape that no tensor has")


def read_header(path: Path) -> str:
    """The header's text.  The first eight bytes are its length, a little-endian integer."""
    with opened(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise incomplete(path, f"it has {size:,} bytes, fewer than its header needs")
        if length > HEADER_BYTES:
            raise EvomergeError(f"{path}: its header is larger than {HEADER_BYTES >> 20} MB, which no model's is")
        try:
            return file.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise incomplete(path, "its header is no text") from error
