"""Workers that are Ray actors, one for each accelerator of a cluster, on whatever Ray runs."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, Literal

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.jobs import Job, Result
from evomerge.search.workers.worker import Died, Progress, Setup

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise EvomergeError('--ray needs Ray; install it with: pip install "evomerge[ray]"') from error

POLL = 0.5  # seconds between looks at an actor's beats
RESTARTS = 3  # of an actor by Ray itself: the pool asks for a new one after that


class RayEvaluator:
    """The actor: one thread works, another answers how far it is."""

    def __init__(self) -> None:
        self.beats = 0
        self.lines: list[str] = []
        self.done = (0, 0)
        self.lock = threading.Lock()
        self.evaluator: Any = None

    def beat(self) -> None:
        self.beats += 1

    def progress(self, done: int, total: int) -> None:
        self.beats, self.done = self.beats + 1, (done, total)

    def say(self, text: str) -> None:
        with self.lock:
            self.lines.append(text)

    def open(self, setup: Setup) -> str | None:
        """Open the evaluator; what is wrong with it, if anything is."""
        from evomerge.search.workers.remote_evaluator import open_evaluator

        try:
            self.evaluator = open_evaluator(setup, self.beat, self.say, self.progress)
        except EvomergeError as error:
            return str(error)
        return None

    def work(self, job: Job) -> Result | str:
        """The result; a text if the search is at fault."""
        try:
            found: Result = self.evaluator.run(job)
        except EvomergeError as error:
            return str(error)
        return found

    def look(self) -> tuple[int, tuple[int, int], list[str]]:
        """Beats so far, how far an full evaluation is, and what was logged since the last look."""
        with self.lock:
            lines, self.lines = self.lines, []
        return self.beats, self.done, lines

    def process(self) -> int:
        """Its process id, on its own machine."""
        return os.getpid()


def connect(address: str) -> None:
    """Join a cluster, or start one of this machine alone (`local`).  EvomergeError if there is none at the address."""
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), timeout=10).close()
        if address == "local":
            ray.init(address="local", **quiet)
        else:
            quiet.pop("include_dashboard")
            ray.init(address=address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvomergeError(f"--ray {address}: no cluster can be reached there ({reason})") from error
    for number, handler in handlers.items():  # Ray puts its own in their place
        signal.signal(number, handler)


def cluster_room(device: str, wanted: int | Literal["auto"]) -> int:
    """How many workers a cluster gets: one for each accelerator, or one for each machine where there are none.

    EvomergeError if it has no room for those wanted.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if device.startswith("cuda") and not gpus:
        raise EvomergeError(f"device: {device!r} was asked for, but the Ray cluster has no GPU")
    on_gpus = gpus > 0 and device != "cpu"
    if wanted == "auto":
        return gpus if on_gpus else sum(bool(node["Alive"]) for node in ray.nodes())
    if wanted > (gpus if on_gpus else cpus):
        has = f"{gpus} GPUs" if on_gpus else f"{cpus} CPUs"
        raise EvomergeError(f"--workers {wanted}: the Ray cluster has {has}, and every worker takes one")
    return wanted


def cluster_device(device: str) -> str:
    """The kind of device that workers get for this `device` of the configuration."""
    return "cuda" if ray.cluster_resources().get("GPU", 0) and device != "cpu" else "cpu"


def workers_of_a_machine(count: int) -> int:
    """How many of so many workers may come to stand on one machine of the cluster: no more than it has accelerators,
    or processors where there are none."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max([int(found.get("GPU", 0) or found.get("CPU", 1)) for found in alive], default=1)
    return max(1, min(count, most))


class RayWorker:
    """A worker that Ray places: on a machine with a free accelerator, spread over the cluster."""

    def __init__(self, setup: Setup, log: Callable[[str], None]) -> None:
        self.setup = setup
        self.log = log
        self.beats = 0
        self.actor: Any = None
        self.gone = False  # the actor died, and Ray is at it already
        self.gpus = 1 if cluster_device(setup.config.device) == "cuda" else 0
        self.device = "ray cuda" if self.gpus else "ray cpu"
        threads = os.environ.get("OMP_NUM_THREADS")
        variables = {"OMP_NUM_THREADS": threads} if threads else {}
        self.made = ray.remote(RayEvaluator).options(
            num_gpus=self.gpus,
            num_cpus=1,
            max_restarts=RESTARTS,
            max_concurrency=2,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": variables} if variables else None,
        )

    async def start(self) -> None:
        """A new actor, or the old one that Ray has restarted."""
        if self.actor is None:
            self.actor = self.made.remote()
        self.gone = False
        try:
            wrong = await self.ask(self.actor.open.remote(self.setup), lambda done, total: None)
        except Died:
            self.close()  # Ray restarts it no more
            raise
        if wrong is not None:
            raise EvomergeError(wrong)

    async def run(self, job: Job, progress: Progress) -> Result:
        found = await self.ask(self.actor.work.remote(job), progress)
        if isinstance(found, str):
            raise EvomergeError(found)
        result: Result = found
        return result

    async def ask(self, answer: Any, progress: Progress) -> Any:
        """Wait for an actor's answer, looking at its beats meanwhile.  Died if the actor or its machine is gone."""
        waiting = asyncio.wrap_future(answer.future())
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=POLL)
                if not waiting.done():
                    await self.look(progress)
            found = await waiting
            await self.look(progress)
        except RayTaskError:
            raise
        except RayError as error:
            waiting.exception() if waiting.done() else waiting.cancel()  # nobody else asks for it
            self.gone = True
            raise Died(f"is gone: {str(error).strip().splitlines()[0]}") from None
        return found

    async def look(self, progress: Progress) -> None:
        looking = asyncio.wrap_future(self.actor.look.remote().future())
        await asyncio.wait([looking], timeout=30 * POLL)
        if not looking.done():
            return  # a silent actor is the pool's affair
        beats, done, lines = looking.result()
        if done[1] and beats != self.beats:
            progress(*done)
        self.beats = beats
        for line in lines:
            self.log(line)

    async def kill(self) -> None:
        if self.actor is not None and not self.gone:
            with contextlib.suppress(RayError):
                ray.kill(self.actor, no_restart=False)

    def close(self) -> None:
        if self.actor is not None:
            with contextlib.suppress(RayError):
                ray.kill(self.actor, no_restart=True)
            self.actor = None
