"""A small real search over the tiny family, as configuration and as a process."""

import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SKILLS = ("rev", "sort", "count", "add")

COMMANDS_NEED = (
    "alembic.command",
    "cmaes",
    "evomerge.api.merge",
    "evomerge.api.search",
    "evomerge.report.page",
    "evomerge.report.live_view",
    "evomerge.search.session",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "scipy.io.matlab",
    "sqlalchemy.dialects.sqlite",
    "transformers.models.llama.modeling_llama",
)

# Preludes of `run_cli` that kill the process; no handler can catch it.
KILL = "import os, signal\ndef die():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
BETWEEN_RESULT_AND_END = (
    KILL
    + """
import evomerge.search.storage.sql_statements as t
calls, real = [0], t.finish_trial
def counted(*a):
    calls[0] += 1
    real(*a)
    if calls[0] == 11:
        die()  # before the commit
t.finish_trial = counted
"""
)


def write_config(folder: Path, family: Path, **changes: Any) -> Path:
    """A search that takes seconds: two sources, two tasks, few items; `changes` replace whole keys."""
    content: dict[str, Any] = {
        "name": "small",
        "base": str(family / "base"),
        "sources": [{"name": s, "path": str(family / s)} for s in ("rev", "add")],
        "method": "task_arithmetic",
        "space": {"weight": [0.0, 1.6], "granularity": "depth", "knots": 2},
        "tasks": [
            {"task": str(ROOT / "evals" / "tiny" / f"{s}.yaml"), "objective": "gold_logprob"} for s in ("rev", "add")
        ],
        "splits": {"search": 12, "selection": 10, "holdout": 40},
        "sampler": {"name": "cma-es", "population": 4},
        "budget": {"trials": 16},
        "seed": 3,
        "dtype": "float32",
    } | changes
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Done:
    """How a process ended, as `subprocess` tells it: a negative return code is the signal that killed it."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Started:
    """A process that runs beside this one."""

    pid: int
    out: IO[str]
    err: IO[str]

    def wait(self) -> Done:
        _, status = os.waitpid(self.pid, 0)
        with self.out, self.err:
            self.out.seek(0)
            self.err.seek(0)
            return Done(os.waitstatus_to_exitcode(status), self.out.read(), self.err.read())


def run_cli(*arguments: str | Path, prelude: str = "") -> Done:
    """The command line in a real process of its own, forked from this one so that libraries need no second import.

    prelude: Python that the child runs first (to be killed at a moment of its work).
    """
    return start_cli(*arguments, prelude=prelude).wait()


@functools.cache
def import_what_commands_need() -> None:
    """Import what commands import when they need it.  Every child of this process has it then; it takes seconds."""
    for name in COMMANDS_NEED:
        importlib.import_module(name)


def start_cli(*arguments: str | Path, prelude: str = "", terminal: int | None = None) -> Started:
    """`run_cli` without waiting.  terminal: the file descriptor that the child's output goes to instead of a file."""
    import torch

    from evomerge.cli import main

    import_what_commands_need()
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (`wait` closes them)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            os.dup2(out.fileno() if terminal is None else terminal, 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False, buffering=1) for n in (1, 2))
            torch.set_num_threads(1)
            os.chdir(ROOT)
            quick = arguments[0] == "search" and not {"--check", "--dry-run"} & set(arguments)
            sys.argv = ["evomerge", *map(str, arguments), *["--no-check"] * quick]
            exec(prelude, {})
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):  # a test may have closed it
                    stream.flush()
            os._exit(code)
    return Started(child, out, err)


def finished_search(config: Path, prelude: str = "") -> Path:
    """The run folder, beside its configuration, of a search that went to its end.  prelude: see `run_cli`."""
    run = config.parent / "run"
    done = run_cli("search", config, "--run", run, prelude=prelude)
    assert done.returncode == 0, done.stderr
    return run


def trials_of(run: Path) -> list[tuple[int, str, dict[str, Any], float | None]]:
    """(number, state, parameters, value) of every trial of a run, by number."""
    import optuna

    from evomerge.search.run import open_run

    study = open_run(run).study()
    assert isinstance(study, optuna.Study)
    return [(t.number, t.state.name, dict(t.params), t.value) for t in study.get_trials(deepcopy=False)]


def verdict_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "verdict.json").read_text(encoding="utf-8"))
    return content
