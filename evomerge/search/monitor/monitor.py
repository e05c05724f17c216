"""The monitor: collects what a running search reports and shows it to the user.

At most once a second it makes a `Snapshot`, which the terminal draws and which is written into the run folder.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from optuna.trial import FrozenTrial

from evomerge.config.schema import PriceConfig, SearchConfig
from evomerge.search.budget.limits import Limits, SearchProgress, now
from evomerge.search.budget.usage import Elapsed, Stopwatch, Usage, used_by
from evomerge.search.monitor.snapshot import LastFailure, Snapshot, WorkerState, thinned, write_snapshot
from evomerge.search.run import Run
from evomerge.search.storage.study import FINISHED, in_full
from evomerge.search.storage.trial_record import TrialRecord, record_of

SNAPSHOT_SECONDS = 1.0  # between two snapshots
RECENT = 30  # trials from which the rate is computed
FAILURES = 5  # that are shown


class Listener(Protocol):
    """Shows a search to its user, see `SearchView`."""

    def phase(self, text: str) -> None:
        """A new phase of the search begins."""

    def say(self, text: str) -> None:
        """Show one line."""

    def step(self, done: int, total: int) -> None:
        """Batches of one model that are done, and their total."""

    def trial(
        self, number: int, done: int, total: int | None, value: float | None, best: float | None, note: str
    ) -> None:
        """A trial has finished.

        done: how many trials have finished.  total: of the whole search, if limited.  value: None if the trial failed.
        """

    def show(self, snapshot: Snapshot) -> None:
        """The latest state of the search."""


class Monitor:
    """Gets the reports of the driver; passes them on to a listener and to the snapshot in the run folder.

    As a context manager it writes at the end how the run ended.

    limits: of this session.
    listener: shows the search in the terminal.
    """

    def __init__(self, run: Run, config: SearchConfig, limits: Limits, listener: Listener) -> None:
        self.run = run
        self.config = config
        self.limits = limits
        self.listener = listener
        self.stopwatch = Stopwatch()
        self.progress = SearchProgress()
        self.worker_states: Callable[[], Sequence[WorkerState]] = tuple
        self.reserved = 0.0
        self.compute_dtype: str | None = None
        self.used = Usage()
        self.names: dict[int, str] = {}
        self.points: list[tuple[int, float]] = []
        self.partial = self.broken = self.failed = 0
        self.failures: deque[LastFailure] = deque(maxlen=FAILURES)
        self.finished_at: deque[float] = deque(maxlen=RECENT)
        self.name_method(" or ".join(config.candidate_methods))
        self.current_phase = "starting"
        self.batches: tuple[int, int] | None = None
        self.ended: str | None = None
        self.published_at = -math.inf

    def __enter__(self) -> "Monitor":
        self.publish()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = "finished" if error is None else f"stopped: {error or type(error).__name__}".splitlines()[0]
        self.publish()

    def name_method(self, method: str) -> None:
        """Show this method from now on; a search may choose it after its beginning."""
        self.title = f"{method} of {len(self.config.sources)} sources, {self.config.sampler.name}"

    def restore(self, trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]) -> None:
        """Take over the trials of earlier sessions.  attributes: the study's."""
        self.used = used_by(trials, attributes)
        self.stopwatch.add_earlier(Elapsed(self.used.seconds, self.used.device_seconds))
        for trial in trials:
            if trial.state in FINISHED:
                name = trial.user_attrs.get("baseline")
                self.count_trial(trial.number, trial.value if in_full(trial) else None, record_of(trial), name)

    def attach_workers(self, states: Callable[[], Sequence[WorkerState]], devices: int, compute_dtype: str) -> None:
        """Show the workers from now on, and count the time for which they hold their devices.

        states: returns the state of every worker.
        devices: how many devices the workers hold.
        compute_dtype: the type in which they compute forwards.
        """
        self.worker_states = states
        self.compute_dtype = compute_dtype
        self.stopwatch.set_devices(devices)

    def reserve(self, seconds: float) -> None:
        """Show how much of the time is kept for judging the finalists."""
        self.reserved = seconds

    def phase(self, text: str) -> None:
        """A new phase of the search begins."""
        self.current_phase, self.batches = text, None
        self.listener.phase(text)
        self.publish()

    def say(self, text: str) -> None:
        """Show one line and write it into the log."""
        self.run.log(text)
        self.listener.say(text)

    def step(self, done: int, total: int) -> None:
        """Batches of one model that are done, and their total."""
        self.batches = done, total
        self.listener.step(done, total)
        self.refresh()

    def trial(self, number: int, value: float | None, record: TrialRecord, baseline: str | None) -> None:
        """A trial has finished.  value: what the sampler was told; None if the trial failed.  record: as stored."""
        self.count_trial(number, value if record.in_full else None, record, baseline)
        self.add_used(record.used or Usage())
        self.finished_at.append(time.monotonic())
        shown = remark(record) or baseline or ""
        self.listener.trial(number, self.progress.trials, self.limits.trials, value, self.progress.best, shown)
        self.refresh()

    def add_used(self, used: Usage) -> None:
        """Add what some work has used."""
        self.used += used

    def count_trial(self, number: int, value: float | None, record: TrialRecord, baseline: str | None) -> None:
        """Count a finished trial.  value: None unless it was scored on all items."""
        before = self.progress.best
        self.progress.add(number, value, sampled=baseline is None)
        if baseline is not None:
            self.names[number] = baseline
        if self.progress.best != before and self.progress.best is not None:
            self.points.append((self.progress.trials, self.progress.best))
        self.partial += record.partial is not None
        self.broken += record.broken is not None
        self.failed += record.reason is not None
        if record.failure is not None:
            self.failures.append(LastFailure(number, record.failure, record.broken is not None))

    def refresh(self) -> None:
        """Publish a snapshot if the last one is a second old.  The driver calls this several times a second."""
        if time.monotonic() - self.published_at >= SNAPSHOT_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Write a snapshot into the run folder and show it."""
        self.published_at = time.monotonic()
        snapshot = self.snapshot()
        write_snapshot(self.run.folder, snapshot)
        self.listener.show(snapshot)

    def snapshot(self) -> Snapshot:
        """The state of the search at this moment."""
        progress, limits = self.progress, self.limits
        elapsed = self.stopwatch.elapsed
        used = self.used.as_dict() | {
            "seconds": round(elapsed.seconds, 1),
            "device_seconds": round(elapsed.device_seconds, 1),
        }
        return Snapshot(
            name=self.config.name,
            title=self.title,
            compute_dtype=self.compute_dtype,
            phase=self.current_phase,
            step=self.batches,
            ended=self.ended,
            trials=progress.trials,
            limit=limits.trials,
            partial=self.partial,
            broken=self.broken,
            failed=self.failed,
            best=progress.best,
            best_trial=progress.best_number if progress.best is not None else None,
            best_name=self.names.get(progress.best_number),
            points=thinned(self.points),
            since_best=progress.since_best,
            target=limits.target,
            patience=limits.patience,
            per_minute=self.per_minute(),
            left=self.seconds_left(),
            reserved=self.reserved,
            workers=tuple(self.worker_states()),
            failures=tuple(self.failures),
            used=used,
            price=price_of(elapsed.device_seconds, self.config.price),
        )

    def per_minute(self) -> float | None:
        """Trials per minute, over the latest trials of this session; None before there are two."""
        if len(self.finished_at) < 2:
            return None
        return 60 * (len(self.finished_at) - 1) / max(time.monotonic() - self.finished_at[0], 1e-9)

    def seconds_left(self) -> float | None:
        """Seconds until the result, by the limits of trials and of time; None without such a limit."""
        left = self.limits.seconds_left(self.stopwatch.elapsed.seconds, now())
        if self.limits.trials is not None and (rate := self.per_minute()):
            left = min(left, (self.limits.trials - self.progress.trials) * 60 / rate + self.reserved)
        return max(0.0, left) if left < math.inf else None


def remark(record: TrialRecord) -> str:
    """Why a trial was not scored on all items; empty if it was."""
    if record.partial is not None:
        return f"stopped after {record.partial:.0%} of the items"
    if record.broken is not None:
        return f"broken: {record.broken}"
    return record.reason or ""


def price_of(device_seconds: float, price: PriceConfig | None) -> tuple[float, str] | None:
    """The price of device time as (amount, currency); None if the configuration names no price."""
    return None if price is None else (device_seconds / 3600 * price.per_device_hour, price.currency)
