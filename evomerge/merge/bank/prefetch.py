"""Which copies to the device were begun for which output tensor, in the order in which these are merged."""

from collections.abc import Callable, Mapping

from torch import Tensor

from evomerge.merge.bank.device_cache import Key
from evomerge.merge.bank.transfer import Transfers


class Prefetch:
    """Copies that were begun before the output tensors that need them."""

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self.begun: dict[str, list[Key]] = {}
        """Output tensor -> what was sent for it."""

    def send(self, name: str, wanted: Mapping[Key, Callable[[], Tensor]], size: int) -> bool:
        """Begin to copy `wanted` (key -> how to read it; `size` bytes) for the output tensor `name`.

        False, and nothing is sent, if as much is on its way as may be.
        """
        wanted = {key: read for key, read in wanted.items() if key not in self.transfers.coming}
        if wanted and not self.transfers.fits(size):
            return False
        for key, read in wanted.items():
            self.transfers.send(key, read)
        self.begun[name] = list(wanted)
        return True

    def drop_before(self, name: str) -> None:
        """Drop what was sent for tensors before `name` and not used."""
        while name in self.begun and (earlier := next(iter(self.begun))) != name:
            self.transfers.drop(self.begun.pop(earlier))
        self.transfers.finish()

    def drop_all(self) -> None:
        """Drop everything that was sent and not used."""
        for keys in self.begun.values():
            self.transfers.drop(keys)
        self.transfers.finish()
        self.begun.clear()
