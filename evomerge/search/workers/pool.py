"""The pool gives jobs to free workers.

A worker that dies or hangs is restarted, and its job is given to another worker; a job over which `MAX_DEATHS` workers
died has failed.  A job that takes longer than it may has failed at once, and its worker is restarted.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.jobs import Failure, Job, Result
from evomerge.search.monitor.snapshot import State, WorkerState
from evomerge.search.workers.worker import BatchProgress, Worker, WorkerDied

MAX_DEATHS = 3  # of workers over one job, or of one worker while it starts
START_LIMIT = 1800.0  # seconds until a worker must be ready: a large model may come over a network
TICK = 0.5  # seconds between two looks at a worker's heartbeats


T = TypeVar("T")


class JobTimeout(Exception):
    """A job took longer than it may."""


@dataclass
class PoolMember:
    """A worker of the pool and what it does now.

    number: of the worker, from 0.
    trial: number of the trial that it runs; None if it runs none.
    doing: the name of its job; empty if it has none.
    since: when its state began, in seconds of the monotonic clock.
    restarts: how often it was started again.
    """

    number: int
    worker: Worker
    state: State = "starting"
    trial: int | None = None
    doing: str = ""
    since: float = 0.0
    restarts: int = 0

    def set_state(self, state: State, trial: int | None = None, doing: str = "") -> None:
        """A new state begins now."""
        self.restarts += state == "restarting"
        self.state, self.trial, self.doing, self.since = state, trial, doing, time.monotonic()


class Pool:
    """Workers with one queue of those that are free.

    log: gets a line when a worker dies.
    max_silence: seconds without a heartbeat after which a worker counts as hung.
    max_job_time: seconds that a job may take; None for any.
    Neither counts time in which this process itself was suspended.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        log: Callable[[str], None],
        max_silence: float = 300.0,
        max_job_time: float | None = None,
    ) -> None:
        self.members = [PoolMember(number, w) for number, w in enumerate(workers)]
        self.log = log
        self.max_silence = max_silence
        self.max_job_time = max_job_time
        self.free: asyncio.Queue[PoolMember | None] = asyncio.Queue()  # None: no worker is left
        self.tasks: set[asyncio.Task[None]] = set()
        self.error: BaseException | None = None

    @property
    def size(self) -> int:
        """The number of workers."""
        return len(self.members)

    def states(self) -> list[WorkerState]:
        """What every worker does now."""
        now = time.monotonic()
        return [
            WorkerState(str(m.number), m.worker.device, m.state, m.trial, now - m.since, m.restarts, m.doing)
            for m in self.members
        ]

    async def open(self) -> None:
        """Start all workers and return when the first one is ready.

        EvomergeError if none can be started.  Any other error in a worker's start is a bug and is raised as it is.
        """
        for member in self.members:
            self.begin_start(member)
        self.free.put_nowait(await self.free_member())

    async def close(self) -> None:
        """End all workers, whatever they do."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(m.worker.kill() for m in self.members), return_exceptions=True)
        for member in self.members:
            member.worker.close()

    async def run(
        self, job: Job, title: str, progress: BatchProgress = lambda done, total: None, trial: int | None = None
    ) -> Result:
        """Give a job to the first free worker and wait for its result.

        title: names the job in the log and among the workers' states.
        trial: number of the trial, if the job is one.
        EvomergeError if no worker is left.
        """
        for _ in range(MAX_DEATHS):
            member = await self.free_member()
            member.set_state("busy", trial, title)
            work = member.worker.run(job, progress)
            try:
                result = await self.wait_for(member.worker, work, self.max_silence, self.max_job_time)
            except (WorkerDied, JobTimeout) as end:
                self.log(f"{title}: worker {member.number} {end}")
                self.begin_start(member, "restarting")
                if isinstance(end, JobTimeout):
                    return Failure(str(end))
                cause = end
            except BaseException:
                await member.worker.kill()
                raise
            else:
                member.set_state("idle")
                self.free.put_nowait(member)
                return result
        return Failure(f"its worker died {MAX_DEATHS} times; the last one {cause}")

    async def free_member(self) -> PoolMember:
        """Wait for a free worker.  EvomergeError if no worker is left."""
        member = await self.free.get()
        if member is None:
            self.free.put_nowait(None)  # for other callers that wait
            raise self.error or EvomergeError("no worker is left")
        return member

    def begin_start(self, member: PoolMember, state: State = "starting") -> None:
        """Start a worker in the background."""
        task = asyncio.create_task(self.start(member, state))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def start(self, member: PoolMember, state: State) -> None:
        """Start a worker and add it to the free ones; give it up after `MAX_DEATHS` deaths."""
        member.set_state(state)
        for _ in range(MAX_DEATHS):
            try:
                if state == "restarting":
                    await member.worker.kill()
                await self.wait_for(member.worker, member.worker.start(), START_LIMIT, None)
            except (WorkerDied, JobTimeout) as end:
                self.log(f"worker {member.number} did not start: it {end}")
                state, cause = "restarting", EvomergeError(f"no worker could be started; the last one {end}")
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # every other worker would fail in the same way; a panic is no Exception
                member.set_state("dead")
                self.error = error
                self.free.put_nowait(None)
                return
            else:
                member.set_state("idle")
                self.free.put_nowait(member)
                return
        member.set_state("dead")
        if all(m.state == "dead" for m in self.members):
            self.error = cause
            self.free.put_nowait(None)

    async def wait_for(self, worker: Worker, work: Awaitable[T], max_silence: float, max_time: float | None) -> T:
        """Wait for something that a worker does.

        Between two looks at the worker at most two TICKs are counted, so that the time in which the machine slept is
        not held against the worker.

        WorkerDied after `max_silence` seconds without a heartbeat, JobTimeout after `max_time` seconds.
        """
        task = asyncio.ensure_future(work)
        silent = whole = 0.0
        heartbeats, looked = worker.heartbeats, time.monotonic()
        try:
            while not task.done():
                await asyncio.wait([task], timeout=TICK)
                now = time.monotonic()
                passed, looked = min(now - looked, 2 * TICK), now
                whole += passed
                silent = 0.0 if worker.heartbeats != heartbeats else silent + passed
                heartbeats = worker.heartbeats
                if not task.done() and silent > max_silence:
                    raise WorkerDied(f"was silent for {silent:.0f} s")
                if not task.done() and max_time is not None and whole > max_time:
                    raise JobTimeout(f"took longer than the {max_time:g} s that a trial may take")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await asyncio.wait([task], timeout=0)


async def run_all(*works: Awaitable[T]) -> list[T]:
    """Wait for several awaitables and return their results; if one raises, the others are cancelled first."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
