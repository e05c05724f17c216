"""Work on files from outside ends: a limit on the processor time of templates, and a trial of the tokenizer.

The chat template that a model brings and the templates of a task are programs, and a tokenizer has regular expressions.
A library in C or Rust cannot be interrupted, so the tokenizer first gets short texts, then longer ones.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from evomerge.errors import EvomergeError, without_panics

TRIAL_SECONDS = 2.0  # for one of the texts below; a usual tokenizer takes a millisecond
TRIAL_LENGTHS = (8, 32, 128, 512)
TRIAL_TEXTS = ("a", " ", "1", "aB c1. ", "\n", "\u00e9")
LOOK = 0.25  # seconds between two looks at the clock


class TooLong(Exception):
    """The work took longer than it may."""


class TimeLimit:
    """Within the context, work in Python ends with `TooLong` when this thread has computed for too long.

    Time in which the machine sleeps or computes for others is not counted.

    seconds: of this thread's processor time, from the beginning or the last `again`.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.thread = threading.get_ident()
        own = hasattr(time, "pthread_getcpuclockid")
        self.clock = time.pthread_getcpuclockid(self.thread) if own else time.CLOCK_PROCESS_CPUTIME_ID
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.again()

    def again(self) -> None:
        """The next piece of work begins."""
        self.began = time.clock_gettime(self.clock)

    def __enter__(self) -> "TimeLimit":
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.ended.set()

    def watch(self) -> None:
        """Look at the clock until the context ends."""
        while not self.ended.wait(LOOK):
            with self.lock:  # so that nothing is raised after the context
                late = time.clock_gettime(self.clock) - self.began > self.seconds
                if late and not self.ended.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(TooLong))
                    return


def try_tokenizer(encode: Callable[[str], object]) -> None:
    """Tokenise short texts.  EvomergeError if one takes too long; other errors are left to the real texts."""
    for length in TRIAL_LENGTHS:
        for text in TRIAL_TEXTS:
            began = time.thread_time()
            with suppress(Exception), without_panics():
                encode((text * length)[:length])
            if (seconds := time.thread_time() - began) > TRIAL_SECONDS:
                raise EvomergeError(
                    f"the model's tokenizer takes {seconds:.0f} s for a text of {length} characters; the regular "
                    "expressions in its tokenizer.json are not fit for use"
                )
