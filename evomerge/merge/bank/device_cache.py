"""Tensors on a device by key: those that stay there, and those that each thread uses now."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from evomerge.merge.bank.memory import Room
from evomerge.merge.bank.transfer import Transfers

Key = tuple[str, ...]
"""(source, tensor), where an empty source is the base; or (kind, tensor, source) of a measurement."""


class DeviceCache:
    """Tensors by key.  What is read stays on the device while there is room; the rest is used and dropped.

    Threads may share it.
    """

    def __init__(self, device: torch.device, mapped: bool, room: Room, transfers: Transfers | None) -> None:
        """mapped: whether tensors are used where they are mapped, so that `device` holds no copy.

        room: the bytes that may stay.
        transfers: copies on their way, if there are any.
        """
        self.device = device
        self.mapped = mapped
        self.room = room
        self.transfers = transfers
        self.held: dict[Key, Tensor] = {}
        self.lock = threading.Lock()
        self.local = threading.local()

    @property
    def in_use(self) -> dict[Key, Tensor]:
        """Tensors that did not fit and that this thread uses now."""
        if not hasattr(self.local, "in_use"):
            self.local.in_use = {}
        found: dict[Key, Tensor] = self.local.in_use
        return found

    def get(self, key: Key, read: Callable[[], Tensor], in_place: bool = False, may_stay: bool = True) -> Tensor:
        """The tensor of a key: held, in use by this thread, on its way to the device, or read now.

        in_place: whether it takes no memory.
        may_stay: whether it is held if there is room for it.
        """
        for store in (self.held, self.in_use):
            if key in store:
                return store[key]
        tensor = self.transfers.receive(key) if self.transfers else None
        if tensor is None:
            tensor = read()
        with self.lock:
            if key in self.held:  # another thread was faster
                return self.held[key]
            if in_place or (may_stay and self.room.take(tensor.nbytes)):
                self.held[key] = tensor
                return tensor
        self.in_use[key] = tensor
        return tensor

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device."""
        return tensor if self.mapped else tensor.to(self.device, copy=self.device.type == "cpu")
