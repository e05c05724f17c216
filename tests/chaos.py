"""Chaos: real searches on the tiny family, disturbed at random seeded moments, resumed, and compared.

    python tests/chaos.py [--rounds 5] [--seed 0] [--only NAME ...] [--table FILE]

Every round does each injection once, at a moment drawn from the seed, and checks what a night must not change:
trials that were finished are there afterwards with the same parameters, value and item scores; numbers are unique and
without gaps; the search comes to its verdict; and with one worker trials and verdict are those of the undisturbed run.
"""

import argparse
import collections
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from searches import ROOT, Done, Started, run_cli, start_cli, verdict_of, write_config

TRIALS = 16
PATIENCE = 300.0  # seconds that a search may take before it counts as hanging


@dataclass
class Night:
    """One search and what is done to it.

    folder: all that belongs to it.  changes: to the configuration.  options: of the command line.
    """

    folder: Path
    family: Path
    random: random.Random
    changes: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    prelude: str = ""
    suspended: float = 2.0
    outage: float = 3.0
    trials: dict[int, Any] | None = None

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self) -> Started:
        config = write_config(self.folder, self.family, **self.changes)
        return start_cli("search", config, "--run", self.run, *self.options, prelude=self.prelude)

    def resume(self) -> Done:
        return run_cli("resume", self.run, *self.options, prelude=self.prelude)

    def moment(self, started: Started) -> bool:
        """Wait for a random moment of the search; whether it is still going on then."""
        number = self.random.randrange(1, TRIALS)
        end = time.monotonic() + PATIENCE
        while f"trial {number} begins" not in self.log():
            if not alive(started.pid):
                return False
            if time.monotonic() > end:
                os.kill(started.pid, signal.SIGKILL)
                raise AssertionError(f"the search hangs before trial {number}:\n{self.log()[-2000:]}")
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, 0.25))
        return alive(started.pid)

    def log(self) -> str:
        file = self.run / "log.txt"
        return file.read_text(encoding="utf-8") if file.exists() else ""


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait(started: Started, what: str = "the search") -> Done:
    """The end of a process; an error if it does not come."""
    end = time.monotonic() + PATIENCE
    while alive(started.pid):
        if time.monotonic() > end:
            for process in [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]:
                process.kill()
            raise AssertionError(f"{what} hangs: {started.wait()}")
        time.sleep(0.01)
    return started.wait()


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes of a driver."""
    children = psutil.Process(pid).children(recursive=True)
    return [p for p in children if "evomerge.search.workers.process_main" in " ".join(p.cmdline())]


def finished(run: Path) -> dict[int, Any]:
    """Number -> parameters, value and item scores of every finished trial; an error if numbers are not 0, 1, 2, ..."""
    from evomerge.search.run import open_run
    from evomerge.search.storage.trial_record import record_of

    trials = open_run(run).study().get_trials(deepcopy=False)
    assert [t.number for t in trials] == list(range(len(trials))), "trial numbers have gaps or repeat"
    return {t.number: (t.state.name, t.params, t.value, record_of(t).scores) for t in trials if t.state.is_finished()}


Injection = Callable[[Night], str]
"""Disturbs a search, sees it to its end, and says in a few words what happened."""

INJECTIONS: dict[str, Injection] = {}
ALONE: set[str] = set()  # one worker, and nothing that a trial's result may depend on: equal to the undisturbed run
QUICK: set[str] = set()  # of the short form


def injection(name: str, alone: bool = True, quick: bool = True) -> Callable[[Injection], Injection]:
    def add(function: Injection) -> Injection:
        INJECTIONS[name] = function
        ALONE.update([name] if alone else [])
        QUICK.update([name] if quick else [])
        return function

    return add


def resumed(night: Night, killed: Done, codes: tuple[int, ...]) -> str:
    """Go on after an end with one of these exit codes; nothing finished before is lost."""
    assert killed.returncode in codes, killed
    assert "Traceback" not in killed.stderr or killed.returncode < 0, killed.stderr
    before = finished(night.run)
    again = night.resume()
    assert again.returncode == 0, again
    after = finished(night.run)
    assert {n: after.get(n) for n in before} == before, "a finished trial changed"
    return f"ended with {killed.returncode}, resumed"


def signalled(night: Night, *numbers: signal.Signals) -> str:
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    for number in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, number)
        time.sleep(night.random.uniform(0, 0.1))
    ended = wait(started)
    codes = tuple(code for n in numbers for code in (-n, 128 + n))
    return resumed(night, ended, (*codes, 0))


def done_before(started: Started) -> str:
    ended = wait(started)
    assert ended.returncode == 0, ended
    return "was done before"


def goes_on(started: Started, what: str) -> str:
    ended = wait(started)
    assert ended.returncode == 0, ended
    return what


@injection("SIGKILL of the driver")
def _(night: Night) -> str:
    return signalled(night, signal.SIGKILL)


@injection("SIGKILL in the learned start", alone=False, quick=False)
def _(night: Night) -> str:
    """Steps that were taken before stay as they are, and a second search without the kill takes the same ones."""
    night.changes = {"sampler": {"name": "auto", "steps": 12}}
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    time.sleep(night.random.uniform(0, 1.5))
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.pid, signal.SIGKILL)
    ended = started.wait()
    before = gradient_steps(night.run)
    what = resumed(night, ended, (-signal.SIGKILL, 0))
    after = gradient_steps(night.run)
    assert after[: len(before)] == before, "a gradient step changed"
    night.run.rename(night.folder / "disturbed")
    undisturbed = wait(night.start())
    assert undisturbed.returncode == 0, undisturbed
    assert gradient_steps(night.run) == after, "the resumed search took other steps"
    return f"{what}, {len(before)} of {len(after)} gradient steps were taken before"


def gradient_steps(run: Path) -> list[Any]:
    """Point and gradient of every step in a study."""
    from evomerge.search.run import open_run
    from evomerge.search.storage.step_record import step_records

    return [(step.point, step.gradient, step.value) for step in step_records(open_run(run).study().user_attrs)]


@injection("SIGTERM", quick=False)
def _(night: Night) -> str:
    return signalled(night, signal.SIGTERM)


@injection("SIGINT", quick=False)
def _(night: Night) -> str:
    return signalled(night, signal.SIGINT)


@injection("a second SIGINT")
def _(night: Night) -> str:
    return signalled(night, signal.SIGINT, signal.SIGINT)


@injection("SIGKILL, and again while it resumes", quick=False)
def _(night: Night) -> str:
    signalled_once = night.start()
    if not night.moment(signalled_once):
        return done_before(signalled_once)
    os.kill(signalled_once.pid, signal.SIGKILL)
    signalled_once.wait()
    before = finished(night.run)
    again = start_cli("resume", night.run)
    time.sleep(night.random.uniform(0.2, 2.0))
    with contextlib.suppress(ProcessLookupError):
        os.kill(again.pid, signal.SIGKILL)
    ended = again.wait()
    after = finished(night.run)
    assert {n: after.get(n) for n in before} == before, "a finished trial changed"
    return resumed(night, ended, (-signal.SIGKILL, 0))


@injection("the machine suspended", quick=False)
def _(night: Night) -> str:
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    suspend([psutil.Process(started.pid)], night.suspended)
    return goes_on(started, "went on")


def suspend(processes: list[psutil.Process], seconds: float) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        time.sleep(seconds if number == signal.SIGSTOP else 0)


CLOCK = """
import os, time
real = time.time
time.time = lambda: real() - (36000 if os.path.exists(FLAG) else 0)
"""


@injection("the clock set back by ten hours")
def _(night: Night) -> str:
    night.prelude = CLOCK.replace("FLAG", repr(str(night.folder / "flag")))
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    (night.folder / "flag").touch()
    return goes_on(started, "went on")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 24 MB on the folder; whether this system allows it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    allowed = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", folder], check=True)


def on_a_small_disk(night: Night, disturb: Callable[[Path, Started], str]) -> str:
    """A search whose run folder is a small disk of its own."""
    disk = night.folder / "disk"
    with small_disk(disk) as allowed:
        if not allowed:
            return "not tried: mounting needs root"
        night.run.symlink_to(disk)
        started = night.start()
        what = disturb(disk, started) if night.moment(started) else done_before(started)
        night.run.unlink()
        shutil.copytree(disk, night.run)
        return what


@injection("the disk full", quick=False)
def _(night: Night) -> str:
    def fill(disk: Path, started: Started) -> str:
        with contextlib.suppress(OSError), (disk / "ballast").open("wb") as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
                        file.flush()
        ended = wait(started)
        (disk / "ballast").unlink()
        return resumed(night, ended, (2, 0))

    return on_a_small_disk(night, fill)


@injection("the run folder read-only")
def _(night: Night) -> str:
    def remount(disk: Path, started: Started) -> str:
        """While it runs if a moment without an open file is found, else before it resumes."""

        def remounted(how: str) -> bool:
            command = ["mount", "-o", f"remount,{how}", disk]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0

        if not any(remounted("ro") for _ in range(1000) if alive(started.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(started.pid, signal.SIGKILL)
            ended = started.wait()
            assert remounted("ro")
        else:
            ended = wait(started)
        refused = night.resume()
        assert remounted("rw")
        assert refused.returncode == 2, refused
        assert "Traceback" not in refused.stderr, refused.stderr
        return "refused; " + resumed(night, ended, (2, -signal.SIGKILL, 0))

    return on_a_small_disk(night, remount)


@injection("a truncated study file")
def _(night: Night) -> str:
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    os.kill(started.pid, signal.SIGKILL)
    ended = started.wait()
    kept = night.folder / "kept"
    shutil.copytree(night.run, kept)
    for file in night.run.glob("study.db-*"):
        file.unlink()
    file = night.run / "study.db"
    os.truncate(file, night.random.randrange(1, file.stat().st_size))
    refused = night.resume()
    assert refused.returncode == 2, refused
    assert "Traceback" not in refused.stderr, refused.stderr
    for part in kept.glob("study.db*"):
        shutil.copy(part, night.run / part.name)
    return "refused; " + resumed(night, ended, (-signal.SIGKILL,))


def truncated_cache(night: Night, pattern: str) -> str:
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    os.kill(started.pid, signal.SIGKILL)
    ended = started.wait()
    files = list((night.run / "cache").glob(pattern))
    assert files, f"there is nothing to truncate under {pattern}"
    for file in files:
        os.truncate(file, night.random.randrange(file.stat().st_size))
    return resumed(night, ended, (-signal.SIGKILL,))


@injection("truncated items", quick=False)
def _(night: Night) -> str:
    return truncated_cache(night, "items/*.jsonl")


@injection("truncated measurements of the sources", quick=False)
def _(night: Night) -> str:
    night.changes = {"method": "ties", "space": {"weight": [0.0, 1.6], "density": [0.2, 1.0]}}
    return truncated_cache(night, "*.safetensors")


@injection("a source replaced", quick=False)
def _(night: Night) -> str:
    own = night.folder / "family"
    shutil.copytree(night.family, own)
    night.family = own
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    source = own / "add" / "model.safetensors"
    kept = source.with_suffix(".kept")
    if night.random.random() < 0.5:  # renamed into its place, or written over
        shutil.copy(source, kept)
        shutil.copy(own / "rev" / "model.safetensors", source)
    else:
        source.rename(kept)
        shutil.copy(own / "rev" / "model.safetensors", source)
    ended = wait(started)
    assert "changed while the search runs" in ended.stderr or ended.returncode in (-signal.SIGBUS, 0), ended
    refused = night.resume()
    assert refused.returncode == 2, refused
    assert "is another file now" in refused.stderr, refused.stderr
    kept.replace(source)
    return "stopped, refused; " + resumed(night, ended, (2, -signal.SIGBUS, 0))


BREAK = """
import os
import evomerge.search.evaluation.evaluator as s
real = s.Evaluator.materialise
def broken(self, recipe, clock):
    real(self, recipe, clock)
    if os.path.exists(FLAG):
        os.unlink(FLAG)
        next(self.model.parameters()).data.fill_(float("nan"))
