"""Write a file so that a reader sees the old content or the new, never a part; add to a file; lock it."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from evomerge.errors import EvomergeError
from evomerge.system import POSIX, flags, lock

FAILED_DISK = (errno.EIO, errno.ESTALE, errno.ENODEV)


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
        if error.errno == errno.ENOENT:
            raise EvomergeError(f"{path}: there is no folder {path.parent}; name one that exists") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR):
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
