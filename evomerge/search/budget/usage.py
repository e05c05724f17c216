"""What a search used up: time, forwards, tokens, memory, energy; of a trial and of the whole run."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from optuna.trial import FrozenTrial

from evomerge.search.storage.item_scores import evaluation_records
from evomerge.search.storage.trial_record import EvaluationRecord, TrialRecord, record_of


@dataclass(frozen=True)
class Usage:
    """What some work took.

    seconds: by the wall.  worker_seconds: that workers computed.  device_seconds: that they held their devices, whether
    they computed, waited or loaded a model.  forwards: calls of the model.  tokens: real ones that went into it.
    padded: those and their padding.  peak_bytes: the most memory of one worker (of the device; without an accelerator
    of the process since it began, memory-mapped files included).  joules: of the devices, None where they do not tell.
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
        """Both, one after the other."""
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
        """Plain numbers; what is not known is left out."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Usage":
        """What `as_dict` gave; keys that it lacks are zero, others are passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in content.items() if k in known})


@dataclass(frozen=True)
class Elapsed:
    """How long a run has taken over all its sessions.  seconds: by the wall.  device_seconds: devices were held."""

    seconds: float = 0.0
    device_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, in milliseconds at the finest."""
        return {k: round(v, 3) for k, v in asdict(self).items()}


class Stopwatch:
    """Counts a run's time from where earlier sessions left off, by the monotonic clock.

    What it says is stored with every result, so a session that is killed loses what came after the last one.
    """

    def __init__(self, devices: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.devices = devices
        self.clock = clock
        self.since = clock()
        self.before = Elapsed()

    @property
    def elapsed(self) -> Elapsed:
        passed = self.clock() - self.since
        return Elapsed(self.before.seconds + passed, self.before.device_seconds + passed * self.devices)

    def go_on(self, earlier: Elapsed) -> None:
        """Add what earlier sessions took."""
        self.before = Elapsed(
            self.before.seconds + earlier.seconds, self.before.device_seconds + earlier.device_seconds
        )

    def hold(self, devices: int) -> None:
        """From now on this many devices are held."""
        self.before, self.since, self.devices = self.elapsed, self.clock(), devices


def records_of(
    trials: Iterable[FrozenTrial], attributes: Mapping[str, Any]
) -> Iterable[TrialRecord | EvaluationRecord]:
    """The records of all finished work of a study: of trials, and of what was evaluated outside of trials."""
    yield from map(record_of, trials)
    yield from evaluation_records(attributes).values()


def used_by(trials: Iterable[FrozenTrial], attributes: Mapping[str, Any]) -> Usage:
    """What a run has used so far.  attributes: the study's.

    Forwards, tokens and energy are the sums over trials and other evaluations; time by the wall and of the devices is
    the run's own, which also has what lies between them.
    """
    every = list(records_of(trials, attributes))
    total = sum((record.used for record in every if record.used is not None), Usage())
    elapsed = max((e.elapsed for e in every if e.elapsed is not None), key=lambda e: e.seconds, default=Elapsed())
    return replace(total, seconds=elapsed.seconds, device_seconds=elapsed.device_seconds)
