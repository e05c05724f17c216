"""The worker in this process: a thread, so that the driver can listen meanwhile; one device, no second copy."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import Job, Result
from evomerge.search.workers.worker import Died, Progress


class LocalWorker:
    """A worker of the driver's own process.

    make: opens the evaluator; it gets `check`, which the work calls between batches.  stop: raises when the user wants
    to stop.
    """

    def __init__(
        self, make: Callable[[Callable[[], None], Progress], Evaluator], device: str, stop: Callable[[], None]
    ) -> None:
        self.make = make
        self.device = device
        self.stop = stop
        self.thread = ThreadPoolExecutor(1, "worker")
        self.work: asyncio.Future[Result] | None = None
        self.evaluator: Evaluator | None = None
        self.unwanted = False
        self.looks = 0
        self.report: Progress = lambda done, total: None

    @property
    def beats(self) -> int:
        """Always another number: if this process hangs, nobody is left to notice."""
        self.looks += 1
        return self.looks

    def check(self) -> None:
        self.stop()
        if self.unwanted:
            raise Died("was told to stop")

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.unwanted = False

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self.report, done, total)

        if self.evaluator is None:
            self.evaluator = await loop.run_in_executor(self.thread, self.make, self.check, progress)

    async def run(self, job: Job, progress: Progress) -> Result:
        assert self.evaluator is not None, "a worker is started first"
        self.report = progress
        self.work = asyncio.get_running_loop().run_in_executor(self.thread, self.evaluator.run, job)
        return await asyncio.shield(self.work)

    async def kill(self) -> None:
        self.unwanted = True
        if self.work is not None:
            await asyncio.gather(self.work, return_exceptions=True)

    def close(self) -> None:
        self.thread.shutdown()
