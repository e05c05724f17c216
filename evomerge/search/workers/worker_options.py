"""How many workers of which kind a person asks for."""

from dataclasses import dataclass
from typing import Literal

from evomerge.errors import EvomergeError


@dataclass(frozen=True)
class WorkerOptions:
    """count: workers; `auto` is one for each accelerator.  ray: the address of a Ray cluster (`local`: a fresh one on
    this machine), None to do without."""

    count: int | Literal["auto"] = 1
    ray: str | None = None


def parse_worker_options(workers: str | None, ray: str | None) -> WorkerOptions:
    """The worker options of the command line.  EvomergeError if `workers` is neither `auto` nor a count."""
    if workers is None or workers == "auto":
        return WorkerOptions("auto" if workers or ray else 1, ray)
    if not workers.isascii() or not workers.isdecimal() or not 1 <= int(workers) <= 1024:
        raise EvomergeError(f"--workers: {workers!r} is not a count from 1 to 1024 or `auto`")
    return WorkerOptions(int(workers), ray)
