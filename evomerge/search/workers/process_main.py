"""What runs in a worker's process: `python -m evomerge.search.workers.process_main`, started by `process_worker.py`.

It reads a setup and then jobs from standard input, and writes results to standard output.  When the driver's end of the
pipe closes, the process ends at once with its children, also in the middle of a job.
"""

import os
import pickle
import queue
import signal
import struct
import threading
import time
from typing import Any, BinaryIO

from evomerge.errors import EvomergeError
from evomerge.search.workers.process_worker import encode_message
from evomerge.system import kill_own_group

HEARTBEAT = 1.0  # seconds between two heartbeats, at least


class DriverConnection:
    """The worker's side of the pipes to the driver.

    A thread reads messages into `inbox`; it ends this process when the driver has closed its end.

    source: messages from the driver.  sink: messages to the driver.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self.source, self.sink = source, sink
        self.lock = threading.Lock()
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.last_sent = time.monotonic()
        threading.Thread(target=self.receive, daemon=True).start()

    def receive(self) -> None:
        """Put messages into the inbox until the driver closes the pipe; then end this process."""
        while len(head := self.source.read(8)) == 8:
            self.inbox.put(pickle.loads(self.source.read(struct.unpack("<Q", head)[0])))
        exit_with_children()

    def send(self, kind: str, content: Any = None) -> None:
        """Send one message to the driver."""
        with self.lock:
            self.sink.write(encode_message((kind, content)))
            self.sink.flush()
            self.last_sent = time.monotonic()

    def heartbeat(self) -> None:
        """Tell the driver that this worker is alive, at most once a second."""
        if time.monotonic() - self.last_sent >= HEARTBEAT:
            self.send("heartbeat")

    def progress(self, done: int, total: int) -> None:
        """Send the number of batches done, at most once a second, and at the end."""
        if done == total or time.monotonic() - self.last_sent >= HEARTBEAT:
            self.send("progress", (done, total))


def exit_with_children() -> None:
    """End this process at once, and its children if it leads a process group."""
    kill_own_group()
    os._exit(0)


def main() -> None:
    """Open the evaluator, then do jobs until the driver ends this process."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print goes to the log file
    driver = DriverConnection(source, sink)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from evomerge.search.workers.remote_evaluator import open_evaluator

    try:
        evaluator = open_evaluator(
            driver.inbox.get(), driver.heartbeat, lambda text: driver.send("log", text), driver.progress
        )
        driver.send("answer")
        while True:
            driver.send("answer", evaluator.run(driver.inbox.get()))
    except EvomergeError as error:
        driver.send("refused", str(error))


if __name__ == "__main__":
    main()
