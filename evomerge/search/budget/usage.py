"""What a search has used: time, forwards, tokens, memory, energy; of one trial and of the whole run."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from optuna.trial import FrozenTrial

from evomerge.search.storage.item_scores import evaluation_records
from evomerge.search.storage.step_record import StepRecord, step_records
from evomerge.search.storage.trial_record import EvaluationRecord, TrialRecord, record_of


@dataclass(frozen=True, slots=True)
class Usage:
    """What some work has used.

    seconds: wall time.
    worker_seconds: time in which workers computed, added up over workers.
    device_seconds: time in which workers held their devices: computing, waiting, or loading a model.
    forwards: calls of the model.
    tokens: tokens that the model read, without padding.
    padded: the same with padding.
    peak_bytes: the most memory of one worker: of its accelerator, or without one of its process since the process
        began, with memory-mapped files.
    joules: energy of the devices; None where they do not tell.
    """

    seconds: float = 0.0
    worker_seconds: float = 0.0
    device_seconds: float = 0.0
    forwards: int = 0
    tokens: int = 0
    padded: int = 0
    peak_bytes: int = 0
    joules: float | None = None

    def __add__(self, other: "Usage") -> "Usage":
        """The sum of two pieces of work."""
        measured = [j for j in (self.joules, other.joules) if j is not None]
        return Usage(
            self.seconds + other.seconds,
            self.worker_seconds + other.worker_seconds,
            self.device_seconds + other.device_seconds,
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.padded + other.padded,
            max(self.peak_bytes, other.peak_bytes),
            sum(measured) if measured else None,
        )

    def as_dict(self) -> dict[str, float | int]:
        """Plain numbers by name; unknown ones are left out."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Usage":
        """Read what `as_dict` returned: missing keys are zero, unknown ones are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in content.items() if k in known})


@dataclass(frozen=True, slots=True)
class Elapsed:
    """How long a run has taken over all its sessions.  seconds: wall time.  device_seconds: see `Usage`."""

    seconds: float = 0.0
    device_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, in milliseconds at the finest."""
        return {k: round(v, 3) for k, v in asdict(self).items()}


class Stopwatch:
    """Measures the time of a run over all its sessions, by the monotonic clock.

    The elapsed time is stored with every result; a session that is killed loses the time after its last result.

    devices: how many devices are held.
    """

    def __init__(self, devices: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.devices = devices
        self.clock = clock
        self.since = clock()
        self.before = Elapsed()

    @property
    def elapsed(self) -> Elapsed:
        """The time of all sessions so far."""
        passed = self.clock() - self.since
        return Elapsed(self.before.seconds + passed, self.before.device_seconds + passed * self.devices)

    def add_earlier(self, earlier: Elapsed) -> None:
        """Add the time of earlier sessions."""
        self.before = Elapsed(
            self.before.seconds + earlier.seconds, self.before.device_seconds + earlier.device_seconds
        )

    def set_devices(self, devices: int) -> None:
        """Count this many devices as held from now on."""
        self.before, self.since, self.devices = self.elapsed, self.clock(), devices


def records_of(
    trials: Iterable[FrozenTrial], attributes: Mapping[str, Any]
) -> Iterable[TrialRecord | EvaluationRecord | StepRecord]:
    """The records of all finished work of a study: trials, what was evaluated outside of them, gradient steps."""
    yield from map(record_of, trials)
    yield from evaluation_records(attributes).values()
    yield from step_records(attributes)


def used_by(trials: Iterable[FrozenTrial], attributes: Mapping[str, Any]) -> Usage:
    """What a run has used so far.

    Forwards, tokens and energy are sums over trials and other evaluations.  Wall time and device time are the run's
    own, which also include the time between evaluations.

    attributes: the study's.
    """
    every = list(records_of(trials, attributes))
    total = sum((record.used for record in every if record.used is not None), Usage())
    elapsed = max((e.elapsed for e in every if e.elapsed is not None), key=lambda e: e.seconds, default=Elapsed())
    return replace(total, seconds=elapsed.seconds, device_seconds=elapsed.device_seconds)
