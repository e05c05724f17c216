"""Files: read within bounds; written aside, synced, renamed, so that what has its name is whole."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from evomerge.errors import EvomergeError
from evomerge.parse import parse_json, parse_yaml, parse_yaml_documents

YAML_BYTES = 4 << 20
JSON_BYTES = 32 << 20
TOKENIZER_BYTES = 256 << 20


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An ordinary file, to read.

    EvomergeError if it is missing, cannot be read or is none: a pipe would make one wait, a device never ends.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise EvomergeError(f"{path}: cannot be read (not an ordinary file)")
            yield file
    except FileNotFoundError as error:
        raise EvomergeError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError, and so is what is not UTF-8
        raise EvomergeError(f"{path}: cannot be read ({error})") from error


def read_text(path: Path, limit: int = YAML_BYTES) -> str:
    """The content of a file of at most `limit` bytes of UTF-8.  EvomergeError if it is something else."""
    with opened(path) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise EvomergeError(f"{path}: is larger than {limit >> 20} MB, which no such file is")
        return content.decode("utf-8")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, plain data only.  EvomergeError if it cannot be read or is not YAML."""
    return parse_yaml(read_text(path), str(path))


def read_yaml_documents(path: Path) -> list[Any]:
    """The contents of a YAML file's documents, one at least.  EvomergeError as for `read_yaml`."""
    return parse_yaml_documents(read_text(path), str(path))


def read_json(path: Path, limit: int = JSON_BYTES, unique: bool = False) -> dict[str, Any]:
    """A JSON object from a file.  EvomergeError if the file is missing, not JSON or not an object.

    unique: a key that is there twice is refused.
    """
    content = parse_json(read_text(path, limit), str(path), unique)
    if not isinstance(content, dict):
        raise EvomergeError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while this lasts; whoever else wants it waits.  The lock dies with its process."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden path into a message; every other error stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EvomergeError(
                f"{path}: the disk is full; nothing that was finished is lost. Free some space and try again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise EvomergeError(f"{path}: cannot write there ({error.strerror})") from error
        raise


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Replace a file's content in one step: a reader sees the old text or the new, never a part.

    private: only the owner may read it (mode 0600), from the first byte on.
    """
    aside = path.with_name(path.name + ".part")
    with disk_errors(path):
        try:
            if private:
                aside.unlink(missing_ok=True)
            mode = 0o600 if private else 0o666
            with open(aside, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            sync(path.parent)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file that appears under its name only when it is whole.

    Yields a name beside `path` (same suffix, this process's own) to write to; on success it is renamed, on an error
    removed.
    """
    aside = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def refuse_full(path: Path) -> None:
    """EvomergeError if there is a file or a folder of this name that is not empty."""
    with disk_errors(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise EvomergeError(f"{path}: exists already and is not an empty folder; choose another name")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields a folder beside `path` to fill; on success it is synced and renamed, on an error it is removed.
    A left-over of a killed process is removed first.  `path` itself must be absent or empty.
    """
    refuse_full(path)
    aside = path.with_name(path.name + ".part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            for file in sorted(aside.rglob("*")):
                sync(file)
            sync(aside)
            if path.exists():
                path.rmdir()
            aside.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
