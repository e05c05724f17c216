"""The pool: any worker may take any job; who dies or hangs is replaced, and the job goes to another."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.jobs import Failure, Job, Result
from evomerge.search.monitor.snapshot import State, WorkerState
from evomerge.search.workers.worker import Died, Progress, Worker

DEATHS = 3  # of workers over one job, or of one worker while it starts
STARTING = 1800.0  # seconds until a worker must be ready: a large model may come over a network
TICK = 0.5  # seconds between looks at a worker's beats


T = TypeVar("T")


class Late(Exception):
    """A job took longer than it may."""


@dataclass
class Post:
    """A place in the pool.  trial: in hand.  since: monotonic seconds."""

    worker: Worker
    state: State = "starting"
    trial: int | None = None
    since: float = 0.0
    restarts: int = 0

    def turn(self, state: State, trial: int | None = None) -> None:
        self.state, self.trial, self.since = state, trial, time.monotonic()


class Pool:
    """Workers behind one queue.

    stuck: seconds without a beat after which a working worker counts as hung.  longest: seconds that a job may take
    (None: any); one that takes longer has failed.  Neither counts while this process itself is suspended.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        log: Callable[[str], None],
        stuck: float = 300.0,
        longest: float | None = None,
    ) -> None:
        self.posts = [Post(w) for w in workers]
        self.log = log
        self.stuck = stuck
        self.longest = longest
        self.idle: asyncio.Queue[Post | None] = asyncio.Queue()
        self.tasks: set[asyncio.Task[None]] = set()
        self.error: Exception | None = None

    @property
    def size(self) -> int:
        return len(self.posts)

    def states(self) -> list[WorkerState]:
        """For whoever watches."""
        now = time.monotonic()
        return [
            WorkerState(str(number), post.worker.device, post.state, post.trial, now - post.since, post.restarts)
            for number, post in enumerate(self.posts)
        ]

    async def open(self) -> None:
        """Start all workers; return when the first is ready.  EvomergeError if none can be started; an error of another
        kind, which is a mistake in this program, is raised as it is."""
        for post in self.posts:
            self.launch(post)
        self.idle.put_nowait(await self.ready())

    async def close(self) -> None:
        """End all workers, whatever they do."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(post.worker.kill() for post in self.posts), return_exceptions=True)
        for post in self.posts:
            post.worker.close()

    async def run(
        self, job: Job, title: str, progress: Progress = lambda done, total: None, trial: int | None = None
    ) -> Result:
        """Give a job to the first free worker.  EvomergeError if no worker is left.

        title: for the log.  trial: its number, if the job is one.
        """
        for _ in range(DEATHS):
            post = await self.ready()
            post.turn("busy", trial)
            try:
                result = await self.watched(post.worker, post.worker.run(job, progress), self.stuck, self.longest)
            except (Died, Late) as end:
                self.log(f"{title}: worker {self.posts.index(post)} {end}")
                post.restarts += 1
                self.launch(post, "restarting")
                if isinstance(end, Late):
                    return Failure(str(end))
                cause = end
            except BaseException:
                await post.worker.kill()
                raise
            else:
                post.turn("idle")
                self.idle.put_nowait(post)
                return result
        return Failure(f"its worker died {DEATHS} times; the last one {cause}")

    async def ready(self) -> Post:
        post = await self.idle.get()
        if post is None:
            self.idle.put_nowait(None)  # for whoever else waits
            raise self.error or EvomergeError("no worker is left")
        return post

    def launch(self, post: Post, state: State = "starting") -> None:
        task = asyncio.create_task(self.start(post, state))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def start(self, post: Post, state: State) -> None:
        """Bring a worker to its post; give it up when it dies too often."""
        post.turn(state)
        for _ in range(DEATHS):
            try:
                if state == "restarting":
                    await post.worker.kill()
                await self.watched(post.worker, post.worker.start(), STARTING, None)
            except (Died, Late) as end:
                self.log(f"worker {self.posts.index(post)} did not start: it {end}")
                state, cause = "restarting", EvomergeError(f"no worker could be started; the last one {end}")
            except Exception as error:  # another worker would say the same
                post.turn("dead")
                self.error = error
                self.idle.put_nowait(None)
                return
            else:
                post.turn("idle")
                self.idle.put_nowait(post)
                return
        post.turn("dead")
        if all(p.state == "dead" for p in self.posts):
            self.error = cause
            self.idle.put_nowait(None)

    async def watched(self, worker: Worker, work: Awaitable[T], stuck: float, longest: float | None) -> T:
        """Wait for a worker; Died if it is silent for `stuck` seconds, Late after `longest`.

        Time is counted in looks of at most twice a TICK, so that a machine that slept accuses nobody.
        """
        task = asyncio.ensure_future(work)
        silent = whole = 0.0
        beats, looked = worker.beats, time.monotonic()
        try:
            while not task.done():
                await asyncio.wait([task], timeout=TICK)
                now = time.monotonic()
                passed, looked = min(now - looked, 2 * TICK), now
                whole += passed
                silent = 0.0 if worker.beats != beats else silent + passed
                beats = worker.beats
                if not task.done() and silent > stuck:
                    raise Died(f"was silent for {silent:.0f} s")
                if not task.done() and longest is not None and whole > longest:
                    raise Late(f"took longer than the {longest:g} s that a trial may take")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await asyncio.wait([task], timeout=0)


async def run_all(*works: Awaitable[T]) -> list[T]:
    """The results of all; if one raises, the others are stopped first."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
