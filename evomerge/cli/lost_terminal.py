"""A search goes on when its terminal, or the program that its output is piped to, is gone."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Output:
    """A text stream that drops what cannot be written any more.

    stream: what is written to while that is possible.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with self.dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send on what was written, or drop it."""
        with self.dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def dropping(self) -> Iterator[None]:
        """Within the context, an error means that nobody reads any more: from then on the stream leads to nowhere."""
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def terminal_may_go() -> Iterator[None]:
    """Within the context, output that nobody can read is dropped, and the end of the terminal (SIGHUP) ends nothing."""
    before = sys.stdout, sys.stderr
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    handler = hangup and signal.signal(hangup, signal.SIG_IGN)
    sys.stdout, sys.stderr = (s and Output(s) for s in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
        if hangup is not None:
            signal.signal(hangup, handler)
