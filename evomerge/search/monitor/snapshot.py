"""The state of a running search at one moment: drawn in this terminal, and written into the run folder for others."""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import EvomergeError
from evomerge.files import JSON_BYTES, new_file, read_text

STATE = "state.json"
SILENT = 30.0  # seconds without a new snapshot after which a search on another host counts as ended
POINTS = 200  # at most, of the curve of the best score

State = Literal["starting", "idle", "busy", "restarting", "dead"]


@dataclass(frozen=True)
class WorkerState:
    """The state of one worker.

    trial: number of the trial that it runs; None if it runs none.
    since_seconds: how long it has been in this state.
    restarts: how often it was started again.
    doing: the name of its job; empty if it has none.
    """

    name: str
    device: str
    state: State
    trial: int | None = None
    since_seconds: float = 0.0
    restarts: int = 0
    doing: str = ""


@dataclass(frozen=True)
class TaskScore:
    """The incumbent's mean score in one task, on the search split.

    by: the name of the objective or the metric.
    parent, parent_name: of the best parent in this task; None if it is not known.
    base: the base's; None if it is not known.
    """

    task: str
    by: str
    value: float
    parent: float | None = None
    parent_name: str | None = None
    base: float | None = None


@dataclass(frozen=True)
class Coefficients:
    """The incumbent's values of one knob of one source, over layers and components.

    knob: as the method names it; `layers` where whole layers are chosen, whose number is then the value.
    source: None for a knob that all sources share.
    """

    knob: str
    source: str | None
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class LastFailure:
    """A trial without a score.  broken: whether its model is the cause; the sampler then learned the worst value."""

    trial: int
    reason: str
    broken: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A search at one moment; plain data.

    title: method, sources and sampler in a few words.
    compute_dtype: the type in which forwards are computed.
    pid, host: of the driver.
    beat: when this snapshot was made, in seconds since the epoch.
    phase: what the search does now.
    parts: how many parts of this phase are done, and their total; None if it has none.
    unit: what these parts are.
    step: batches of one model that are done, and their total; None if no model is being scored batch by batch.
    ended: why the search ended; None while it runs.

    trials: how many have finished.
    limit: how many there will be; None if that is not known.
    partial, broken, failed: how many of the finished ones were stopped early, had a broken model, or failed.
    best, best_trial, best_name: of the trials that were scored on all items; the name is that of a baseline.
    points: (finished trials, best value), one for each time that the best value rose.
    tasks, coefficients: of the best trial, see `incumbent.py`.
    since_best: see `SearchProgress`.
    target, patience: see `Limits`.

    per_minute: latest trials per minute; None before there are enough.
    left: seconds until the result, as estimated; None if that is not known.
    reserved: how many of these seconds are kept for judging the finalists.
    used: see `Usage`.
    price: (amount so far, currency).
    """

    name: str
    title: str = ""
    compute_dtype: str | None = None
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    beat: float = field(default_factory=time.time)
    phase: str = ""
    parts: tuple[int, int] | None = None
    unit: str = ""
    step: tuple[int, int] | None = None
    ended: str | None = None
    trials: int = 0
    limit: int | None = None
    partial: int = 0
    broken: int = 0
    failed: int = 0
    best: float | None = None
    best_trial: int | None = None
    best_name: str | None = None
    points: tuple[tuple[int, float], ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    coefficients: tuple[Coefficients, ...] = ()
    since_best: int = 0
    target: float | None = None
    patience: int | None = None
    per_minute: float | None = None
    left: float | None = None
    reserved: float = 0.0
    workers: tuple[WorkerState, ...] = ()
    failures: tuple[LastFailure, ...] = ()
    used: dict[str, Any] = field(default_factory=dict)
    price: tuple[float, str] | None = None


def write_snapshot(folder: Path, snapshot: Snapshot) -> bool:
    """Replace the snapshot in the run folder in one step; return whether that was possible.

    An error, such as a full disk, must not end the search.  The file is not synced: the study has all that counts.
    """
    aside = folder / f"{STATE}.part"
    try:
        with new_file(aside) as file:
            file.write(json.dumps(asdict(snapshot)).encode())
        aside.replace(folder / STATE)
    except OSError:
        return False
    return True


def read_snapshot(folder: Path) -> Snapshot | None:
    """Read what `write_snapshot` wrote last; None if there is no file or it cannot be read."""
    try:
        content = json.loads(read_text(folder / STATE, JSON_BYTES))
        known = {f.name for f in fields(Snapshot)}
        found = {k: v for k, v in content.items() if k in known}
        found["workers"] = tuple(WorkerState(**w) for w in found["workers"])
        found["failures"] = tuple(LastFailure(**f) for f in found["failures"])
        found["tasks"] = tuple(TaskScore(**t) for t in found.get("tasks", ()))
        found["coefficients"] = tuple(Coefficients(**c) for c in found.get("coefficients", ()))
        found["points"] = tuple((int(x), float(y)) for x, y in found["points"])
        snapshot = Snapshot(**found)
        float(snapshot.beat), int(snapshot.pid)
    except (EvomergeError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return snapshot


def thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Choose at most `POINTS` points evenly, the first and the last among them."""
    if len(points) <= POINTS:
        return tuple(points)
    return tuple(points[round(k * (len(points) - 1) / (POINTS - 1))] for k in range(POINTS))


def why_ended(snapshot: Snapshot, now: float) -> str | None:
    """Why there will be no newer snapshot; None while the driver runs.

    A driver on this host runs if its process exists.  A driver on another host counts as ended if its snapshot is old.

    now: seconds since the epoch.
    """
    if snapshot.ended is not None:
        return snapshot.ended
    age = now - snapshot.beat
    if snapshot.host == socket.gethostname():
        if not process_exists(snapshot.pid):
            return f"not running: its process {snapshot.pid} is gone"
        return None
    if age > SILENT:
        return f"not running: no news from {snapshot.host} for {age:.0f} s"
    return None


def process_exists(pid: int) -> bool:
    """Whether a process of this host has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
