"""Workers that are processes of this machine, one for each device.

    python -m evomerge.search.workers.process

is such a process.  It speaks over its standard input and output: pickled messages, each behind its length.  It is in
a process group of its own, so that Ctrl-C reaches the driver alone, and it ends when the driver's end of the pipe does.
"""

import asyncio
import contextlib
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.jobs import Job, Result
from evomerge.search.workers.worker import Died, Progress, Setup

BEAT = 1.0  # seconds between two beats at least


class ProcessWorker:
    """A worker in a process of its own.  log_file: gets what it prints; the end of it says how it died."""

    def __init__(
        self, setup: Setup, device: str, threads: int | None, log_file: Path, log: Callable[[str], None]
    ) -> None:
        self.visible, own = one_device(device, os.environ)
        self.setup = replace(setup, config=setup.config.model_copy(update={"device": own}))
        self.device = device
        self.threads = threads
        self.log_file = log_file
        self.log = log
        self.beats = 0
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        await self.kill()
        environment = dict(os.environ) | self.visible
        if self.threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
        with self.log_file.open("ab") as errors:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "evomerge.search.workers.process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment,
                process_group=0,
            )
        await self.ask(self.setup, lambda done, total: None)

    async def run(self, job: Job, progress: Progress) -> Result:
        found: Result = await self.ask(job, progress)
        return found

    async def ask(self, message: Any, progress: Progress) -> Any:
        """Send a message and wait for its answer."""
        assert self.process is not None, "a worker is started first"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(framed(message))
            await self.process.stdin.drain()
            while True:
                size = struct.unpack("<Q", await self.process.stdout.readexactly(8))[0]
                kind, content = pickle.loads(await self.process.stdout.readexactly(size))
                self.beats += 1
                if kind == "log":
                    self.log(content)
                elif kind == "progress":
                    progress(*content)
                elif kind == "refused":
                    raise EvomergeError(content)
                elif kind == "answer":
                    return content
        except (asyncio.IncompleteReadError, ConnectionError, BrokenPipeError):
            raise Died(await self.ending()) from None

    async def ending(self) -> str:
        """How the process died."""
        assert self.process is not None
        code = await self.process.wait()
        end_group(self.process.pid)  # what a process that was killed leaves behind
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        last = self.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"ended with exit code {code} ({last[0] if last else 'it printed nothing'}; see {self.log_file})"

    async def kill(self) -> None:
        """End the process and its children."""
        if self.process is not None and self.process.returncode is None:
            end_group(self.process.pid)
            await self.process.wait()

    def close(self) -> None:
        """Nothing is left after a kill."""


def one_device(device: str, environment: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """What hides all devices but one from a process, and the name that the one has there.

    Kernels are launched on a process's current device, which is the first, wherever their operands lie; so a process
    sees no other.  The variable must be set before CUDA starts, and counts what is visible here already.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return {}, device
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    names = visible.split(",") if visible else []
    return {"CUDA_VISIBLE_DEVICES": names[int(index)].strip() if names else index}, "cuda"


def framed(message: Any) -> bytes:
    content = pickle.dumps(message)
    return struct.pack("<Q", len(content)) + content


class Channel:
    """The worker's end: answers go out one at a time; when the driver is gone, so is the worker."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self.source, self.sink = source, sink
        self.lock = threading.Lock()
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.said = time.monotonic()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while len(head := self.source.read(8)) == 8:
            self.inbox.put(pickle.loads(self.source.read(struct.unpack("<Q", head)[0])))
        end()  # also in the middle of a job

    def send(self, kind: str, content: Any = None) -> None:
        with self.lock:
            self.sink.write(framed((kind, content)))
            self.sink.flush()
            self.said = time.monotonic()

    def beat(self) -> None:
        if time.monotonic() - self.said >= BEAT:
            self.send("beat")

    def progress(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self.said >= BEAT:
            self.send("progress", (done, total))


def end_group(leader: int) -> None:
    """End a process that leads a group of its own, and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def end() -> None:
    """End this process at once, with its children if they are its own process group."""
    if os.getpgrp() == os.getpid():
        end_group(os.getpid())
    os._exit(0)


def main() -> None:
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print goes to the log file
    channel = Channel(source, sink)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from evomerge.search.workers.remote_evaluator import open_evaluator

    try:
        evaluator = open_evaluator(
            channel.inbox.get(), channel.beat, lambda text: channel.send("log", text), channel.progress
        )
        channel.send("answer")
        while True:
            channel.send("answer", evaluator.run(channel.inbox.get()))
    except EvomergeError as error:
        channel.send("refused", str(error))


if __name__ == "__main__":
    main()
