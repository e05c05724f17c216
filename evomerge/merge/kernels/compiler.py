"""Run a compiler, and keep what it makes: nothing of it outlives who asked, and nobody else's code is ever loaded."""

import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from evomerge.files import sha256, write_text, written_aside

# The compiler's process group dies when the pipe from its parent closes, however the parent ends: a killed process runs
# no code of its own, and a compiler's own children are known to nobody else.
GUARDED = 'exec 3<&0; { cat <&3; kill -KILL 0; } >/dev/null 2>&1 & exec 3<&- "$@" </dev/null'


def user_cache(part: str) -> Path:
    """Where this user's machine keeps what was made once: $XDG_CACHE_HOME or ~/.cache, under evomerge."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "evomerge" / part


def run_compiler(command: Sequence[str]) -> None:
    """Run a command that ends with this process, all its children too.  RuntimeError with its last word if it fails."""
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
        said = process.stderr.read().strip().splitlines()
        code = process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the guard, and what an interrupt left running
        process.wait()
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                pipe.close()
    if code != 0:
        raise RuntimeError((said or [f"exit code {code}"])[-1])


class Kept:
    """Files that were made once, in a folder, each beside its SHA-256.

    A file is used only if it belongs to this user (or root), nobody else may write to it, and it is whole: loading runs
    what stands in it, and a torn library ends the process.  Any other is made again.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        """folder: made if it is not there, for this user alone.  log: told if the folder cannot be trusted."""
        self.wanted = folder
        self.log = log

    @cached_property
    def folder(self) -> Path:
        """The folder, or one for this process alone where others could put files into it."""
        try:
            self.wanted.parent.mkdir(parents=True, exist_ok=True)
            self.wanted.mkdir(mode=0o700, exist_ok=True)
            for place in (self.wanted.parent, self.wanted):
                close_to_others(place)
        except OSError as error:
            self.instead = tempfile.TemporaryDirectory(prefix="evomerge-")
            self.log(
                f"compiled kernels are kept in {self.instead.name}, which goes with this process: {error}. Give "
                f"{self.wanted} to this user alone (chown, chmod 700), or set XDG_CACHE_HOME"
            )
            return Path(self.instead.name)
        return self.wanted

    def file(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file of this name; `make` writes it if it is not there or cannot be trusted."""
        file = self.folder / name
        if not self.is_sound(file):
            with suppress(FileNotFoundError):
                file.unlink()
            with written_aside(file) as aside:
                make(aside)
                aside.chmod(0o700)
                write_text(digest_of(file), sha256(aside) + "\n")
        return file

    def is_sound(self, file: Path) -> bool:
        """Whether a file is there, is this user's own, and is what was written."""
        try:
            return is_own(file) and digest_of(file).read_text(encoding="ascii").strip() == sha256(file)
        except (OSError, ValueError):
            return False


def digest_of(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def is_own(path: Path) -> bool:
    """Whether a path belongs to this user or root and nobody else may write to it.  OSError if there is none."""
    found = path.lstat()
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def close_to_others(folder: Path) -> None:
    """Take from others the right to write to a folder of this user.  PermissionError if it belongs to somebody else."""
    found = folder.lstat()
    if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode):
        folder.chmod(stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    if not stat.S_ISDIR(folder.lstat().st_mode) or not is_own(folder):
        raise PermissionError(f"{folder} is no folder of this user alone")
