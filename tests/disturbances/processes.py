"""Signals to the driver, its terminal, and processes that work on one run or one cache at the same time."""

import contextlib
import os
import pty
import select
import signal
import threading
import time

import psutil
from searches import start_cli, verdict_of

from disturbances.disturbed import (
    PATIENCE,
    REFUSED,
    Disturbed,
    alive,
    done_before,
    finished,
    goes_on,
    injection,
    kill,
    killed_and_resumed,
    plain,
    resumed,
    wait,
)


def signalled(search: Disturbed, *numbers: signal.Signals) -> str:
    started = search.start()
    if not search.wait_for_log(started, f"trial {search.random.randrange(1, 16)} begins", search.random.random() / 4):
        return done_before(started)
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, number)
        time.sleep(search.random.uniform(0, 0.1))
    ended = wait(started)
    codes = tuple(code for n in numbers for code in (-n, 128 + n))
    return resumed(search, ended, (*codes, 0))


@injection("SIGKILL of the driver", quick=True)
def _(search: Disturbed) -> str:
    return killed_and_resumed(search)


@injection("SIGTERM")
def _(search: Disturbed) -> str:
    return signalled(search, signal.SIGTERM)


@injection("SIGINT")
def _(search: Disturbed) -> str:
    return signalled(search, signal.SIGINT)


@injection("a second SIGINT", quick=True)
def _(search: Disturbed) -> str:
    return signalled(search, signal.SIGINT, signal.SIGINT)


@injection("SIGKILL, and again while it resumes")
def _(search: Disturbed) -> str:
    started = search.start()
    if not search.moment(started):
        return done_before(started)
    kill(started)
    before = finished(search.run)
    again = start_cli("resume", search.run) if (search.run / "config.yaml").exists() else search.start()
    time.sleep(search.random.uniform(0.2, 2.0))
    ended = kill(again)
    after = finished(search.run)
    assert {n: after.get(n) for n in before} == before, "a finished trial changed"
    return resumed(search, ended, (-signal.SIGKILL, 0))


@injection("the machine suspended")
def _(search: Disturbed) -> str:
    started = search.start()
    if not search.moment(started):
        return done_before(started)
    suspend([psutil.Process(started.pid)], search.suspended)
    return goes_on(started, "went on")


def suspend(processes: list[psutil.Process], seconds: float) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        time.sleep(seconds if number == signal.SIGSTOP else 0)


OWN_TERMINAL = """
import fcntl, os, sys, termios
os.close(OURS)
os.setsid()
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
if ERRORS_TOO:
    os.dup2(1, 2)
from evomerge.report.progress import console
console.is_interactive = True
"""


@injection("the terminal gone", quick=True)
def _(search: Disturbed) -> str:
    """The driver gets SIGHUP, and an error whenever it writes to its screen."""
    both = search.random.random() < 0.5
    ours, theirs = pty.openpty()
    search.prelude = OWN_TERMINAL.replace("ERRORS_TOO", str(both)).replace("OURS", str(ours))
    started = search.start(terminal=theirs)
    os.close(theirs)
    gone = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):  # the search ended before
            while not gone.is_set():
                if select.select([ours], [], [], 0.05)[0]:
                    os.read(ours, 1 << 16)

    reader = threading.Thread(target=read)
    reader.start()
    going_on = search.moment(started)
    gone.set()
    reader.join()
    os.close(ours)
    what = goes_on(started, f"went on without its screen{' and its errors' * both}")
    search.prelude = ""
    return what if going_on else "was done before"


@injection("two resumes at once", quick=True)
def _(search: Disturbed) -> str:
    started = search.start()
    if not search.wait_for_log(started, f"trial {search.random.randrange(1, 16)} begins", 0.0):
        return done_before(started)
    kill(started)
    before = finished(search.run)
    two = []
    for _ in range(2):
        two.append(start_cli("resume", search.run))
        time.sleep(search.random.choice([0.0, 0.02, 0.5]))
    ends = [plain(wait(one, "one of two resumes"), 0, REFUSED) for one in two]
    assert any(end.returncode == 0 for end in ends), ends
    for end in ends:
        assert end.returncode == 0 or "is working on this run" in end.stderr, end
    after = finished(search.run)
    assert {n: after.get(n) for n in before} == before, "a finished trial changed"
    return f"one went on, the other {'was refused' if any(e.returncode for e in ends) else 'found it finished'}"


COMPILES = """
import os
import evomerge.merge.kernels.compiled as c
os.environ["XDG_CACHE_HOME"] = FOLDER
c.WORTHWHILE = 1
real = c.Compiled.kernel
c.Compiled.kernel = lambda self, v: real(self, v) if KERNELS and (v in self.loaded or not self.loaded) else None
"""
TIES = {"method": "ties", "space": {"weight": [0.0, 1.6], "density": [0.2, 1.0]}}


@injection("three searches without compiled files, one of them killed")
def _(search: Disturbed) -> str:
    """They compile the same files into one folder.  In the first round a kernel too, which takes a minute."""
    cache = search.folder / "cache"
    search.changes = dict(TIES)
    kernels = search.suspended > 10
    search.prelude = COMPILES.replace("FOLDER", repr(str(cache))).replace("KERNELS", str(kernels))
    three = [search]
    for number in (1, 2):
        folder = search.folder / str(number)
        folder.mkdir()
        three.append(Disturbed(folder, search.family, search.random, search.changes, prelude=search.prelude))
    started = [one.start() for one in three]
    time.sleep(search.random.uniform(0, 6.0))
    first_alive = alive(started[0].pid)
    first = kill(started[0])
    for one, process in zip(three[1:], started[1:], strict=True):
        ended = wait(process, patience=3 * PATIENCE)
        assert ended.returncode == 0, ended
        for word in ("uncompiled", "without a compiler"):
            assert word not in one.log(), one.log()
    what = resumed(search, first, (-signal.SIGKILL, 0))
    for one in three[1:]:
        assert finished(one.run) == finished(search.run), "three searches found different trials"
        assert verdict_of(one.run)["holdout"] == verdict_of(search.run)["holdout"]
    left = [f.name for f in (cache / "evomerge" / "kernels").iterdir() if f.name.startswith("making-")]
    assert len(left) <= 1, f"unfinished files are left: {left}"
    return f"{'scan and a kernel' if kernels else 'scan'}; {what if first_alive else 'was done before'}"
