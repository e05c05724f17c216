"""The worker inside the driver's process: a thread, so that the driver can react to signals meanwhile.

There is one device and one copy of the models.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import Job, Result
from evomerge.search.workers.worker import BatchProgress, WorkerDied


class LocalWorker:
    """A worker that is a thread of the driver's process.

    make: opens the evaluator; gets the function that the evaluator calls between batches, and the one for progress.
    device: its name, to be shown.
    stop: called between batches; raises when the user wants to stop.
    """

    def __init__(
        self, make: Callable[[Callable[[], None], BatchProgress], Evaluator], device: str, stop: Callable[[], None]
    ) -> None:
        self.make = make
        self.device = device
        self.stop = stop
        self.thread = ThreadPoolExecutor(1, "worker")
        self.work: asyncio.Future[Result] | None = None
        self.evaluator: Evaluator | None = None
        self.killed = False
        self.count = 0
        self.report: BatchProgress = lambda done, total: None

    @property
    def heartbeats(self) -> int:
        """Always another number: if this process hangs, so does the pool that would notice it."""
        self.count += 1
        return self.count

    def check(self) -> None:
        """Called between batches: raise if the work is to stop."""
        self.stop()
        if self.killed:
            raise WorkerDied("was told to stop")

    async def start(self) -> None:
        """Open the evaluator, once."""
        loop = asyncio.get_running_loop()
        self.killed = False

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(self.report, done, total)

        if self.evaluator is None:
            self.evaluator = await loop.run_in_executor(self.thread, self.make, self.check, progress)

    async def run(self, job: Job, progress: BatchProgress) -> Result:
        """Do a job in the thread."""
        assert self.evaluator is not None, "a worker is started first"
        self.report = progress
        self.work = asyncio.get_running_loop().run_in_executor(self.thread, self.evaluator.run, job)
        return await asyncio.shield(self.work)

    async def kill(self) -> None:
        """Make the job stop after its present batch, and wait for that."""
        self.killed = True
        if self.work is not None:
            await asyncio.gather(self.work, return_exceptions=True)

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown()
