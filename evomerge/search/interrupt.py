"""How a person stops a search: a signal, seen soon, that costs nothing finished."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

LISTEN = 0.2  # seconds between looks for a signal
T = TypeVar("T")


class Interrupted(BaseException):
    """The user asked to stop (SIGINT, SIGTERM); the trial in hand stays in the study and is done on resume."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request that the work checks between batches; a second one kills."""

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)


async def stoppable(stop: StopSignal, work: Coroutine[Any, Any, T], look: Callable[[], None]) -> T:
    """Wait for the work; Interrupted soon after a signal has come.  look: called meanwhile, a few times a second."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=LISTEN)
            stop.check()
            look()
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
