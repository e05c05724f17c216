"""`log_to`: trials as runs of trackio, MLflow or Weights & Biases.

Every program gets a thread of its own, so a slow one keeps no trial waiting.  Whatever goes wrong there is one line in
the log of the search; then nothing more is sent to that program.

What the external run is called is kept in the run folder (log_to.json), so that a resume continues it.
"""

import contextlib
import importlib.util
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from evomerge.config.database_url import masked
from evomerge.config.running import Tracker
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.files.read import read_json
from evomerge.files.write import write_text
from evomerge.search.monitor.snapshot import Coefficients
from evomerge.search.run import Run

PACKAGES: dict[Tracker, tuple[str, str]] = {
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb", "wandb"),
}
"""Name -> the module, and the package to install."""

WAITING = 10_000  # entries that a program may be behind
CLOSING = 30.0  # seconds that it has at the end to take what is left


@dataclass(frozen=True)
class ExternalRun:
    """What the external run is.

    project: the name of the search.
    name: of the run; another search of the same name has another one.
    key: the program's own id, if it gave one before.
    settings: of the search, to be shown.
    """

    project: str
    name: str
    key: str | None
    settings: dict[str, Any]


class Backend(Protocol):
    """One program.  All methods are called in one thread; they may raise anything."""

    def open(self, run: ExternalRun) -> str | None:
        """Begin or continue a run; returns its id where the program has one."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step."""

    def close(self, ended: bool) -> None:
        """The session is over.  ended: whether the search has ended."""


class Trackio:
    """trackio: `trackio.init`, `trackio.log`; a run is continued by its name."""

    def open(self, run: ExternalRun) -> str | None:
        import trackio

        self.trackio: Any = trackio
        off = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        trackio.init(project=run.project, name=run.name, config=run.settings, resume="allow", **off)
        return None

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self, ended: bool) -> None:
        self.trackio.finish()


class Mlflow:
    """MLflow: a client of the server or the store that MLFLOW_TRACKING_URI names."""

    def open(self, run: ExternalRun) -> str | None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient()
        if run.key is not None:
            with contextlib.suppress(Exception):  # the store may be another one now
                self.client.update_run(run.key, status="RUNNING")
                self.key = run.key
                return self.key
        found = self.client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self.client.create_experiment(run.project)
        self.key = str(self.client.create_run(experiment, run_name=run.name).info.run_id)
        params = [Param(key, str(value)[:500]) for key, value in run.settings.items()]
        self.client.log_batch(self.key, params=params)
        return self.key

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-. /:]", "_", key), value, now, step) for key, value in values.items()]
        self.client.log_batch(self.key, metrics=metrics)

    def close(self, ended: bool) -> None:
        self.client.set_terminated(self.key, "FINISHED" if ended else "KILLED")


class Wandb:
    """Weights & Biases.  Without a key it would ask for one, so then it is off unless WANDB_MODE is `offline`."""

    def open(self, run: ExternalRun) -> str | None:
        import wandb

        if os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun") and not wandb.api.api_key:
            raise EvomergeError("no API key; run `wandb login`, or set WANDB_MODE=offline")
        key = run.key or uuid.uuid4().hex
        quiet = wandb.Settings(silent=True, console="off")
        self.run: Any = wandb.init(
            project=run.project, name=run.name, id=key, resume="allow", config=run.settings, settings=quiet
        )
        self.run.define_metric("*", step_metric="trials")
        self.run.define_metric("gradient/*", step_metric="gradient/step")
        return key

    def log(self, values: Mapping[str, float], step: int) -> None:
        axis = "gradient/step" if any(key.startswith("gradient/") for key in values) else "trials"
        self.run.log({**values, axis: step})  # its own steps must only rise, and workers finish in any order

    def close(self, ended: bool) -> None:
        self.run.finish(exit_code=0 if ended else 1)


BACKENDS: dict[Tracker, Callable[[], Backend]] = {"trackio": Trackio, "mlflow": Mlflow, "wandb": Wandb}


