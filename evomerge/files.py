"""Files that survive a crash: written aside, synced, renamed, so that what has its name is whole."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import EvomergeError


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, plain data only.  EvomergeError if it cannot be read or is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EvomergeError(f"{path}: cannot be read ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-02-31 is a ValueError
        raise EvomergeError(f"{path}: not YAML: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.  EvomergeError if the file is missing, not JSON or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvomergeError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise EvomergeError(f"{path}: not readable as JSON ({error})") from error
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


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old text or the new, never a part."""
    aside = path.with_name(path.name + ".part")
    with disk_errors(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields a folder beside `path` to fill; on success it is synced and renamed, on an error it is removed.
    A left-over of a killed process is removed first.  `path` itself must be absent or empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise EvomergeError(f"{path}: exists already and is not an empty folder; choose another name")
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
