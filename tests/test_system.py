"""Systems other than Linux, as far as Linux can show them: what they lack is taken away from a process."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from searches import ROOT, write_config

from evomerge import system

WITHOUT = """
import os, signal, sys
import ctypes, subprocess, asyncio, multiprocessing, torch  # use what is taken away below
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("geteuid", "getpgrp", "killpg", "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL"):
    delattr(signal, name)
from evomerge.cli import main
main()
"""


@pytest.mark.more
def test_a_search_runs_where_everything_is_missing_that_windows_lacks(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"trials": 6})
    for arguments in (["--version"], ["check", config], ["search", config, "--no-check", "--run", tmp_path / "run"]):
        command = [sys.executable, "-c", WITHOUT, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "verdict.json").is_file()


def test_a_lock_of_windows_keeps_a_second_process_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = types.ModuleType("msvcrt")  # its call locks bytes from where the file stands, as POSIX's lockf does
    monkeypatch.setattr(windows, "LK_NBLCK", os.F_TLOCK, raising=False)
    monkeypatch.setattr(windows, "locking", lambda handle, how, size: os.lockf(handle, how, size), raising=False)
    monkeypatch.setattr(system, "msvcrt", windows)
    monkeypatch.setattr(system, "fcntl", None)
    other = f"import os, sys; os.lockf(os.open(sys.argv[1], os.O_RDWR), os.F_TLOCK, {system.LOCKED_BYTE + 1})"
    path = tmp_path / "lock"
    with path.open("ab", buffering=0) as file:
        system.lock(file)
        system.lock(file, wait=False)  # this process holds it
        file.write(b"content")
        found = subprocess.run([sys.executable, "-c", other, path], capture_output=True, text=True)
        assert "BlockingIOError" in found.stderr or "PermissionError" in found.stderr
    assert subprocess.run([sys.executable, "-c", other, path], capture_output=True).returncode == 0
    assert path.read_bytes() == b"content"
