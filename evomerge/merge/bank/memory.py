"""How much memory a bank may take, of the device and of the host; and rooms whose bytes are counted exactly."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

HELD_BYTES = 4 << 30  # on a CPU: computed tensors (adapters, nested recipes) kept; the others are computed when needed
EVALUATION = 0.15  # of a device: activations, keys and values, logits
SCRATCH = 1 << 30  # of a device: what kernels and measurements need beside their operands
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Share:
    """How many processes like this one use the same device, and the same machine."""

    device: int = 1
    host: int = 1


class Room:
    """So many bytes to be given out; threads may share one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.taken = 0
        self.lock = threading.Lock()

    @property
    def left(self) -> int:
        return self.size - self.taken

    def take(self, size: int) -> bool:
        """Whether there were so many bytes left; they are taken then."""
        with self.lock:
            if size > self.left:
                return False
            self.taken += size
            return True


def default_capacity(device: torch.device, coming: int = 0, share: Share | None = None) -> int:
    """Bytes that a bank may hold on a device.

    coming: bytes that others will need there: a live model that is not loaded yet, operands on their way.
    """
    if device.type != "cuda":
        return HELD_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return device_capacity(free, total, coming, (share or Share()).device)


def device_capacity(free: int, total: int, coming: int, processes: int) -> int:
    """Bytes that a bank may hold, of a device with `free` of `total` bytes that so many processes share.

    Each process gets its part of the whole, even if it is the first and sees everything free.
    """
    own = min(free, total // processes)
    return max(0, int(own * (1 - EVALUATION)) - coming - SCRATCH)


def pinned_capacity(memory: int, processes: int) -> int:
    """Bytes that a process may pin, of a host's memory: half of it is for them all."""
    return memory // 2 // processes


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the least that its control groups allow."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *group_limits()])


def group_limits(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """The memory limits of a process's control groups in bytes, of version 1 and 2, those above them included.

    membership: lines `hierarchy:controllers:path`.  In a container the path may be that of the host, where nothing
    lies; then the limits stand at the root.  https://docs.kernel.org/admin-guide/cgroup-v2.html (`memory.max`).
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            try:
                text = (folder / file).read_text().strip()
            except OSError:
                text = ""
            if text.isdecimal():  # `max` is none
                yield int(text)
            if folder == top:
                break
