"""Systems other than Linux, as far as Linux can show them: what they lack is taken away from a process."""

import ast
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from searches import ROOT, write_config

from evomerge import system

LACKED = {
    "os": ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "fork", "geteuid", "getpgrp", "getuid", "killpg", "sysconf"),
    "signal": ("SIGHUP", "SIGKILL"),
}  # by Windows, which also lacks the modules `fcntl` and `resource`
WITHOUT = f"""
import os, signal, sys
import importlib
sys.path.append({str(Path(__file__).parent)!r})
from searches import COMMANDS_NEED
for name in COMMANDS_NEED:  # other libraries have ways of their own on Windows
    if not name.startswith("evomerge"):
        importlib.import_module(name)
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in {[name for name in LACKED["os"] if not name.startswith("O_") and name != "sysconf"]}:
    delattr(os, name)
for name in {LACKED["signal"]}:
    delattr(signal, name)
from evomerge.cli import main
main()
"""


@pytest.mark.more
def test_a_search_runs_without_what_windows_lacks(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"trials": 6})
    version = subprocess.run([sys.executable, "-c", WITHOUT, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert version.stdout.startswith("evomerge "), version.stderr
    command = [sys.executable, "-c", WITHOUT, "search", config, "--run", tmp_path / "run", "--out", tmp_path / "merged"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "verdict.json").is_file()
    assert (tmp_path / "merged" / "recipe.yaml").is_file()


def test_only_one_file_names_what_windows_lacks() -> None:
    names = {f"{module}.{name}" for module, found in LACKED.items() for name in found}
    guarded = {ROOT / "evomerge" / "system.py", ROOT / "evomerge" / "evaluate" / "chat_template.py"}
    for file in set((ROOT / "evomerge").rglob("*.py")) - guarded:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in names, f"{file}: {ast.unparse(node)}"
            if isinstance(node, ast.Import):
                assert not {"fcntl", "resource"} & {alias.name for alias in node.names}, file


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
