"""The monitor of a running search: what has happened so far, kept small, shown and written at most once a second."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from optuna.trial import FrozenTrial

from evomerge.config.schema import PriceConfig, SearchConfig
from evomerge.search.budget.limits import Limits, Progress, now
from evomerge.search.budget.usage import Elapsed, Stopwatch, Usage, used_by
from evomerge.search.monitor.snapshot import LastFailure, Snapshot, WorkerState, thinned, write_snapshot
from evomerge.search.run import Run
from evomerge.search.storage.study import FINISHED, in_full
from evomerge.search.storage.trial_record import TrialRecord, record_of

EVERY = 1.0  # seconds between two snapshots
RECENT = 30  # trials that the rate is about
FAILURES = 5  # that are shown


class Listener(Protocol):
    """Who shows the run to a person."""

    def phase(self, text: str) -> None: ...
    def say(self, text: str) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def trial(self, number: int, total: int | None, value: float | None, best: float | None, note: str) -> None: ...
    def show(self, snapshot: Snapshot) -> None: ...


class Monitor:
    """Told by the driver what happens; tells the listener, and whoever reads the run folder.

    workers: the driver sets it to a function that gives every worker's state.  reserved: seconds kept for the verdict.
    Used as a context, it writes at the end how the run ended.
    """

    def __init__(self, run: Run, config: SearchConfig, limits: Limits, listener: Listener) -> None:
        self.run = run
        self.config = config
        self.limits = limits
        self.listener = listener
        self.stopwatch = Stopwatch()
        self.progress = Progress()
        self.workers: Callable[[], Sequence[WorkerState]] = tuple
        self.reserved = 0.0
        self.compute_dtype: str | None = None
        self.used = Usage()
        self.names: dict[int, str] = {}
        self.points: list[tuple[int, float]] = []
        self.partial = self.broken = self.failed = 0
        self.failures: deque[LastFailure] = deque(maxlen=FAILURES)
        self.finished_at: deque[float] = deque(maxlen=RECENT)
        self.title = f"{config.method} of {len(config.sources)} sources, {config.sampler.name}"
        self.now_doing = "starting"
        self.batches: tuple[int, int] | None = None
        self.ended: str | None = None
        self.published = -math.inf

    def __enter__(self) -> "Monitor":
        self.publish()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = "finished" if error is None else f"stopped: {error or type(error).__name__}".splitlines()[0]
        self.publish()

    def restore(self, trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]) -> None:
        """Take over what the study knows when it is opened.  attributes: the study's."""
        self.used = used_by(trials, attributes)
        self.stopwatch.go_on(Elapsed(self.used.seconds, self.used.device_seconds))
        for trial in trials:
            if trial.state in FINISHED:
                name = trial.user_attrs.get("baseline")
                self.note(trial.number, trial.value if in_full(trial) else None, record_of(trial), name)

    def phase(self, text: str) -> None:
        """What the driver begins to do."""
        self.now_doing, self.batches = text, None
        self.listener.phase(text)
        self.publish()

    def say(self, text: str) -> None:
        """A line for the person and for the log."""
        self.run.log(text)
        self.listener.say(text)

    def step(self, done: int, total: int) -> None:
        """Batches of the phase in hand."""
        self.batches = done, total
        self.listener.step(done, total)
        self.beat()

    def trial(self, number: int, value: float | None, record: TrialRecord, baseline: str | None) -> None:
        """A finished trial with its stored record.  value: what the sampler was told, None if it failed."""
        self.note(number, value if record.in_full else None, record, baseline)
        self.spend(record.used or Usage())
        self.finished_at.append(time.monotonic())
        self.listener.trial(number, self.limits.trials, value, self.progress.best, told(record) or baseline or "")
        self.beat()

    def spend(self, used: Usage) -> None:
        """Count work that has just been stored."""
        self.used += used

    def note(self, number: int, value: float | None, record: TrialRecord, baseline: str | None) -> None:
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

    def beat(self) -> None:
        """Publish, unless that was just done.  The driver calls it every second or more often, come what may."""
        if time.monotonic() - self.published >= EVERY:
            self.publish()

    def publish(self) -> None:
        self.published = time.monotonic()
        snapshot = self.snapshot()
        write_snapshot(self.run.folder, snapshot)
        self.listener.show(snapshot)

    def snapshot(self) -> Snapshot:
        progress, limits = self.progress, self.limits
        rate, left = self.per_minute(), self.left()
        elapsed = self.stopwatch.elapsed
        used = self.used.as_dict() | {
            "seconds": round(elapsed.seconds, 1),
            "device_seconds": round(elapsed.device_seconds, 1),
        }
        return Snapshot(
            name=self.config.name,
            title=self.title,
            compute_dtype=self.compute_dtype,
            phase=self.now_doing,
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
            per_minute=rate,
            left=left,
            reserved=self.reserved,
            workers=tuple(self.workers()),
            failures=tuple(self.failures),
            used=used,
            price=price_of(elapsed.device_seconds, self.config.price),
        )

    def per_minute(self) -> float | None:
        """Trials a minute, over the latest of this session."""
        if len(self.finished_at) < 2:
            return None
        return 60 * (len(self.finished_at) - 1) / max(time.monotonic() - self.finished_at[0], 1e-9)

    def left(self) -> float | None:
        """Seconds until the limits of trials and of time; the result comes by then."""
        left = self.limits.left(self.stopwatch.elapsed.seconds, now())
        if self.limits.trials is not None and (rate := self.per_minute()):
            left = min(left, (self.limits.trials - self.progress.trials) * 60 / rate + self.reserved)
        return max(0.0, left) if left < math.inf else None


def told(record: TrialRecord) -> str:
    """What a person should know of a trial beside its value."""
    if record.partial is not None:
        return f"stopped after {record.partial:.0%} of the items"
    if record.broken is not None:
        return f"broken: {record.broken}"
    return record.reason or ""


def price_of(device_seconds: float, price: PriceConfig | None) -> tuple[float, str] | None:
    """What holding devices costs, and in what; None if the configuration names no price."""
    return None if price is None else (device_seconds / 3600 * price.per_device_hour, price.currency)
