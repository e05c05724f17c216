"""What the command line says about workers: how many, and whether on a Ray cluster."""

from dataclasses import dataclass
from typing import Literal

from evomerge.errors import EvomergeError


@dataclass(frozen=True)
class WorkerOptions:
    """How many workers a search gets, and where.

    count: of workers; `auto` is one for each accelerator.
    ray: address of a Ray cluster, `local` to start one on this machine; None to use no Ray.
    """

    count: int | Literal["auto"] = 1
    ray: str | None = None

    @property
    def planned(self) -> int:
        """How many there will be, as far as that is known before they start; else 1."""
        return self.count if self.ray is None and isinstance(self.count, int) else 1


def parse_worker_options(workers: int | str | None, ray: str | None) -> WorkerOptions:
    """Read the options `--workers` and `--ray`.  EvomergeError if `workers` is neither `auto` nor a count."""
    workers = None if workers is None else str(workers)
    if workers is None or workers == "auto":
        return WorkerOptions("auto" if workers or ray else 1, ray)
    if not workers.isascii() or not workers.isdecimal() or not 1 <= int(workers) <= 1024:
        raise EvomergeError(f"--workers: {workers!r} is not a count from 1 to 1024 or `auto`")
    return WorkerOptions(int(workers), ray)
