"""How many bytes a bank may use, on the device and on the host, and exact counters of bytes (`Room`)."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from evomerge.system import physical_memory

HELD_BYTES = 4 << 30  # on a CPU, for computed tensors (adapters, nested recipes); beyond, they are computed when needed
EVALUATION = 0.15  # share of a device for activations, keys and values, logits
SCRATCH = 1 << 30  # bytes of a device that kernels and measurements need besides their operands
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Share:
    """How many processes like this one use the same device, and the same host."""

    device: int = 1
    host: int = 1


class Room:
    """A number of bytes that can be taken.  Threads may share one."""

    def __init__(self, size: int) -> None:
        """size: bytes."""
        self.size = size
        self.taken = 0
        self.lock = threading.Lock()

    @property
    def left(self) -> int:
        """Bytes that are not taken."""
        return self.size - self.taken

    def take(self, size: int) -> bool:
        """Take `size` bytes; False, and nothing is taken, if fewer are left."""
        with self.lock:
            if size > self.left:
                return False
            self.taken += size
            return True


def default_capacity(device: torch.device, coming: int = 0, share: Share | None = None) -> int:
    """Bytes that a bank may hold on a device.

    coming: bytes that will also be needed there: a live model that is not loaded yet, operands on their way.
    share: how many processes use the device.
    """
    if device.type != "cuda":
        return HELD_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return device_capacity(free, total, coming, (share or Share()).device)


def device_capacity(free: int, total: int, coming: int, processes: int) -> int:
    """Bytes that a bank may hold on a device with `free` of `total` bytes that a number of processes share.

    Each process gets its part of the total, even if it is the first and all is still free.
    """
    own = min(free, total // processes)
    return max(0, int(own * (1 - EVALUATION)) - coming - SCRATCH)


def pinned_capacity(memory: int, processes: int) -> int:
    """Bytes that a process may pin; all processes together may pin half of the host's memory."""
    return memory // 2 // processes


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the smallest limit of its control groups."""
    return min([physical_memory(), *group_limits()])


def group_limits(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """The memory limits of a process's control groups and of the groups above them in bytes, of versions 1 and 2.

    membership: a file of lines `hierarchy:controllers:path`.  In a container the path may be that of the host, where
    there is no such folder; then the limits are at the root.
    https://docs.kernel.org/admin-guide/cgroup-v2.html (`memory.max`).
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
            if text.isdecimal():  # `max` means no limit
                yield int(text)
            if folder == top:
                break
