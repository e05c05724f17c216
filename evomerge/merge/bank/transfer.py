"""Copies of host tensors to a device that run beside the work there."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from evomerge.merge.bank.memory import Room


class Transfers:
    """Tensors on their way to a device, copied from pinned memory on a stream of their own.

    On a CPU the same steps are plain copies.  Tensors on their way, and those that unfinished work on the device uses,
    together stay within `window` bytes; a single larger one may go when nothing else is on its way.
    """

    def __init__(self, device: torch.device, window: int, pinned: Room) -> None:
        """pinned: the bytes that may be pinned; what does not fit is copied from pageable memory."""
        self.device = device
        self.window = window
        self.room = pinned
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.pinned: dict[Hashable, Tensor] = {}
        self.coming: dict[Hashable, tuple[Tensor, torch.Event | None]] = {}
        self.working: deque[tuple[torch.Event | None, int]] = deque()
        self.taken = 0  # bytes taken since the last `finish`

    def fits(self, size: int) -> bool:
        """Whether `size` bytes may be sent now; it waits for work that the device has begun, if that helps."""
        waiting = sum(x.nbytes for x, _ in self.coming.values()) + self.taken
        while self.working and waiting + sum(n for _, n in self.working) + size > self.window:
            event, _ = self.working.popleft()
            if event is not None:
                event.synchronize()
        return waiting == 0 or waiting + size <= self.window

    def send(self, key: Hashable, read: Callable[[], Tensor]) -> None:
        """Begin to copy the tensor that `read` returns."""
        host = self.on_host(key, read)
        if self.stream is None:
            self.coming[key] = host.clone(), None
            return
        with torch.cuda.stream(self.stream):
            tensor = host.to(self.device, non_blocking=host.is_pinned())
            self.coming[key] = tensor, self.stream.record_event()

    def receive(self, key: Hashable) -> Tensor | None:
        """The tensor that was sent under this key, for work that begins from now on; None if there is none."""
        if key not in self.coming:
            return None
        tensor, event = self.coming.pop(key)
        self.taken += tensor.nbytes
        if event is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(event)
            tensor.record_stream(here)
        return tensor

    def drop(self, keys: Iterable[Hashable]) -> None:
        """Drop what was sent under these keys and not received."""
        for key in keys:
            self.coming.pop(key, None)

    def finish(self) -> None:
        """Tell that the work that needs the received tensors has been given to the device."""
        if self.taken:
            event = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
            self.working.append((event, self.taken))
            self.taken = 0

    def on_host(self, key: Hashable, read: Callable[[], Tensor]) -> Tensor:
        """A tensor in pinned memory, from which the device copies by itself; elsewhere if there is no room for it."""
        if key in self.pinned:
            return self.pinned[key]
        host = read().contiguous()
        if self.stream is None or not self.room.take(pinned_size(host.nbytes)):
            return host
        self.pinned[key] = host.pin_memory()
        return self.pinned[key]


def pinned_size(size: int) -> int:
    """Bytes that torch takes to pin so many: its allocator rounds up to a power of two."""
    return 1 << max(0, size - 1).bit_length()