s.Evaluator.materialise = broken
"""


@injection("scores that are NaN", alone=False, quick=False)
def _(night: Night) -> str:
    flag = night.folder / "flag"
    night.prelude = BREAK.replace("FLAG", repr(str(flag)))
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    flag.touch()
    what = goes_on(started, "one trial broken, went on")
    assert flag.exists() or "broken" in night.log()
    return what


def with_two(night: Night) -> None:
    night.options = ("--workers", "2")
    night.changes = {"workers": {"stuck": "5s"}, "budget": {"trials": TRIALS}}


@injection("SIGKILL of the driver of two workers", alone=False, quick=False)
def _(night: Night) -> str:
    with_two(night)
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    workers = workers_of(started.pid)
    os.kill(started.pid, signal.SIGKILL)
    ended = started.wait()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left, "workers outlive their driver"
    return resumed(night, ended, (-signal.SIGKILL,))


def to_a_worker(night: Night, disturb: Callable[[psutil.Process], None], what: str) -> str:
    with_two(night)
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    workers = workers_of(started.pid)
    if workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            disturb(night.random.choice(workers))
    return goes_on(started, what)


@injection("SIGKILL of a worker", alone=False, quick=False)
def _(night: Night) -> str:
    return to_a_worker(night, lambda worker: worker.kill(), "its trial was given to another")


@injection("a worker that hangs", alone=False, quick=False)
def _(night: Night) -> str:
    return to_a_worker(night, lambda worker: worker.suspend(), "it was replaced, or not needed any more")


@injection("a slow worker", alone=False, quick=False)
def _(night: Night) -> str:
    def slow(worker: psutil.Process) -> None:
        for _ in range(10):
            suspend([worker], 0.2)
            time.sleep(0.05)

    what = to_a_worker(night, slow, "went on")
    assert "silent" not in night.log()
    return what


@injection("a worker out of memory", alone=False, quick=False)
def _(night: Night) -> str:
    def starve(worker: psutil.Process) -> None:
        size = worker.memory_info().vms
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        time.sleep(1.0)
        resource.prlimit(worker.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return to_a_worker(night, starve, "a trial failed or its worker was replaced, or it had enough")


@injection("the machine of two workers suspended", alone=False, quick=False)
def _(night: Night) -> str:
    with_two(night)
    started = night.start()
    if not night.moment(started):
        return done_before(started)
    suspend([psutil.Process(started.pid), *workers_of(started.pid)], max(night.suspended, 7.0))
    what = goes_on(started, "went on")
    assert "silent" not in night.log(), "a worker was accused of the machine's sleep"
    return what


@injection("the database server gone", quick=False)
def _(night: Night) -> str:
    from postgres import running_server

    with running_server() as server:
        night.changes = {"storage": server.url}
        started = night.start()
        if not night.moment(started):
            what = done_before(started)
        else:
            server.kill()
            time.sleep(night.outage)
            server.start()
            what = goes_on(started, "waited, went on")
        night.trials = finished(night.run)  # the server is gone when they are compared
        return what


def one_night(name: str, seed: int, family: Path, folder: Path, long: bool = False) -> str:
    """Do an injection and check what must hold after it; what happened, in a few words."""
    own = folder / f"{''.join(c for c in name if c.isalnum())}-{seed}"
    own.mkdir()
    night = Night(own, family, random.Random(f"{name} {seed}"))
    if long:
        night.suspended, night.outage = 60.0, 20.0
    what = INJECTIONS[name](night)
    if what.startswith("not tried"):
        return what
    after = night.trials or finished(night.run)
    assert len(after) == TRIALS, f"{len(after)} trials are finished"
    assert (night.run / "verdict.json").exists()
    if name in ALONE:
        wanted = undisturbed(night.family if night.changes else family, night.changes.get("method"), folder)
        assert after == finished(wanted), "trials are not those of the undisturbed run"
        ours, theirs = comparable(night.run), comparable(wanted)
        other = {key: (ours.get(key), theirs[key]) for key in theirs if ours.get(key) != theirs[key]}
        assert not other, f"the verdict is not the undisturbed run's: {other}"
        what += "; the undisturbed run's trials and verdict"
    shutil.rmtree(own)
    return what


def comparable(run: Path) -> dict[str, Any]:
    """The verdict without the recipes' names, which are hashes that contain paths."""
    content = verdict_of(run)
    content["chosen"] = {k: v for k, v in content["chosen"].items() if k != "recipe"}
    return content


