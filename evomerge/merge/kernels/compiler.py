"""Run a compiler as a child that ends with this process, and keep compiled files that only this user can write."""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from evomerge.files.new_folder import UNFINISHED, remove_unfinished
from evomerge.files.read import sha256
from evomerge.files.write import appending, disk_errors
from evomerge.system import POSIX, kill_process_group, lock, user_id

# The compiler's process group is killed when the pipe from its parent closes, however the parent ends: a parent that is
# killed can run no code of its own, and only the group reaches the children of the compiler.
GUARDED = 'exec 3<&0; { cat <&3; kill -KILL 0; } >/dev/null 2>&1 & exec 3<&- "$@" </dev/null'


def user_cache(part: str) -> Path:
    """The folder for files that are made once on this machine: $XDG_CACHE_HOME or ~/.cache, then evomerge/`part`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "evomerge" / part


def run_compiler(command: Sequence[str]) -> None:
    """Run a command; it and its children end with this process.

    RuntimeError with its last line if it fails, and on a system without a POSIX shell.
    """
    if not POSIX:
        raise RuntimeError("no kernels are compiled on this system")
    process = subprocess.Popen(
        ["/bin/sh", "-c", GUARDED, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stderr is not None
    try:
        lines = process.stderr.read().strip().splitlines()
        code = process.wait()
    finally:
        kill_process_group(process.pid)  # the shell that waits for the pipe, and what an interrupt left
        process.wait()
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                pipe.close()
    if code != 0:
        raise RuntimeError((lines or [f"exit code {code}"])[-1])


class FileCache:
    """Files in a folder that are made once, each with its SHA-256 beside it.

    A file is used only if it belongs to this user (or root), no other user may write to it, and it has its SHA-256:
    loading runs the code in it, and a damaged library ends the process.  Otherwise it is made again.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        """folder: made if it is not there, for this user alone.  log: gets a line if the folder cannot be trusted."""
        self.wanted = folder
        self.log = log

    @cached_property
    def folder(self) -> Path:
        """The folder; or a temporary one for this process, if other users could put files into it."""
        try:
            self.wanted.parent.mkdir(parents=True, exist_ok=True)
            self.wanted.mkdir(mode=0o700, exist_ok=True)
            for place in (self.wanted.parent, self.wanted):
                close_to_others(place)
        except OSError as error:
            self.instead = tempfile.TemporaryDirectory(prefix="evomerge-")
            self.log(
                f"compiled kernels are kept in {self.instead.name}, which is deleted when this process ends: {error}. "
                f"Give {self.wanted} to this user alone (chown, chmod 700), or set XDG_CACHE_HOME"
            )
            return Path(self.instead.name)
        return self.wanted

    def file(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file of this name; `make` writes it to the path that it is given if there is none that can be used.

        The path lies in a folder of its own, which `make` may fill with other files; they are deleted.  Several
        processes may make the file at the same time; the last one's stays, and the SHA-256 of each is known.
        """
        file = self.folder / name
        if not self.is_sound(file):
            with disk_errors(file), self.scratch() as folder:
                make(folder / name)
                (folder / name).chmod(0o700)
                with appending(digest_of(file)) as digests:
                    digests.write(sha256(folder / name).encode() + b"\n")
                (folder / name).replace(file)
        return file

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Within the context, a new folder beside the files.  Those that killed processes left are removed."""
        for left in self.folder.glob("making-*"):
            remove_unfinished(left)
        folder = Path(tempfile.mkdtemp(prefix="making-", dir=self.folder))
        try:
            with appending(mark := folder / "mark") as held:
                lock(held)
                if POSIX:
                    mark.rename(folder / UNFINISHED)  # not before it is locked: another process would remove it
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def is_sound(self, file: Path) -> bool:
        """Whether a file is there, belongs to this user, and has a SHA-256 that is known."""
        try:
            return is_own(file) and sha256(file) in digest_of(file).read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return False


def digest_of(file: Path) -> Path:
    """The file that holds the SHA-256 of every file that was made under a name, a line each."""
    return file.with_name(file.name + ".sha256")


def is_own(path: Path) -> bool:
    """Whether a path belongs to this user or root and no other user may write to it.  OSError if there is none."""
    found, user = path.lstat(), user_id()
    return user is None or (found.st_uid in (user, 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def close_to_others(folder: Path) -> None:
    """Take other users' right to write to a folder of this user.  PermissionError if it belongs to another user."""
    found = folder.lstat()
    if found.st_uid == user_id() and stat.S_ISDIR(found.st_mode):
        folder.chmod(stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    if not stat.S_ISDIR(folder.lstat().st_mode) or not is_own(folder):
        raise PermissionError(f"{folder} is no folder of this user alone")
