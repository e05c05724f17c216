"""The safetensors files of a checkpoint folder, and a check of each file's header before the library maps the file.

The library checks offsets, types and sizes (https://huggingface.co/docs/safetensors, "Format").  The check here adds
what it does not cover: files of another format, headers of absurd length, a tensor that is named twice, shapes beyond
what torch can count.
"""

import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evomerge.errors import EvomergeError
from evomerge.files.read import opened, read_json, refuse_stray_link
from evomerge.parse import parse_json

WEIGHTS = ("model", "diffusion_pytorch_model")
HEADER_BYTES = 32 << 20  # 150 bytes a tensor; the largest models have 100,000
NAME_LENGTH = 500
DIMENSIONS = 8
ELEMENTS = 1 << 48
FILES = 10_000


def weights_name(folder: Path) -> str:
    """The name of a model's weight files without what follows it: `model`, or the one that diffusers uses.

    folder: of the model, or its only file.
    """
    if folder.is_file():
        return folder.stem
    ends = (".safetensors.index.json", ".safetensors")
    return next((s for s in WEIGHTS if any((folder / f"{s}{end}").exists() for end in ends)), WEIGHTS[0])


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of a checkpoint, and the names of the tensors that its index lists.

    folder: of the checkpoint, or its only file.

    The second list is empty if the folder has no index.  EvomergeError if there are no such files (the message says
    so if there is a GGUF file or a pickle), or the index names a file that is missing or outside the folder.
    """
    if folder.is_file():
        return [folder], []
    stem = weights_name(folder)
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index, unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise EvomergeError(f"{index}: has no `weight_map`")
        names = sorted({str(name) for name in weight_map.values()})
        if bad := [name for name in names if name in ("", "..") or Path(name).name != name]:
            raise EvomergeError(f"{index}: names a file outside its folder: {bad[0]}")
        if len(names) > FILES:
            raise EvomergeError(f"{index}: names {len(names):,} files; no model has more than {FILES:,}")
        if missing := [name for name in names if not os.path.isfile(folder / name)]:
            raise EvomergeError(f"{index}: names {len(missing)} missing file(s): {', '.join(missing[:3])}")
        return [folder / name for name in names], list(weight_map)
    if (folder / f"{stem}.safetensors").exists():
        return [folder / f"{stem}.safetensors"], []
    if packed := sorted(p.name for p in folder.glob("*.gguf")):
        raise EvomergeError(
            f"{folder}: holds a GGUF file ({packed[0]}), which cannot be merged. Merge the unquantised model that it "
            f"was made from, or turn it into safetensors with transformers: AutoModelForCausalLM.from_pretrained("
            f"{str(folder)!r}, gguf_file={packed[0]!r}).save_pretrained(FOLDER)"
        )
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise EvomergeError(
            f"{folder}: holds a pickle checkpoint ({pickles[0]}), which can run code when it is opened; "
            "save the model again with safe_serialization (model.safetensors)"
        )
    raise EvomergeError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file by memory map.

    EvomergeError if it is missing, truncated, not safetensors, or has an absurd header.
    """
    refuse_stray_link(path)
    checked_header(path)
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise incomplete(path, str(error)) from error


def incomplete(path: Path, reason: str) -> EvomergeError:
    """The error for a file that is not a complete safetensors file."""
    return EvomergeError(f"{path}: not a complete safetensors file ({reason}); copy or download it again")


def stored_tensor_names(folder: Path) -> list[str]:
    """The names of the tensors in a checkpoint folder, in file order, from the headers of its files alone."""
    return [name for file in weight_files(folder)[0] for name in checked_header(file)]


def checked_header(path: Path) -> dict[str, Any]:
    """The header of a file: tensor -> its entry.

    EvomergeError if it is malformed, or holds a name or a shape that no tensor has.
    """
    text = read_header(path)
    try:
        header = parse_json(text, "its header", unique=True)
    except EvomergeError as error:
        raise incomplete(path, str(error)) from error
    if not isinstance(header, dict):
        raise incomplete(path, f"its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not 0 < len(name) <= NAME_LENGTH or not name.isprintable():
            raise EvomergeError(f"{path}: {name[:60]!r} is not a valid name of a tensor")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(x) is int and x >= 0 for x in shape):
            raise incomplete(path, f"the shape of {name} is not a list of sizes")
        # Without zeros: torch multiplies the other sizes to find the strides of an empty tensor.
        if len(shape) > DIMENSIONS or math.prod(x for x in shape if x) > ELEMENTS:
            raise EvomergeError(f"{path}: {name} has a shape that no tensor has")
    return header


def read_header(path: Path) -> str:
    """The text of a file's header.  The first eight bytes of the file are its length, a little-endian integer."""
    with opened(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise incomplete(path, f"it has {size:,} bytes, fewer than its header needs")
        if length > HEADER_BYTES:
            raise EvomergeError(
                f"{path}: its header is larger than {HEADER_BYTES >> 20} MB, more than that of any model"
            )
        try:
            return file.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise incomplete(path, "its header is not UTF-8 text") from error
