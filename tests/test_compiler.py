"""Compilers end with those who asked for them, and only this user's own whole files are loaded."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from evomerge.merge.kernels.compiler import FileCache, run_compiler

SHELL = ["sh", "-c"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def pids() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def written_pid(file: Path) -> int:
    assert until(lambda: file.exists() and file.read_text().endswith("\n"))
    return int(file.read_text())


# --- Running ---


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_compiler_and_its_children_end_with_the_process_that_asked_for_them(how: signal.Signals, tmp_path: Path):
    """The child of the compiler, as g++ has cc1plus, is the one that nobody else would end."""
    file = tmp_path / "pid"
    script = f"sh -c 'echo $$ > {file}; sleep 100; true' & wait"
    asking = f"from evomerge.merge.kernels.compiler import run_compiler; run_compiler(['sh', '-c', {script!r}])"
    asker = subprocess.Popen([sys.executable, "-c", asking], stderr=subprocess.DEVNULL)
    grandchild = written_pid(file)
    assert alive(grandchild)
    asker.send_signal(how)
    asker.wait()
    assert until(lambda: not alive(grandchild))


def test_a_worker_is_ended_with_its_children(tmp_path: Path):
    """Children in its own process group, whoever started them."""
    import asyncio

    from evomerge.search.workers.process_worker import ProcessWorker

    async def start_and_kill() -> int:
        worker = object.__new__(ProcessWorker)
        script = f"sh -c 'echo $$ > {tmp_path / 'pid'}; sleep 100; true' & wait"
        worker.process = await asyncio.create_subprocess_exec("sh", "-c", script, process_group=0)
        child = written_pid(tmp_path / "pid")
        await worker.kill()
        return child

    child = asyncio.run(start_and_kill())
    assert until(lambda: not alive(child))


def test_the_children_of_a_worker_end_when_its_driver_does(tmp_path: Path):
    code = (
        "import subprocess, sys; from evomerge.search.workers.process_main import DriverConnection\n"
        f"p = subprocess.Popen(['sleep', '100']); open({str(tmp_path / 'pid')!r}, 'w').write(f'{{p.pid}}\\n')\n"
        "DriverConnection(sys.stdin.buffer, sys.stdout.buffer); p.wait()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, process_group=0)
    child = written_pid(tmp_path / "pid")
    assert worker.stdin is not None
    worker.stdin.close()
    assert until(lambda: not alive(child))
    worker.wait()


def test_a_compiler_that_fails_is_quoted():
    with pytest.raises(RuntimeError, match=r"^second$"):
        run_compiler([*SHELL, "echo first >&2; echo second >&2; exit 3"])
    with pytest.raises(RuntimeError, match=r"^exit code 3$"):
        run_compiler([*SHELL, "exit 3"])
    with pytest.raises(RuntimeError, match="/nowhere/g"):
        run_compiler(["/nowhere/g++"])


def test_nothing_is_left_of_a_compiler_that_is_done(tmp_path: Path):
    run_compiler([*SHELL, f"echo $$ > {tmp_path / 'pid'}"])
    group = written_pid(tmp_path / "pid")
    assert until(lambda: not any(alive(pid) and group_of(pid) == group for pid in pids()))


# --- Keeping ---


def make(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text) and None


@pytest.fixture
def kept(tmp_path: Path) -> FileCache:
    found = FileCache(tmp_path / "cache" / "evomerge" / "kernels", lambda line: None)
    found.file("x.so", make("first"))
    return found


def again(kept: FileCache) -> str:
    """What is used when the file is asked for the next time."""
    return FileCache(kept.wanted, lambda line: None).file("x.so", make("second")).read_text()


def test_a_kept_file_is_made_once_and_belongs_to_its_user_alone(kept: FileCache):
    assert again(kept) == "first"
    assert kept.wanted.stat().st_mode & 0o777 == 0o700
    assert (kept.wanted / "x.so").stat().st_mode & 0o077 == 0


def torn(file: Path) -> None:
    file.write_text(file.read_text()[:-1])


def changed(file: Path) -> None:
    file.write_text("other")


def writable(file: Path) -> None:
    file.chmod(0o772)


def linked(file: Path) -> None:
    target = file.with_name("target")
    file.rename(target)
    file.symlink_to(target)


def without_digest(file: Path) -> None:
    file.with_name(file.name + ".sha256").unlink()


def of_somebody_else(file: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(file, 12345, -1)


@pytest.mark.parametrize("spoil", [torn, changed, writable, linked, without_digest, of_somebody_else])
def test_a_file_that_cannot_be_trusted_is_made_again(spoil: Callable[[Path], None], kept: FileCache):
    spoil(kept.wanted / "x.so")
    assert again(kept) == "second"
    assert not (kept.wanted / "x.so").is_symlink()
    assert again(kept) == "second"


def test_what_a_killed_compilation_left_is_removed_by_the_next_and_what_others_make_is_not(kept: FileCache):
    def fill(file: Path) -> None:
        (file.parent / "inner").mkdir()
        (file.parent / "inner" / "object.o").write_text("x")
        file.write_text("third")

    def fill_and_wait(file: Path) -> None:
        fill(file)
        ready.set()
        time.sleep(100)

    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=FileCache(kept.wanted, print).file, args=("y.so", fill_and_wait))
    child.start()
    assert ready.wait(20)
    assert kept.file("z.so", fill).read_text() == "third"
    (making,) = kept.wanted.glob("making-*")
    assert (making / "inner" / "object.o").exists()
    child.kill()
    child.join()
    kept.file("y.so", fill)
    assert sorted(f.name for f in kept.wanted.iterdir() if f.suffix != ".sha256") == ["x.so", "y.so", "z.so"]


def test_compilers_write_nothing_outside_the_folder_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from evomerge.merge.kernels import compiled
    from evomerge.merge.measure import scan

    commands: list[Sequence[str]] = []
    monkeypatch.setattr(compiled, "run_compiler", commands.append)
    monkeypatch.setattr(scan, "run_compiler", commands.append)
    compiled.compile_apart(compiled.Variant(torch.float32, None, torch.float32, 2), tmp_path / "x.pt2")
    scan.compile_scan(tmp_path / "x.so")
    assert [f"TMPDIR={tmp_path}" in command for command in commands] == [True, True]


def test_a_folder_of_this_user_is_closed_to_others(kept: FileCache):
    for folder in (kept.wanted, kept.wanted.parent):
        folder.chmod(0o777)
    assert again(kept) == "first"
    assert [f.stat().st_mode & 0o022 for f in (kept.wanted, kept.wanted.parent)] == [0, 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("which", ["kernels", "evomerge"])
def test_a_folder_of_somebody_else_is_not_used(which: str, kept: FileCache):
    os.chown(kept.wanted if which == "kernels" else kept.wanted.parent, 12345, -1)
    lines: list[str] = []
    other = FileCache(kept.wanted, lines.append)
    file = other.file("x.so", make("second"))
    assert file.read_text() == "second"
    assert file.parent != kept.wanted
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert "chmod 700" in lines[0]
    assert str(kept.wanted) in lines[0]


def test_a_torn_library_is_compiled_again_and_not_loaded(tmp_path: Path):
    """Real: a library whose last page is gone ends the process that maps it."""
    from evomerge.merge.kernels.compiled import Compiled

    lines: list[str] = []
    if Compiled(tmp_path / "kernels", lines.append).scan.library is None:
        pytest.skip(f"nothing can be compiled here: {lines}")
    (file,) = (tmp_path / "kernels").glob("*.so")
    whole = file.read_bytes()
    file.unlink()  # what is mapped stays whole
    file.write_bytes(whole[: len(whole) // 2])
    file.chmod(0o700)
    code = (
        "from pathlib import Path; from evomerge.merge.kernels.compiled import Compiled\n"
        f"assert Compiled(Path({str(tmp_path / 'kernels')!r}), print).scan.library is not None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert len(file.read_bytes()) == len(whole)
