"""The power fails, the disk fails, and a process dies while the database writes its file.

An ext4 of its own is told to stop without writing anything more (what the kernel's own file system tests do); what was
not synced is lost, and what the journal holds is replayed at the next mount.  A copy of the database's files, each at
another moment, is what a backup program makes of a running search.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from disturbances.disks import NEEDS_ROOT
from disturbances.disturbed import (
    REFUSED,
    Disturbed,
    done_before,
    finished,
    injection,
    kill,
    plain,
    resumed,
    start_in_new_process,
    wait,
)
from disturbances.preload import preloaded

SHUT_DOWN, WITHOUT_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
WRITES = {"study.db": 170, "study.db-wal": 500}  # about as many as a search of 16 trials makes


class Disk:
    """An ext4 in a file.  Its journal is written every second, so that a random moment finds it in all states."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder

    def mount(self) -> bool:
        command = ["mount", "-o", "loop,commit=1", self.image, self.folder]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def unmount(self) -> None:
        subprocess.run(["umount", self.folder], check=True)

    def fail(self) -> None:
        """From now on nothing is read or written any more."""
        handle = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(handle, SHUT_DOWN, struct.pack("I", WITHOUT_FLUSH))
        os.close(handle)


@contextlib.contextmanager
def own_disk(search: Disturbed) -> Iterator[Disk | None]:
    """A disk that the search's run folder is on; None if this system does not allow it."""
    disk = Disk(search.folder / "image", search.folder / "disk")
    disk.folder.mkdir()
    with disk.image.open("wb") as file:
        file.truncate(64 << 20)
    make = shutil.which("mkfs.ext4") or "/usr/sbin/mkfs.ext4"
    allowed = os.geteuid() == 0 and Path(make).exists()
    allowed = allowed and subprocess.run([make, "-q", disk.image], check=False).returncode == 0 and disk.mount()
    if not allowed:
        yield None
        return
    (disk.folder / "run").mkdir()
    search.run.symlink_to(disk.folder / "run")
    try:
        yield disk
        search.run.unlink()
        shutil.copytree(disk.folder / "run", search.run)
    finally:
        subprocess.run(["umount", "-l", disk.folder], check=False, capture_output=True)


@injection("a power cut", quick=True)
def _(search: Disturbed) -> str:
    """What the log calls complete is there afterwards."""
    with own_disk(search) as disk:
        if disk is None:
            return NEEDS_ROOT
        started = search.start()
        if not search.moment(started):
            return done_before(started)
        said = {int(n) for n in re.findall(r"trial (\d+) complete", search.log())}
        disk.fail()
        ended = kill(started)
        disk.unmount()
        assert disk.mount()
        kept = set(finished(search.run))
        assert said <= kept, f"trials {sorted(said - kept)} are lost"
        return resumed(search, ended, (-signal.SIGKILL,))


@injection("the disk fails")
def _(search: Disturbed) -> str:
    """As a power cut, but the process lives and gets errors; it ends with a message."""
    with own_disk(search) as disk:
        if disk is None:
            return NEEDS_ROOT
        started = search.start()
        if not search.moment(started):
            return done_before(started)
        disk.fail()
        ended = plain(wait(started), REFUSED, 0)
        disk.unmount()
        assert disk.mount()
        assert ended.returncode or (search.run / "verdict.json").exists(), "it ended well and its verdict is lost"
        assert "damaged" not in ended.stderr, ended
        return resumed(search, ended, (REFUSED, 0))


@injection("SIGKILL inside a write to the database")
def _(search: Disturbed) -> str:
    """Half of a page is written: into the file, which only a checkpoint writes to, or into the write-ahead log."""
    if (library := preloaded(search.folder)) is None:
        return "not tried: there is no C compiler"
    file = search.random.choice([*WRITES])
    count = search.random.randrange(1, WRITES[file])
    environment = {"LD_PRELOAD": str(library), "EVOMERGE_TEST_DIE": f"{count} {file}"}
    ended = wait(start_in_new_process(*search.command, environment=environment))
    return f"{file}: " + resumed(search, ended, (-signal.SIGKILL, 0))


@injection("a copy of a running search, each file at another moment", alone=False)
def _(search: Disturbed) -> str:
    """The copy is refused, or goes on to the trials of the undisturbed run."""
    started = search.start()
    if not search.moment(started) or not (search.run / "study.db").exists():
        return done_before(started)
    copy = Disturbed(search.folder / "copy", search.family, search.random)
    shutil.copytree(search.run, copy.run, ignore=shutil.ignore_patterns("study.db*", "*.part", "lock"))
    names = ["study.db", "study.db-wal"]
    search.random.shuffle(names)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(search.run / name, copy.run / name)
        time.sleep(search.random.choice([0.0, 0.05, 0.5, 2.0]))
    done = wait(started)
    assert done.returncode == 0, done
    resumed_copy = plain(copy.resume(), 0, REFUSED)
    if resumed_copy.returncode == 0:
        assert finished(copy.run) == finished(search.run), "the copy went on to other trials"
        return "went on to the same trials"
    assert "damaged" in resumed_copy.stderr or "put back a copy" in resumed_copy.stderr, resumed_copy
    return "was refused"
