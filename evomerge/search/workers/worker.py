"""The interface of a worker, and what a worker must know before its first job."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evomerge.config.schema import SearchConfig
from evomerge.merge.bank.memory import Share
from evomerge.search.evaluation.jobs import Job, Result

BatchProgress = Callable[[int, int], None]
"""Called with the number of batches of an `EvaluationJob` that are done, and their total."""


class WorkerDied(Exception):
    """A worker has ended; the message says how.  Its job can be given to another worker."""


@dataclass(frozen=True)
class WorkerSetup:
    """All that a worker outside the driver's process knows before its first job.

    config: of the search.
    folder: the run folder, absolute.
    host: name of the driver's machine.
    stamps: what tells on the driver's machine that a model's file is still the same, see `model_stamps`.
    inputs, items: hashes of the models' files and of the items of each split, as the driver sees them.
    share: how many workers use the same device and the same machine; None if there is only this one.
    """

    config: SearchConfig
    folder: Path
    host: str
    stamps: Mapping[str, Mapping[str, tuple[int, int, int]]]
    inputs: Mapping[str, Mapping[str, str]]
    items: Mapping[str, Mapping[str, str]]
    share: Share | None = None


class Worker(Protocol):
    """An evaluator on one device.  It is started, then runs one job at a time."""

    device: str

    @property
    def heartbeats(self) -> int:
        """A number that changes while the worker works; it stays the same while the worker hangs."""

    async def start(self) -> None:
        """Start the worker, also again after it died, and wait until it is ready.

        WorkerDied if it dies first; EvomergeError if its models or items are not the driver's.
        """

    async def run(self, job: Job, progress: BatchProgress) -> Result:
        """Do a job.  WorkerDied if the worker dies first; EvomergeError if the search itself cannot go on."""

    async def kill(self) -> None:
        """Stop the worker at once, whatever it does; it can be started again."""

    def close(self) -> None:
        """Free what is left after a `kill`; the worker is not started again."""
