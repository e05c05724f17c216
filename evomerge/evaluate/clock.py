"""Count the seconds, forwards and tokens of an evaluation, and let it be interrupted between batches."""

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

    forwards: calls of the model.
    tokens: tokens without padding.
    padded: tokens with padding.
    """

    forwards: int = 0
    tokens: int = 0
    padded: int = 0

    def add(self, tokens: int, padded: int) -> None:
        """Add one forward."""
        self.forwards += 1
        self.tokens += tokens
        self.padded += padded


@dataclass
class Batches:
    """How many batches of an evaluation are done.

    total: of the whole evaluation; it grows when batches must be computed again.
    progress: called with both after each batch.
    """

    total: int = 0
    progress: Callable[[int, int], None] = lambda done, total: None
    done: int = 0

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        self.progress(self.done, self.total)


class Clock:
    """The seconds of each part of an evaluation.

    check: called between batches; it may raise to interrupt the work.
    batches: counts the batches; those that are done again too.
    counts: every forward is added to it.
    device: the device that does the work; a part ends when the device has finished it.
    """

    def __init__(
        self,
        check: Callable[[], None] = lambda: None,
        batches: "Batches | None" = None,
        counts: Counts | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.check = check
        self.batches = Batches() if batches is None else batches
        self.counts = Counts() if counts is None else counts

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Within the context, the time counts as `part`.  Parts must not be nested."""
        synchronise(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@contextmanager
def forwards_of(model: Any, counts: Counts) -> Iterator[None]:
    """Within the context, the model's forwards are counted; for forwards that another library runs."""

    def count(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        tokens = options.get("input_ids", inputs[0] if inputs else None)  # (B, T); other models take no tokens
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            counts.add(0, 0)
            return
        mask = options.get("attention_mask")  # (B, tokens so far)
        real = int(mask[:, -tokens.shape[1] :].sum()) if mask is not None and mask.ndim == 2 else tokens.numel()
        counts.add(real, tokens.numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
