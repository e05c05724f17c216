"""A search that is disturbed: started, waited for, resumed and compared; and the table of all kinds of disturbance."""

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from searches import ROOT, Done, Started, start_cli, write_config

TRIALS = 16
PATIENCE = 300.0  # seconds that a search may take before it counts as hanging
REFUSED = 2  # exit code of one message about what is wrong


@dataclass
class Disturbed:
    """One search and what is done to it.

    folder: all that belongs to it.
    family: the tiny models.
    changes: to the configuration.
    options: of the command line.
    prelude: Python that the process runs first.
    suspended, outage: seconds for which the machine sleeps and the database server is gone.
    trials: the finished ones, if they cannot be read any more when all is over.
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

    @property
    def command(self) -> tuple[str | Path, ...]:
        """The arguments that begin the search."""
        config = write_config(self.folder, self.family, **self.changes)
        return ("search", config, "--run", self.run, *self.options)

    def start(self, terminal: int | None = None) -> Started:
        return start_cli(*self.command, prelude=self.prelude, terminal=terminal)

    def resume(self) -> Done:
        """Go on; begin again if the search was ended before its run folder was complete."""
        if not (self.run / "config.yaml").exists():
            return wait(self.start(), "the search that begins again")
        return wait(start_cli("resume", self.run, *self.options, prelude=self.prelude), "the resumed search")

    def moment(self, started: Started, in_trials: bool = False) -> bool:
        """Wait for a random moment from the start to the verdict; whether the search is still going on then.

        in_trials: never before the first trial or after the last one; else one in eight each.
        """
        part = 1.0 if in_trials else self.random.random()
        number = self.random.randrange(1, TRIALS)
        if part < 1 / 8:
            return self.wait_for_log(started, "", self.random.uniform(0, 1.5))
        if part < 2 / 8:
            return self.wait_for_log(started, "no more trials", self.random.uniform(0, 3.0))
        return self.wait_for_log(started, f"trial {number} begins", self.random.uniform(0, 0.25))

    def wait_for_log(self, started: Started, text: str, then: float) -> bool:
        """Wait for a text in the log and `then` seconds more; whether the search is still going on."""
        end = time.monotonic() + PATIENCE
        while text not in self.log():
            if not alive(started.pid):
                return False
            if time.monotonic() > end:
                kill_all(started.pid)
                raise AssertionError(f"the search hangs before {text!r}:\n{self.log()[-2000:]}")
            time.sleep(0.002)
        time.sleep(then)
        return alive(started.pid)

    def log(self) -> str:
        file = self.run / "log.txt"
        with contextlib.suppress(OSError):
            return file.read_text(encoding="utf-8")
        return ""


def start_in_new_process(*arguments: str | Path, environment: dict[str, str]) -> Started:
    """`start_cli` with environment variables that count from the start of a program, such as LD_PRELOAD."""
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (`wait` closes them)
    code = "import torch; torch.set_num_threads(1); from evomerge.cli import main; main()"
    actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, err.fileno(), 2)]
    no_check = ["--no-check"] * (arguments[0] == "search")
    command = [sys.executable, "-c", code, *map(str, arguments), *no_check]
    variables = dict(os.environ) | {"PYTHONPATH": str(ROOT)} | environment
    return Started(os.posix_spawn(sys.executable, command, variables, file_actions=actions), out, err)


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def kill(started: Started) -> Done:
    """End a process with SIGKILL, if it has not ended yet."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(started.pid, signal.SIGKILL)
    return started.wait()


def kill_all(pid: int) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def wait(started: Started, what: str = "the search", patience: float = PATIENCE) -> Done:
    """The end of a process; an error if it does not come."""
    end = time.monotonic() + patience
    while alive(started.pid):
        if time.monotonic() > end:
            kill_all(started.pid)
            raise AssertionError(f"{what} hangs: {started.wait()}")
        time.sleep(0.01)
    return started.wait()


def study_of(run: Path) -> Any:
    """The study of a run; None if it has none yet."""
    from evomerge.errors import EvomergeError
    from evomerge.search.run import open_run

    opened = run / "config.yaml"
    if not opened.exists():
        return None
    if open_run(run).config().storage is None and not (run / "study.db").exists():
        return None
    try:
        return open_run(run).study()
    except EvomergeError as error:
        if "holds no study" not in str(error) or open_run(run).has_begun():
            raise
        return None  # the file is made first, then the study in it


def finished(run: Path) -> dict[int, Any]:
    """Number -> parameters, value and item scores of every finished trial; an error if numbers are not 0, 1, 2, ..."""
    from evomerge.search.storage.trial_record import record_of

    if (study := study_of(run)) is None:
        return {}
    trials = study.get_trials(deepcopy=False)
    assert [t.number for t in trials] == list(range(len(trials))), "trial numbers have gaps or repeat"
    return {t.number: (t.state.name, t.params, t.value, record_of(t).scores) for t in trials if t.state.is_finished()}


def gradient_steps(run: Path) -> list[Any]:
    """Point and gradient of every step of the learned start in a study."""
    from evomerge.search.storage.step_record import step_records

    if (study := study_of(run)) is None:
        return []
    attributes = study.user_attrs
    return [(climb, s.point, s.gradient, s.value) for climb in range(9) for s in step_records(attributes, climb)]


Injection = Callable[[Disturbed], str]
"""Disturbs a search, sees it to its end, and says in a few words what happened."""

INJECTIONS: dict[str, Injection] = {}
ALONE: set[str] = set()  # one worker, and nothing that a trial's result may depend on: equal to the undisturbed run
QUICK: set[str] = set()  # of the short form


def injection(name: str, alone: bool = True, quick: bool = False) -> Callable[[Injection], Injection]:
    def add(function: Injection) -> Injection:
        INJECTIONS[name] = function
        ALONE.update([name] if alone else [])
        QUICK.update([name] if quick else [])
        return function

    return add


def resumed(search: Disturbed, ended: Done, codes: tuple[int, ...]) -> str:
    """Go on after an end with one of these exit codes; nothing finished before is lost."""
    plain(ended, *codes)
    before, steps = finished(search.run), gradient_steps(search.run)
    again = search.resume()
    assert again.returncode == 0, again
    after = finished(search.run)
    assert {n: after.get(n) for n in before} == before, "a finished trial changed"
    assert not steps or all(step in gradient_steps(search.run) for step in steps), "a gradient step changed"
    return f"ended with {ended.returncode}, resumed"


def plain(ended: Done, *codes: int) -> Done:
    """A process that ended with one of these exit codes, and said no more than a user needs."""
    assert ended.returncode in codes, ended
    assert "Traceback" not in ended.stderr or ended.returncode < 0, ended.stderr
    return ended


def done_before(started: Started) -> str:
    ended = wait(started)
    assert ended.returncode == 0, ended
    return "was done before"


def goes_on(started: Started, what: str) -> str:
    ended = wait(started)
    assert ended.returncode == 0, ended
    return what


def killed_and_resumed(search: Disturbed) -> str:
    """Kill the driver at a random moment, then resume."""
    started = search.start()
    if not search.moment(started):
        return done_before(started)
    return resumed(search, kill(started), (-signal.SIGKILL, 0))
