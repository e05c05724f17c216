"""What a worker is, and what it must know to begin."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evomerge.config.schema import SearchConfig
from evomerge.merge.bank.memory import Share
from evomerge.search.evaluation.jobs import Job, Result

Progress = Callable[[int, int], None]
"""Called with the batches of an full evaluation that are done, and their total."""


class Died(Exception):
    """A worker is gone; the message says how.  What it worked on can be given to another."""


@dataclass(frozen=True)
class Setup:
    """All that a worker knows before its first job.

    folder: the run's, absolute.  host: the driver's.  stamps: who the models' files are on that host.  inputs, items:
    hashes of the models' files and of the dealt items, as the driver sees them.  share: how many workers use the same
    device and the same machine, None for it alone.
    """

    config: SearchConfig
    folder: Path
    host: str
    stamps: Mapping[str, Mapping[str, tuple[int, int, int]]]
    inputs: Mapping[str, Mapping[str, str]]
    items: Mapping[str, Mapping[str, str]]
    share: Share | None = None


class Worker(Protocol):
    """Bank and live model on one device; it knows nothing of the study.

    A worker is started, then runs one job at a time.  `beats` grows while it works, so that one who hangs is noticed.
    """

    device: str

    @property
    def beats(self) -> int: ...

    async def start(self) -> None:
        """Until it is ready, also again after it died.  Died if it dies first; EvomergeError if its inputs differ."""

    async def run(self, job: Job, progress: Progress) -> Result:
        """Died if the worker dies first; EvomergeError if the search is at fault."""

    async def kill(self) -> None:
        """Stop at once, whatever it does now; it can be started again."""

    def close(self) -> None:
        """Be gone for good, after a kill."""