class Thread:
    """One program in a thread of its own.

    say: gets a line if something goes wrong.
    keep: gets the program's id of the run.
    """

    def __init__(
        self, name: Tracker, run: ExternalRun, say: Callable[[str], None], keep: Callable[[str], None]
    ) -> None:
        self.name = name
        self.run = run
        self.say = say
        self.keep = keep
        self.backend = BACKENDS[name]()
        self.entries: queue.Queue[tuple[dict[str, float], int] | bool] = queue.Queue(WAITING)
        self.off = False
        self.thread = threading.Thread(target=self.work, name=f"log_to {name}", daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Send what comes until there is no more, or until something goes wrong."""
        try:
            if (key := self.backend.open(self.run)) is not None:
                self.keep(key)
            while not isinstance(entry := self.entries.get(), bool):
                self.backend.log(*entry)
            self.backend.close(entry)
        except BaseException as error:  # also SystemExit: nothing that a library does may end a search
            text = masked((str(error).strip().splitlines() or [""])[0])  # it may quote an address
            self.stop(f"{type(error).__name__}: {text[:200]}")

    def stop(self, why: str) -> None:
        """Send nothing more.  why: for the log."""
        if not self.off:
            self.off = True
            self.say(f"log_to {self.name} is off: {why}")

    def put(self, values: dict[str, float], step: int) -> None:
        """Send values, some time."""
        if self.off:
            return
        try:
            self.entries.put_nowait((values, step))
        except queue.Full:
            self.stop(f"it is {WAITING} entries behind")

    def close(self, ended: bool) -> None:
        """Wait a while until everything is sent."""
        if self.off:
            return
        with contextlib.suppress(queue.Full):
            self.entries.put(ended, timeout=1.0)
        self.thread.join(CLOSING)
        if self.thread.is_alive():
            self.stop(f"it did not take everything within {CLOSING:.0f} s of the end")


class Trackers:
    """The programs that a search logs to; does nothing if there are none."""

    def __init__(self, run: Run, config: SearchConfig) -> None:
        self.threads: list[Thread] = []
        if not config.log_to:
            return
        log, file = quiet(run.log), run.folder / "log_to.json"
        known: dict[str, str] = {}
        with contextlib.suppress(EvomergeError):
            known = {str(k): str(v) for k, v in read_json(file).items()}
        known.setdefault("name", f"{run.folder.resolve().name}-{uuid.uuid4().hex[:6]}")
        lock = threading.Lock()

        def keep(name: str, key: str) -> None:
            with lock:
                known[name] = key
                write_text(file, json.dumps(known) + "\n")

        with contextlib.suppress(EvomergeError):
            keep("name", known["name"])
        settings = {
            "method": config.method,
            "sources": ", ".join(s.name for s in config.sources),
            "tasks": ", ".join(str(t.task) for t in config.tasks),
            "sampler": config.sampler.name,
            "seed": config.seed,
            "run": str(run.folder.resolve()),
        }
        for name in dict.fromkeys(config.log_to):
            if missing(name):
                log(f"log_to {name} is off: {missing(name)}")
                continue
            external = ExternalRun(config.name, known["name"], known.get(name), settings)
            self.threads.append(Thread(name, external, log, partial(keep, name)))

    def __bool__(self) -> bool:
        return bool(self.threads)

    def put(self, values: Mapping[str, float | None], step: int) -> None:
        """Send the values that there are."""
        there = {key: float(value) for key, value in values.items() if value is not None}
        for thread in self.threads:
            thread.put(there, step)

    def trial(
        self,
        finished: int,
        number: int,
        value: float | None,
        best: float | None,
        evaluated: float,
        seconds: float | None,
        scores: Mapping[tuple[str, str], float],
        coefficients: Sequence[Coefficients],
    ) -> None:
        """A trial has finished.

        finished: how many trials have.
        value: its value; an estimate if not all items were scored; None if it failed.
        best: the best value so far.
        evaluated: the share of the items that were scored.
        scores: (task, metric) -> the mean, of a trial that was scored on all items.
        coefficients: their means are logged.
        """
        self.put(
            {"trial": number, "value" if evaluated == 1.0 else "estimate": value, "best": best}
            | {"evaluated": evaluated, "seconds": seconds}
            | {f"task/{task}/{metric}": mean for (task, metric), mean in scores.items()}
            | {"/".join(filter(None, ("coefficient", c.knob, c.source))): c.mean for c in coefficients},
            finished,
        )

    def gradient_step(self, number: int, value: float) -> None:
        """A gradient step is done.  number: over all climbs, from 0.  value: of its mini-batch."""
        self.put({"gradient/value": value}, number)

    def close(self, ended: bool) -> None:
        """Send what is left."""
        for thread in self.threads:
            thread.close(ended)


def quiet(log: Callable[[str], None]) -> Callable[[str], None]:
    """A log that a full disk does not break."""

    def line(text: str) -> None:
        with contextlib.suppress(EvomergeError):
            log(text)

    return line


def missing(name: Tracker) -> str | None:
    """How to install a program; None if it is there."""
    module, package = PACKAGES[name]
    try:
        there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    return None if there else f"it is not installed; pip install {package}"


def refuse_missing(config: SearchConfig) -> None:
    """Before a search begins: EvomergeError if a program that it is to log to is not installed."""
    for name in config.log_to:
        if how := missing(name):
            raise EvomergeError(f"log_to: {name}: {how}, or leave it out of `log_to`")
