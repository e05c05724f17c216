"""Where a trial's time goes, what it computes, and the place where a long computation may be asked to stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.device import synchronise

CPU = torch.device("cpu")


@dataclass
class Counts:
    """What was computed so far.

    forwards: calls of the model.  tokens: real ones that went in.  padded: those and the padding beside them.
    """

    forwards: int = 0
    tokens: int = 0
    padded: int = 0

    def add(self, tokens: int, padded: int) -> None:
        """One forward."""
        self.forwards += 1
        self.tokens += tokens
        self.padded += padded


class Clock:
    """Seconds by part.

    check: called between batches, may raise to interrupt the work.  step: called after each batch.  counts: added to
    by every forward.  device: that does the work; a part ends when it has done all it was given.
    """

    def __init__(
        self,
        check: Callable[[], None] = lambda: None,
        step: Callable[[], None] = lambda: None,
        counts: Counts | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.check = check
        self.step = step
        self.counts = Counts() if counts is None else counts

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`; blocks do not nest."""
        synchronise(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def counter(total: int, progress: Callable[[int, int], None]) -> Callable[[], None]:
    """A `step` that counts and reports (steps done, total)."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return step


@contextmanager
def forwards_of(model: Any, counts: Counts) -> Iterator[None]:
    """While this lasts, the model's forwards are counted; for work that another library does."""

    def count(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        tokens = options["input_ids"] if "input_ids" in options else inputs[0]  # (B, T)
        mask = options.get("attention_mask")  # (B, seen)
        real = int(mask[:, -tokens.shape[1] :].sum()) if mask is not None and mask.ndim == 2 else tokens.numel()
        counts.add(real, tokens.numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
