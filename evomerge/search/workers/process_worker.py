"""A worker that is a process of this machine, as the driver sees it: start it, send it jobs, end it with its children.

`process_main.py` is what runs in the process.  Messages go through its standard input and output.  The process leads a
process group of its own, so that Ctrl-C reaches the driver alone and killing the group ends its children too.
"""

import asyncio
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.files.write import appending
from evomerge.search.evaluation.jobs import Job, Result
from evomerge.search.workers.worker import BatchProgress, WorkerDied, WorkerSetup
from evomerge.system import kill_process_group


class ProcessWorker:
    """A worker in a process of its own.

    setup: what the process must know.
    device: of the worker, as named on this machine.
    threads: for the process's OMP_NUM_THREADS if it is not set; None for no limit.
    log_file: gets what the process prints; its end tells how the process died.
    log: gets the lines that belong into the run's log.
    """

    def __init__(
        self, setup: WorkerSetup, device: str, threads: int | None, log_file: Path, log: Callable[[str], None]
    ) -> None:
        self.variables, own = one_device(device, os.environ)
        self.setup = replace(setup, config=setup.config.model_copy(update={"device": own}))
        self.device = device
        self.threads = threads
        self.log_file = log_file
        self.log = log
        self.heartbeats = 0
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start a new process and wait until its evaluator is ready."""
        await self.kill()
        environment = dict(os.environ) | self.variables
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        with appending(self.log_file) as errors:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "evomerge.search.workers.process_main"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment,
                process_group=0,
            )
        await self.ask(self.setup, lambda done, total: None)

    async def run(self, job: Job, progress: BatchProgress) -> Result:
        """Send a job and wait for its result."""
        found: Result = await self.ask(job, progress)
        return found

    async def ask(self, message: Any, progress: BatchProgress) -> Any:
        """Send a message and wait for its answer.  WorkerDied if the process ends first."""
        assert self.process is not None, "a worker is started first"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(encode_message(message))
            await self.process.stdin.drain()
            while True:
                size = struct.unpack("<Q", await self.process.stdout.readexactly(8))[0]
                kind, content = pickle.loads(await self.process.stdout.readexactly(size))
                self.heartbeats += 1
                if kind == "log":
                    self.log(content)
                elif kind == "progress":
                    progress(*content)
                elif kind == "refused":
                    raise EvomergeError(content)
                elif kind == "answer":
                    return content
        except (asyncio.IncompleteReadError, ConnectionError, BrokenPipeError):
            raise WorkerDied(await self.how_it_died()) from None

    async def how_it_died(self) -> str:
        """Wait for the end of a process that is dying, and say how it ended."""
        assert self.process is not None
        code = await self.process.wait()
        kill_process_group(self.process.pid)  # children that the process has left behind
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        last = self.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"ended with exit code {code} ({last[0] if last else 'it printed nothing'}; see {self.log_file})"

    async def kill(self) -> None:
        """End the process and its children."""
        if self.process is not None and self.process.returncode is None:
            kill_process_group(self.process.pid)
            await self.process.wait()

    def close(self) -> None:
        """Nothing is left to free after a `kill`."""


def one_device(device: str, environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Environment variables that hide all devices but one from a process, and the name of that one inside the process.

    Kernels are launched on the process's current device, which is the first one, whatever device their operands are on;
    so the process must see no other.  The variable must be set before CUDA starts; its numbers count the devices that
    this process sees.

    device: as named in this process.
    environment: of this process.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return {}, device
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    names = visible.split(",") if visible else []
    return {"CUDA_VISIBLE_DEVICES": names[int(index)].strip() if names else index}, "cuda"


def encode_message(message: Any) -> bytes:
    """A message between driver and worker: its length in eight bytes, then the pickled content."""
    content = pickle.dumps(message)
    return struct.pack("<Q", len(content)) + content
