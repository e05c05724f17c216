"""Where a trial's time goes, and the place where a long computation may be asked to stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by part.

    check: called between batches, may raise to interrupt the work.  step: called after each batch.
    """

    def __init__(self, check: Callable[[], None] = lambda: None, step: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self.check = check
        self.step = step

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`; blocks do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def counter(total: int, progress: Callable[[int, int], None]) -> Callable[[], None]:
    """A `step` that counts and reports (steps done, total)."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    return step
