"""A limit on the memory that this process may add while it works on files from outside.

On Linux the kernel then refuses more (RLIMIT_DATA), which Python shows as MemoryError; a library in Rust ends the
process.  Elsewhere there is no limit.
"""

import os
import threading
from pathlib import Path
from types import TracebackType

from evomerge.system import resource

ROOM = 4 << 30  # bytes; the prompt of an item takes some megabytes
STATM = Path("/proc/self/statm")  # exists on Linux, where alone RLIMIT_DATA counts all memory that can be written to
SIZE, DATA = 0, 5  # its places of the pages of address space, and of those that count


class MemoryLimit:
    """Within the context, the process may hold at most ROOM bytes more than at its beginning or the last `again`.

    The limit is of the whole process: what other threads take counts too, and of several contexts at once, the one that
    began or called `again` last sets it.  Address space that is only reserved, as CUDA does, does not count.
    """

    lock = threading.Lock()
    open = 0  # contexts in this process
    before = (0, 0)  # the limits, soft and hard, that were there before the first of them

    def __init__(self) -> None:
        self.statm: int | None = None  # a handle of the file; None where there is no limit
        self.is_lowest = False  # whether a limit from outside, if there is one, leaves more room than this one

    def __enter__(self) -> "MemoryLimit":
        if resource is None or not STATM.exists():
            return self
        self.statm = os.open(STATM, os.O_RDONLY)
        with self.lock:
            if MemoryLimit.open == 0:
                MemoryLimit.before = resource.getrlimit(resource.RLIMIT_DATA)
            MemoryLimit.open += 1
        self.again()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if resource is None or self.statm is None:
            return
        os.close(self.statm)
        with self.lock:
            MemoryLimit.open -= 1
            if MemoryLimit.open == 0:
                resource.setrlimit(resource.RLIMIT_DATA, self.before)

    def again(self) -> None:
        """The next piece of work begins."""
        if resource is None or self.statm is None:
            return
        pages = os.pread(self.statm, 200, 0).split()
        size, held = (int(pages[n]) * resource.getpagesize() for n in (SIZE, DATA))
        with self.lock:
            soft, hard = self.before
            new = held + ROOM if soft == resource.RLIM_INFINITY else min(soft, held + ROOM)
            resource.setrlimit(resource.RLIMIT_DATA, (new, hard))
        others = (soft, held), (resource.getrlimit(resource.RLIMIT_AS)[0], size)
        self.is_lowest = all(limit == resource.RLIM_INFINITY or limit - used > ROOM for limit, used in others)
