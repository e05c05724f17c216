"""How a user stops a search: by SIGINT or SIGTERM; everything finished is kept."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

LISTEN = 0.2  # seconds between two checks for a signal
T = TypeVar("T")


class Interrupted(BaseException):
    """The user asked to stop (SIGINT, SIGTERM).  Running trials stay in the study; a resume runs them again."""


class StopSignal:
    """A request to stop, made by the first SIGINT or SIGTERM; a second one ends the process at once.

    received: the signal's number; None before there is one.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal has come.  Workers call it between batches."""
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen for signals while the context lasts."""
        before = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.received = number
        signal.signal(number, signal.SIG_DFL)


async def stoppable(stop: StopSignal, work: Coroutine[Any, Any, T], tick: Callable[[], None]) -> T:
    """Run `work` and return its result; raise Interrupted soon after a signal has come.

    tick: called a few times a second meanwhile.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=LISTEN)
            stop.check()
            tick()
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