@cache
def undisturbed(family: Path, method: str | None, folder: Path) -> Path:
    """The run folder of a search that nobody disturbs."""
    own = folder / f"undisturbed-{method}"
    own.mkdir()
    night = Night(own, family, random.Random(0))
    if method:
        night.changes = {"method": method, "space": {"weight": [0.0, 1.6], "density": [0.2, 1.0]}}
    ended = wait(night.start())
    assert ended.returncode == 0, ended
    return night.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of injections")
    parser.add_argument("--table", type=Path, help="write the outcomes here (Markdown)")
    parser.add_argument("--family", type=Path, default=ROOT / ".cache" / "tiny")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, ROOT / "examples" / "tiny" / "make.py", arguments.family], check=True)
    outcomes: dict[str, collections.Counter[str]] = {n: collections.Counter() for n in arguments.only or INJECTIONS}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            for name, outcome in outcomes.items():
                try:
                    what = one_night(name, seed, arguments.family, Path(folder), long=seed == arguments.seed)
                except AssertionError as error:
                    what = f"WRONG: {str(error).strip().splitlines()[0][:300]}"
                    wrong += 1
                outcome[what] += 1
                print(f"{name} ({seed}): {what}", flush=True)
    rows = [f"| {name} | {n} | {what} |" for name, found in outcomes.items() for what, n in sorted(found.items())]
    table = "\n".join(["| injection | times | outcome |", "|---|---:|---|", *rows])
    print(f"\n{sum(sum(o.values()) for o in outcomes.values())} injections, {wrong} wrong\n\n{table}")
    if arguments.table:
        arguments.table.write_text(table + "\n", encoding="utf-8")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
