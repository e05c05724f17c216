"""Where a trial's time goes, and the place where a long computation may be asked to stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by part.  `check` is called between batches and may raise to interrupt the work."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self.check = check

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time of the block to `part`; blocks do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
