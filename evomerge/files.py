"""Read files within size limits; write files and folders so that a reader never sees a part of them.

New content is written under a temporary name, synced to the disk and renamed.  Nothing is written through a symbolic
link that lies where evomerge writes: in a folder from a stranger it could lead to any file.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from evomerge.errors import EvomergeError
from evomerge.parse import parse_json, parse_yaml, parse_yaml_documents
from evomerge.system import POSIX, flags, lock

YAML_BYTES = 4 << 20
JSON_BYTES = 32 << 20
TOKENIZER_BYTES = 256 << 20
Content = TypeVar("Content")
HASH = re.compile(r"[0-9a-f]{30}")  # of a file in a cache of the hub, of DVC, of git-annex
FAILED_DISK = (errno.EIO, errno.ESTALE, errno.ENODEV)
UNFINISHED = ".unfinished"  # is in every temporary folder, locked by the process that fills it


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


def sync(path: Path) -> None:
    """Write a file's or a folder's content from the system's memory to the disk."""
    if not POSIX and path.is_dir():
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDONLY if POSIX else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the context, hold a lock file; other processes wait for it.  A lock ends with its process."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with appending(path) as file:
            lock(file)
            yield


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open an ordinary file to add to its end; it is made if it is missing.

    EvomergeError if it is a symbolic link, or something else than an ordinary file: a pipe may block.
    """
    how = os.O_WRONLY | os.O_APPEND | os.O_CREAT | flags("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
    try:
        handle = os.open(path, how, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise EvomergeError(f"{path}: cannot write there (not an ordinary file)") from error
        raise
    with open(handle, "ab", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise EvomergeError(f"{path}: cannot write there (not an ordinary file)")
        yield file


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within the context, a disk that is full, forbidden or fails, or a missing folder, becomes an EvomergeError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EvomergeError(
                f"{path}: the disk is full; nothing that was finished is lost. Free some space and try again"
            ) from error
        if error.errno == errno.EFBIG:
            raise EvomergeError(
                f"{path}: would be larger than this shell's limit for a file (ulimit -f); nothing that was finished is "
                "lost. Raise the limit and try again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise EvomergeError(f"{path}: cannot write there ({error.strerror})") from error
        if error.errno in FAILED_DISK:
            raise EvomergeError(
                f"{path}: the disk cannot be read or written ({error.strerror}); nothing that was finished is lost. "
                "Mend the disk and run the command again"
            ) from error
        raise


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Replace a file's content in one step: a reader sees the old text or the new text, never a part.

    private: only the owner can read the file (mode 0600), also while it is written.
    """
    aside = path.with_name(path.name + ".part")
    with disk_errors(path):
        try:
            with new_file(aside, 0o600 if private else 0o666) as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            sync(path.parent)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def new_file(path: Path, mode: int = 0o666) -> BinaryIO:
    """Open a new file for writing; what has the name is removed first, a symbolic link and not what it leads to."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags("O_CLOEXEC"), mode), "wb")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Within the context, write a file that appears under its name only when it is complete.

    Yields the temporary name to write to: beside `path`, with the same suffix, unique to this process.  Without an
    error the file is renamed to `path`, else it is removed.
    """
    aside = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def refuse_full(path: Path) -> None:
    """EvomergeError if `path` is a file, a folder that is not empty, or the working folder."""
    with disk_errors(path):
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise EvomergeError(f"{path}: exists already and is not an empty folder; choose another name")
        if path.exists() and path.samefile(Path.cwd()):
            raise EvomergeError(f"{path}: is the working folder; name a new folder, for instance {path / 'merged'}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Within the context, fill a folder that appears under its name only when it is complete.

    Yields a temporary folder beside `path`.  Without an error it is synced and renamed to `path`, else it is removed.
    What killed processes left there is removed first.  `path` must be absent or an empty folder.
    """
    refuse_full(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            remove_unfinished(folder)
        try:
            aside.mkdir()
        except FileExistsError as error:
            raise EvomergeError(f"{path}: this process is writing there already; choose another name") from error
        try:
            with appending(aside / UNFINISHED) as mark:
                lock(mark)
                yield aside
                for file in sorted(aside.rglob("*")):
                    sync(file)
                sync(aside)
                if not POSIX:
                    mark.close()  # Windows renames no folder with an open file
                rename_folder(aside, path)
                (path / UNFINISHED).unlink()  # not before: what a process killed meanwhile leaves could not be told
            sync(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def remove_unfinished(folder: Path) -> None:
    """Remove a temporary folder of `new_folder` whose process is gone, and no other folder."""
    if not (folder / UNFINISHED).is_file() or folder.is_symlink():
        return
    with appending(folder / UNFINISHED) as mark, suppress(OSError):
        lock(mark, wait=False)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != UNFINISHED:
                path.unlink(missing_ok=True)
        if not POSIX:
            mark.close()  # Windows removes no open file
        shutil.rmtree(folder, ignore_errors=True)  # the mark last, for this process may be killed too


def rename_folder(aside: Path, path: Path) -> None:
    """Give a folder its name, which may be that of an empty folder.  EvomergeError if another process took it."""
    try:
        if not POSIX and path.exists():
            path.rmdir()  # Windows renames nothing to a name that is taken
        aside.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise EvomergeError(f"{path}: another process has written there meanwhile; choose another name") from error
        raise
