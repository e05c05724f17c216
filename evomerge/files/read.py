"""Read files within limits of their sizes; what cannot be read is an EvomergeError that names the file."""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from evomerge.errors import EvomergeError
from evomerge.parse import parse_json, parse_yaml, parse_yaml_documents
from evomerge.system import flags

YAML_BYTES = 4 << 20
JSON_BYTES = 32 << 20
TOKENIZER_BYTES = 256 << 20
Content = TypeVar("Content")
HASH = re.compile(r"[0-9a-f]{30}")  # of a file in a cache of the hub, of DVC, of git-annex


def absolute_path(text: str, folder: Path) -> str:
    """The absolute path for a path that a file in `folder` names.  EvomergeError if it cannot be a path."""
    try:
        return str((folder / os.path.expanduser(text)).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a zero byte
        raise EvomergeError(f"{text!r:.200} is no path ({error})") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open an ordinary file to read its bytes.

    EvomergeError if it is missing, cannot be read or is not an ordinary file: a pipe may block, a device may never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | flags("O_NONBLOCK", "O_CLOEXEC"))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise EvomergeError(f"{path}: cannot be read (not an ordinary file)")
            yield file
    except FileNotFoundError as error:
        raise EvomergeError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a ValueError: a name with a zero byte, or content that is not UTF-8
        raise EvomergeError(f"{path}: cannot be read ({error})") from error


def read_text(path: Path, limit: int = YAML_BYTES) -> str:
    """The content of a UTF-8 file.  EvomergeError if it cannot be read or has more than `limit` bytes."""
    with opened(path) as file:
        return content_of(file, path, limit).decode("utf-8")


def content_of(file: BinaryIO, path: Path, limit: int) -> bytes:
    """The bytes of an open file.  EvomergeError if there are more than `limit`."""
    expected = min(limit, max(os.fstat(file.fileno()).st_size, 1 << 16))  # memory for so much is taken at once
    content = file.read(expected + 1)
    if len(content) > expected:
        content += file.read(limit + 1 - len(content))
    if len(content) > limit:
        raise EvomergeError(f"{path}: is larger than {limit >> 20} MB, the limit for such a file")
    return content


def refuse_stray_link(path: Path) -> None:
    """EvomergeError if a file of a model's folder, which may be a stranger's, leads to a file that is not the model's.

    A symbolic link is followed to a file of the same name, and into a cache that names its files by their hashes: the
    snapshots in the hub's cache consist of such links.
    """
    if not path.is_symlink():
        return
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise EvomergeError(f"{path}: cannot be read ({error})") from error
    if real.name != path.name and real.parent.name != "blobs" and not HASH.search(real.name):
        raise EvomergeError(f"{path}: is a symbolic link to {real}, a file of another name; put the file itself there")


def copy_model_file(path: Path, to: Path) -> None:
    """Copy a small file of a model's folder to a new file.  EvomergeError for stray links and as for `read_text`."""
    refuse_stray_link(path)
    with opened(path) as file:
        to.write_bytes(content_of(file, path, TOKENIZER_BYTES))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, plain data only.  EvomergeError if it cannot be read or is not YAML."""
    return parse_yaml(read_text(path), str(path))


def read_yaml_documents(path: Path) -> list[Any]:
    """The contents of a YAML file's documents, at least one.  EvomergeError as for `read_yaml`."""
    return parse_yaml_documents(read_text(path), str(path))


def read_json(path: Path, limit: int = JSON_BYTES, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    limit: the greatest number of bytes.
    unique: refuse a key that occurs twice in one object.

    EvomergeError if the file is missing, too large, not JSON or not an object.
    """
    content = parse_json(read_text(path, limit), str(path), unique)
    if not isinstance(content, dict):
        raise EvomergeError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_model(path: Path, kind: type[Content], strict: bool | None = None) -> Content:
    """The JSON object in a file as a pydantic model.

    strict: whether texts are no numbers, and the like; None is what the model says.

    EvomergeError as for `read_json`, and with the first thing that is wrong.
    """
    return validated(read_json(path), kind, str(path), strict)


def validated(content: Any, kind: type[Content], where: str, strict: bool | None = None) -> Content:
    """Plain data as a pydantic model or a dataclass, as `read_model` reads it.  where: its file, for the error."""
    try:
        return TypeAdapter(kind).validate_python(content, strict=strict)
    except ValidationError as error:
        raise EvomergeError(f"{where}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's errors as text: the place and what is wrong."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
