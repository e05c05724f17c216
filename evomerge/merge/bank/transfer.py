"""Copies of host tensors to the device that run beside the work there."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from evomerge.merge.bank.memory import Room


class Transfers:
    """Tensors on their way to a device, on a stream of their own, out of pinned memory.

    On a CPU the same steps are plain copies.  What is on its way, and what was taken by work that the device has not
    finished, together stay within `window` bytes; one item at a time may be larger.
    """

    def __init__(self, device: torch.device, window: int, pinned: Room) -> None:
        """pinned: the bytes that may be pinned; what does not fit is copied from where it lies."""
        self.device = device
        self.window = window
        self.room = pinned
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.pinned: dict[Hashable, Tensor] = {}
        self.coming: dict[Hashable, tuple[Tensor, torch.Event | None]] = {}
        self.working: deque[tuple[torch.Event | None, int]] = deque()
        self.taken = 0  # bytes taken since the last `finish`

    def fits(self, size: int) -> bool:
        """Whether so many bytes may be sent now; it waits for work that the device has begun."""
        waiting = sum(x.nbytes for x, _ in self.coming.values()) + self.taken
        while self.working and waiting + sum(n for _, n in self.working) + size > self.window:
            event, _ = self.working.popleft()
            if event is not None:
                event.synchronize()
        return waiting == 0 or waiting + size <= self.window

    def send(self, key: Hashable, read: Callable[[], Tensor]) -> None:
        """Begin to copy what `read` gives."""
        host = self.on_host(key, read)
        if self.stream is None:
            self.coming[key] = host.clone(), None
            return
        with torch.cuda.stream(self.stream):
            tensor = host.to(self.device, non_blocking=host.is_pinned())
            self.coming[key] = tensor, self.stream.record_event()

    def receive(self, key: Hashable) -> Tensor | None:
        """What was sent under this key, to be used by work that begins from now on; None if nothing was."""
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
        """Let go of what was sent and not received."""
        for key in keys:
            self.coming.pop(key, None)

    def finish(self) -> None:
        """The work that needs what was received has been given to the device."""
        if self.taken:
            event = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
            self.working.append((event, self.taken))
            self.taken = 0

    def on_host(self, key: Hashable, read: Callable[[], Tensor]) -> Tensor:
        """A tensor where the device can fetch it by itself, as long as there is room for it."""
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
