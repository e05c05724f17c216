"""What a running search says of itself to a person, in this terminal or in another: one small file in its folder."""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

STATE = "state.json"
SILENT = 30.0  # seconds without a beat that need an explanation
POINTS = 200  # of the best score over trials, at most

State = Literal["starting", "idle", "busy", "restarting", "dead"]


@dataclass(frozen=True)
class WorkerState:
    """One worker.  trial: in hand, None if it does something else.  since_seconds: in this state.

    restarts: how often it was started anew.
    """

    name: str
    device: str
    state: State
    trial: int | None = None
    since_seconds: float = 0.0
    restarts: int = 0


@dataclass(frozen=True)
class LastFailure:
    """A trial that gave no score.  broken: its model was, and the sampler knows."""

    trial: int
    reason: str
    broken: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A search at one moment; plain data.

    title: method, sources and sampler in a few words.  compute_dtype: what forwards are computed in.  pid, host: of the
    driver.  beat: seconds since the epoch.  phase: what it is doing.  step: batches done in it and their total.
    ended: why it stopped, None while it runs.

    trials: finished ones.  limit: how many there will be, None if that is not known.  partial, broken, failed: of
    them.  best, best_trial, best_name: evaluated in full; the name is a baseline's.  points: (trials finished, best
    score) where it rose.  since_best: see `Progress`.  target, patience: see `Limits`.

    per_minute: trials, lately.  left: seconds until the result by its limits, None if it cannot be told.  reserved: of
    these, kept for the verdict.  used: see `Usage`.  price: (amount so far, currency).
    """

    name: str
    title: str = ""
    compute_dtype: str | None = None
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    beat: float = field(default_factory=time.time)
    phase: str = ""
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
    """Replace the file in one step; whether that was possible.  A full disk must not end a search for a picture of it.

    It is not synced: after a power cut the study is what counts.
    """
    aside = folder / f"{STATE}.part"
    try:
        aside.write_text(json.dumps(asdict(snapshot)), encoding="utf-8")
        aside.replace(folder / STATE)
    except OSError:
        return False
    return True


def read_snapshot(folder: Path) -> Snapshot | None:
    """What `write_snapshot` wrote last; None if there is nothing that can be read."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        known = {f.name for f in fields(Snapshot)}
        found = {k: v for k, v in content.items() if k in known}
        found["workers"] = tuple(WorkerState(**w) for w in found["workers"])
        found["failures"] = tuple(LastFailure(**f) for f in found["failures"])
        found["points"] = tuple((int(x), float(y)) for x, y in found["points"])
        snapshot = Snapshot(**found)
        float(snapshot.beat), int(snapshot.pid)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return snapshot


def thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most `POINTS` of the points, the first and the last among them."""
    if len(points) <= POINTS:
        return tuple(points)
    return tuple(points[round(k * (len(points) - 1) / (POINTS - 1))] for k in range(POINTS))


def silence(snapshot: Snapshot, now: float) -> str | None:
    """Why nobody should wait for the next snapshot, None while the driver gives signs of life.

    now: seconds since the epoch.  A driver on this host is there if its process is; of another host's only the beat is
    known.
    """
    if snapshot.ended is not None:
        return snapshot.ended
    age = now - snapshot.beat
    if snapshot.host == socket.gethostname():
        if not process_exists(snapshot.pid):
            return f"not running: its process {snapshot.pid} is gone"
        return None
    if age > SILENT:
        return f"not running: no sign of life from {snapshot.host} for {age:.0f} s"
    return None


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
