"""A worker that is a Ray actor, placed by Ray on a machine of the cluster.

`RayEvaluator` runs in the actor's process; `RayWorker` is the actor as the driver sees it.  Ray restarts an actor that
dies a few times by itself; after that the worker makes a new one.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.jobs import Job, Result
from evomerge.search.workers.ray_cluster import cluster_device
from evomerge.search.workers.worker import BatchProgress, WorkerDied, WorkerSetup

POLL = 0.5  # seconds between two questions for an actor's state
RESTARTS = 3  # of an actor by Ray itself


class RayEvaluator:
    """The actor: one of its threads does jobs, another answers questions for its state."""

    def __init__(self) -> None:
        self.heartbeats = 0
        self.lines: list[str] = []
        self.done = (0, 0)
        self.lock = threading.Lock()
        self.evaluator: Any = None

    def heartbeat(self) -> None:
        """Called between batches."""
        self.heartbeats += 1

    def progress(self, done: int, total: int) -> None:
        """Batches of a job that are done, and their total."""
        self.heartbeats, self.done = self.heartbeats + 1, (done, total)

    def log(self, text: str) -> None:
        """Keep a line for the run's log until the driver asks for it."""
        with self.lock:
            self.lines.append(text)

    def open(self, setup: WorkerSetup) -> str | None:
        """Open the evaluator; return the message of an EvomergeError, or None."""
        from evomerge.search.workers.remote_evaluator import open_evaluator

        try:
            self.evaluator = open_evaluator(setup, self.heartbeat, self.log, self.progress)
        except EvomergeError as error:
            return str(error)
        return None

    def work(self, job: Job) -> Result | str:
        """Do a job; return its result, or the message of an EvomergeError."""
        try:
            found: Result = self.evaluator.run(job)
        except EvomergeError as error:
            return str(error)
        return found

    def state(self) -> tuple[int, tuple[int, int], list[str]]:
        """Heartbeats so far, (batches done, their total), and the log's lines since the last call."""
        with self.lock:
            lines, self.lines = self.lines, []
        return self.heartbeats, self.done, lines

    def process(self) -> int:
        """Its process id, on its own machine."""
        return os.getpid()


class RayWorker:
    """A worker that Ray places on a machine with a free accelerator, spread over the cluster.

    setup: what the actor must know.
    log: gets the lines that belong into the run's log.
    """

    def __init__(self, setup: WorkerSetup, log: Callable[[str], None]) -> None:
        self.setup = setup
        self.log = log
        self.heartbeats = 0
        self.actor: Any = None
        self.dead = False  # the actor died, and Ray restarts it already
        self.gpus = 1 if cluster_device(setup.config.device) == "cuda" else 0
        self.device = "ray cuda" if self.gpus else "ray cpu"
        threads = os.environ.get("OMP_NUM_THREADS")
        variables = {"OMP_NUM_THREADS": threads} if threads else {}
        self.actor_class = ray.remote(RayEvaluator).options(
            num_gpus=self.gpus,
            num_cpus=1,
            max_restarts=RESTARTS,
            max_concurrency=2,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": variables} if variables else None,
        )

    async def start(self) -> None:
        """Make an actor, or take the old one that Ray has restarted, and open its evaluator."""
        if self.actor is None:
            self.actor = self.actor_class.remote()
        self.dead = False
        try:
            wrong = await self.ask(self.actor.open.remote(self.setup), lambda done, total: None)
        except WorkerDied:
            self.close()  # so that Ray restarts it no more
            raise
        if wrong is not None:
            raise EvomergeError(wrong)

    async def run(self, job: Job, progress: BatchProgress) -> Result:
        """Send a job and wait for its result."""
        found = await self.ask(self.actor.work.remote(job), progress)
        if isinstance(found, str):
            raise EvomergeError(found)
        result: Result = found
        return result

    async def ask(self, answer: Any, progress: BatchProgress) -> Any:
        """Wait for an answer of the actor, asking for its state meanwhile.  WorkerDied if the actor is gone."""
        waiting = asyncio.wrap_future(answer.future())
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=POLL)
                if not waiting.done():
                    await self.update_state(progress)
            found = await waiting
            await self.update_state(progress)
        except RayTaskError:
            raise
        except RayError as error:
            waiting.exception() if waiting.done() else waiting.cancel()  # nothing else waits for it
            self.dead = True
            raise WorkerDied(f"is gone: {str(error).strip().splitlines()[0]}") from None
        return found

    async def update_state(self, progress: BatchProgress) -> None:
        """Ask the actor for its state; give up after a while, as the pool notices a worker that hangs."""
        asking = asyncio.wrap_future(self.actor.state.remote().future())
        await asyncio.wait([asking], timeout=30 * POLL)
        if not asking.done():
            return
        heartbeats, done, lines = asking.result()
        if done[1] and heartbeats != self.heartbeats:
            progress(*done)
        self.heartbeats = heartbeats
        for line in lines:
            self.log(line)

    async def kill(self) -> None:
        """Kill the actor's process; Ray restarts it."""
        if self.actor is not None and not self.dead:
            with contextlib.suppress(RayError):
                ray.kill(self.actor, no_restart=False)

    def close(self) -> None:
        """Kill the actor for good."""
        if self.actor is not None:
            with contextlib.suppress(RayError):
                ray.kill(self.actor, no_restart=True)
            self.actor = None
