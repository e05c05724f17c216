"""The state of a running search at one moment: drawn in this terminal, and written into the run folder for others.

Whatever lies in the file is read as the types below say, or counts as no file: the folder may be a stranger's.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from evomerge.errors import EvomergeError
from evomerge.files.read import read_json, validated
from evomerge.files.write import new_file
from evomerge.system import process_exists

STATE = "state.json"
SILENT = 30.0  # seconds without a new snapshot after which a search on another host counts as ended
DRIVER = {"pid", "host", "beat"}  # what another process must not put in its own place
POINTS = 200  # at most, of the curve of the best score

State = Literal["starting", "idle", "busy", "restarting", "dead"]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]  # so that sums of them are finite
Line = Annotated[str, AfterValidator(lambda text: text[:2000])]


@dataclass(frozen=True)
class WorkerState:
    """The state of one worker.

    trial: number of the trial that it runs; None if it runs none.
    since_seconds: how long it has been in this state.
    restarts: how often it was started again.
    doing: the name of its job; empty if it has none.
    """

    name: Line
    device: Line
    state: State
    trial: Count | None = None
    since_seconds: Number = 0.0
    restarts: Count = 0
    doing: Line = ""


@dataclass(frozen=True)
class TaskScore:
    """The incumbent's mean score in one task, on the search split.

    by: the name of the objective or the metric.
    parent, parent_name: of the best parent in this task; None if it is not known.
    base: the base's; None if it is not known.
    """

    task: Line
    by: Line
    value: float
    parent: float | None = None
    parent_name: Line | None = None
    base: float | None = None


@dataclass(frozen=True)
class Coefficients:
    """The incumbent's values of one knob of one source, over layers and components.

    knob: as the method names it; `layers` where whole layers are chosen, whose number is then the value.
    source: None for a knob that all sources share.
    """

    knob: Line
    source: Line | None
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class LastFailure:
    """A trial without a score.  broken: whether its model is the cause; the sampler then learned the worst value."""

    trial: Count
    reason: Line
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

    name: Line
    title: Line = ""
    compute_dtype: Line | None = None
    pid: Annotated[int, Field(ge=1, le=1 << 31)] = field(default_factory=os.getpid)
    host: Line = field(default_factory=socket.gethostname)
    beat: Number = field(default_factory=time.time)
    phase: Line = ""
    parts: tuple[Count, Count] | None = None
    unit: Line = ""
    step: tuple[Count, Count] | None = None
    ended: Line | None = None
    trials: Count = 0
    limit: Count | None = None
    partial: Count = 0
    broken: Count = 0
    failed: Count = 0
    best: float | None = None
    best_trial: Count | None = None
    best_name: Line | None = None
    points: Annotated[tuple[tuple[Count, float], ...], Field(max_length=10_000)] = ()
    tasks: Annotated[tuple[TaskScore, ...], Field(max_length=10_000)] = ()
    coefficients: Annotated[tuple[Coefficients, ...], Field(max_length=10_000)] = ()
    since_best: Count = 0
    target: float | None = None
    patience: Count | None = None
    per_minute: Number | None = None
    left: Number | None = None
    reserved: Number = 0.0
    workers: Annotated[tuple[WorkerState, ...], Field(max_length=10_000)] = ()
    failures: Annotated[tuple[LastFailure, ...], Field(max_length=10_000)] = ()
    used: dict[str, Number] = field(default_factory=dict)
    price: tuple[Number, Line] | None = None


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
    """Read what `write_snapshot` wrote last; None if there is no file, or it is none that a driver writes."""
    path = folder / STATE
    try:
        content = read_json(path)
        snapshot = validated(content, Snapshot, str(path))
    except EvomergeError:
        return None
    return snapshot if content.keys() >= DRIVER else None


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
