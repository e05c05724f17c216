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

from evomerge.config.running import PriceConfig
from evomerge.config.schema import SearchConfig
from evomerge.search.budget.limits import Limits, SearchProgress, now
from evomerge.search.budget.usage import Elapsed, Stopwatch, Usage, used_by
from evomerge.search.monitor.snapshot import (
    Coefficients,
    LastFailure,
    Snapshot,
    TaskScore,
    WorkerState,
    thinned,
    write_snapshot,
)
from evomerge.search.monitor.trackers import Trackers
from evomerge.search.run import Run
from evomerge.search.storage.study import FINISHED, in_full
from evomerge.search.storage.trial_record import TrialRecord, record_of

SNAPSHOT_SECONDS = 1.0  # between two snapshots
RECENT = 30  # trials from which the rate is computed, at most
FEWEST = 3  # at least; the time of one or two says little
FAILURES = 5  # that are shown
BATCHES = "batches of one model"
GRADIENT_STEPS = "gradient steps"  # the parts of the learned start


class Listener(Protocol):
    """Shows a search to its user, see `SearchView`."""

    def phase(self, text: str) -> None:
        """A new phase of the search begins."""

    def say(self, text: str) -> None:
        """Show one line."""

    def step(self, done: int, total: int, unit: str) -> None:
        """How much of this phase, or of its present model, is done."""

    def trial(self, number: int, value: float | None, note: str, snapshot: Snapshot) -> None:
        """A trial has finished.

        value: None if the trial failed.  note: what is special about it.  snapshot: the search with it.
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
        self.trackers = Trackers(run, config)
        self.stopwatch = Stopwatch()
        self.progress = SearchProgress()
        self.worker_states: Callable[[], Sequence[WorkerState]] = tuple
        self.reserved = 0.0
        self.steps_to_come = False
        self.judging_since: float | None = None
        self.tasks: tuple[TaskScore, ...] = ()
        self.coefficients: tuple[Coefficients, ...] = ()
        self.compute_dtype: str | None = None
        self.used = Usage()
        self.names: dict[int, str] = {}
        self.points: list[tuple[int, float]] = []
        self.partial = self.broken = self.failed = 0
        self.failures: deque[LastFailure] = deque(maxlen=FAILURES)
        self.proposed: deque[float] = deque(maxlen=RECENT)  # seconds of the latest trials that the sampler proposed
        self.baseline_trials: deque[float] = deque(maxlen=RECENT)
        self.name_method(" or ".join(config.candidate_methods))
        self.current_phase = "starting"
        self.phase_began = time.monotonic()
        self.parts: tuple[int, int] | None = None
        self.first_part = 0
        self.unit = ""
        self.batches: tuple[int, int] | None = None
        self.ended: str | None = None
        self.published_at = -math.inf

    def __enter__(self) -> "Monitor":
        self.publish()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.trackers.close(ended=error is None)
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

    def phase(self, text: str, parts: int = 0, unit: str = "models", done: int = 0) -> None:
        """A new phase of the search begins.

        parts: how many parts it has, 0 for one that is not counted.  unit: what they are.  done: how many are done.
        """
        self.current_phase, self.phase_began, self.batches = text, time.monotonic(), None
        self.parts, self.first_part, self.unit = (done, parts) if parts else None, done, unit
        self.listener.phase(text)
        self.publish()

    def part(self) -> None:
        """Another part of the phase is done."""
        self.batches = None
        if self.parts is not None:
            done, total = self.parts[0] + 1, max(self.parts[0] + 1, self.parts[1])
            self.parts = done, total
            self.listener.step(done, total, self.unit)
        self.refresh()

    def judge(self) -> None:
        """No trial begins any more; from now on the reserve is used up."""
        self.judging_since = time.monotonic()

    def say(self, text: str) -> None:
        """Show one line and write it into the log."""
        self.run.log(text)
        self.listener.say(text)

    def step(self, done: int, total: int) -> None:
        """Batches of one model that are done, and their total."""
        self.batches = done, total
        self.listener.step(done, total, BATCHES)
        self.refresh()

    def trial(self, number: int, value: float | None, record: TrialRecord, baseline: str | None) -> None:
        """A trial has finished.  value: what the sampler was told; None if the trial failed.  record: as stored."""
        self.count_trial(number, value if record.in_full else None, record, baseline)
        self.add_used(record.used or Usage())
        if record.seconds.forward is not None:  # else its scores were known
            (self.proposed if baseline is None else self.baseline_trials).append(record.seconds.total or 0.0)
        shown = remark(record) or baseline or ""
        self.listener.trial(number, value, shown, self.snapshot())
        if baseline is not None:
            self.part()
        self.refresh()

    def incumbent(self, tasks: tuple[TaskScore, ...], coefficients: tuple[Coefficients, ...]) -> None:
        """Show these scores and coefficients of the best trial, see `incumbent.py`."""
        self.tasks, self.coefficients = tasks, coefficients

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
        elapsed, workers = self.stopwatch.elapsed, tuple(self.worker_states())
        used = self.used.as_dict() | {
            "seconds": round(elapsed.seconds, 1),
            "device_seconds": round(elapsed.device_seconds, 1),
        }
        return Snapshot(
            name=self.config.name,
            title=self.title,
            compute_dtype=self.compute_dtype,
            phase=self.current_phase,
            parts=self.parts,
            unit=self.unit,
            step=self.batches if len(workers) == 1 else None,  # of several workers the models take turns
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
            tasks=self.tasks,
            coefficients=self.coefficients,
            since_best=progress.since_best,
            target=limits.target,
            patience=limits.patience,
            per_minute=self.per_minute(),
            left=self.seconds_left(),
            reserved=self.reserved,
            workers=workers,
            failures=tuple(self.failures),
            used=used,
            price=price_of(elapsed.device_seconds, self.config.price),
        )

    def per_minute(self) -> float | None:
        """Trials per minute, by what the latest ones of this session took; None before there are `FEWEST`.

        Candidates that the sampler proposes race, so they count alone as soon as there are enough of them.
        """
        seconds = list(self.proposed)
        if len(seconds) < FEWEST:
            seconds += self.baseline_trials
        if len(seconds) < FEWEST or not sum(seconds):
            return None
        return 60 * max(1, len(self.worker_states())) * len(seconds) / sum(seconds)

    def seconds_left(self) -> float | None:
        """Seconds until the result: by the limit that comes first, as far as what remains can be estimated."""
        until_limit = self.limits.seconds_left(self.stopwatch.elapsed.seconds, now())
        if self.judging_since is not None:
            left = min(until_limit, self.reserved - (time.monotonic() - self.judging_since))
            return left if left > 0 else None  # it takes longer than was estimated
        if self.limits.trials is None:
            return max(0.0, until_limit) if until_limit < math.inf else None
        rate, steps = self.per_minute(), self.step_seconds_left()
        if rate is None or steps is None:  # how long the trials will take is not known; a limit of time is
            return max(0.0, until_limit) if until_limit < math.inf else None
        trials = max(0, self.limits.trials - self.progress.trials)
        return max(0.0, min(until_limit, trials * 60 / rate + steps + self.reserved))

    def step_seconds_left(self) -> float | None:
        """Seconds of the gradient steps that are still to come; None if there will be some of unknown length."""
        if not self.steps_to_come:
            return 0.0
        if self.parts is None or self.unit != GRADIENT_STEPS or (done := self.parts[0] - self.first_part) < FEWEST:
            return None
        return (time.monotonic() - self.phase_began) / done * (self.parts[1] - self.parts[0])


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
