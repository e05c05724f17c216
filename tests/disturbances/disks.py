"""Disks that are full or read-only."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from searches import Started

from disturbances.disturbed import (
    REFUSED,
    Disturbed,
    alive,
    done_before,
    injection,
    kill,
    plain,
    resumed,
    wait,
)

NEEDS_ROOT = "not tried: mounting needs root"


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 24) -> Iterator[bool]:
    """A tmpfs on the folder; whether this system allows it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    allowed = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all space of a disk."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
                    file.flush()
    return ballast


def on_a_small_disk(search: Disturbed, disturb: Callable[[Path, Started], str]) -> str:
    """A search whose run folder is a small disk of its own."""
    disk = search.folder / "disk"
    with small_disk(disk) as allowed:
        if not allowed:
            return NEEDS_ROOT
        search.run.symlink_to(disk)
        started = search.start()
        what = disturb(disk, started) if search.moment(started) else done_before(started)
        search.run.unlink()
        shutil.copytree(disk, search.run)
        return what


@injection("the disk full")
def _(search: Disturbed) -> str:
    def filled(disk: Path, started: Started) -> str:
        ballast = fill(disk)
        ended = wait(started)
        ballast.unlink()
        return resumed(search, ended, (REFUSED, 0))

    return on_a_small_disk(search, filled)


TEMPORARY = """
import os, tempfile
os.environ["TMPDIR"] = os.environ["SQLITE_TMPDIR"] = tempfile.tempdir = FOLDER
"""


@injection("the disk of temporary files full")
def _(search: Disturbed) -> str:
    """From the start or from a random moment on; also while it resumes, which is refused or goes on."""
    disk = search.folder / "temporary"
    with small_disk(disk, 1) as allowed:
        if not allowed:
            return NEEDS_ROOT
        search.prelude = TEMPORARY.replace("FOLDER", repr(str(disk)))
        at_once = search.random.random() < 0.5
        if at_once:
            fill(disk)
        started = search.start()
        if not at_once and search.moment(started):
            fill(disk)
        ended = plain(wait(started), REFUSED, 0)
        if ended.returncode:
            assert "full" in ended.stderr, ended
            again = plain(search.resume(), REFUSED, 0)
            assert again.returncode == 0 or "full" in again.stderr, again
        (disk / "ballast").unlink()
        return resumed(search, ended, (REFUSED, 0))


@injection("the run folder read-only", quick=True)
def _(search: Disturbed) -> str:
    def remount(disk: Path, started: Started) -> str:
        """While it runs if a moment without an open file is found, else before it resumes."""

        def remounted(how: str) -> bool:
            command = ["mount", "-o", f"remount,{how}", disk]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0

        if not any(remounted("ro") for _ in range(1000) if alive(started.pid)):
            ended = kill(started)
            assert remounted("ro")
        else:
            ended = wait(started)
        refused = search.resume()
        assert remounted("rw")
        plain(refused, REFUSED)
        return "refused; " + resumed(search, ended, (REFUSED, -signal.SIGKILL, 0))

    return on_a_small_disk(search, remount)
