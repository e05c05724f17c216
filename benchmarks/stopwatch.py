"""Wall time of a call, the accelerator's queue included."""

import time
from collections.abc import Callable

import torch

from evomerge.device import synchronise


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started
