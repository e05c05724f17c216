"""The k-th largest magnitude without a sort: a histogram (`Magnitudes`)."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merge.measure.sums import CPU, chunk_on, chunks

EDGES = (np.arange(1 << 15, dtype=np.int32) << 16).view(np.float32)
"""The lower edge of each bin of `Magnitudes`."""
Sizes = Callable[[slice], Tensor]
"""A slice of a flattened tensor -> the magnitudes of its elements in float32."""


class Magnitudes:
    """A histogram of magnitudes, from which the exact k-th largest is found without a sort.

    The histogram over the upper 16 bits of the float32 magnitudes (32,768 bins, in the order of the magnitudes) gives
    the bin of the k-th largest, and the elements of that bin its exact value.  Almost every difference of bfloat16
    checkpoints is a bfloat16 number, that is, the lower edge of its bin; the few others are stored, so that the tensor
    is not read again.  If they are not few, the magnitudes are computed again for each question.
    """

    def __init__(self, elements: int, counts: NDArray[np.int64], odd: NDArray[np.int32] | None) -> None:
        """
        elements: how many magnitudes there are.
        counts: of the magnitudes in each bin, (32768,).
        odd: the bits of those that are not their bin's lower edge; None if they are not few (`few_of`).
        """
        filled = np.flatnonzero(counts != 0)  # of booleans it takes a tenth of the time
        self.elements = elements
        self.lowest, self.highest = (int(filled[0]), int(filled[-1])) if len(filled) else (0, 0)
        self.from_top = counts[self.lowest : self.highest + 1][::-1].cumsum()  # entry r: in the r + 1 highest bins
        self.odd = None if odd is None else np.sort(odd)

    @classmethod
    def of(cls, elements: int, sizes: Sizes, device: torch.device = CPU) -> "Magnitudes":
        """Measure magnitudes with torch.

        sizes: a slice of the flattened tensor -> its magnitudes.
        device: of the magnitudes.
        """
        counts = torch.zeros(1 << 15, dtype=torch.int64)
        odd, few = [np.zeros(0, dtype=np.int32)], True
        for part in chunks(elements, chunk_on(device)):
            bits = bits_of(sizes(part))
            counts += torch.bincount(bits >> 16, minlength=1 << 15).cpu()
            if few:
                odd.append(between_bins(bits))
                few = sum(map(len, odd)) <= few_of(part.stop)
        return cls(elements, counts.numpy(), np.concatenate(odd) if few else None)

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> "Magnitudes":
        """The object whose `state` this is."""
        self = cls.__new__(cls)
        self.from_top, self.odd = state["from_top"].numpy(), state["odd"].numpy() if "odd" in state else None
        self.elements, self.lowest, self.highest = map(int, state["range"])
        return self

    def state(self) -> dict[str, Tensor]:
        """What `restored` needs, as tensors that a file can hold."""
        limits = torch.tensor([self.elements, self.lowest, self.highest])
        found = {"from_top": torch.from_numpy(self.from_top), "range": limits}
        return found if self.odd is None else found | {"odd": torch.from_numpy(self.odd)}

    def kth(self, k: int, sizes: Sizes, device: torch.device = CPU) -> float:
        """The k-th largest magnitude, 1 <= k <= elements.  sizes, device: as given to `of`."""
        rank = int(self.from_top.searchsorted(k))
        above = self.from_top.item(rank - 1) if rank else 0
        wanted = self.highest - rank
        if self.odd is not None:
            first, until = self.odd_bins
            number = wanted - first
            last = until.item(number + 1) if 0 <= number < len(until) - 1 else 0
            if not last or k - above > last - until.item(number):  # it is the lower edge of its bin
                return EDGES.item(wanted)
            return float(self.odd[last - (k - above)].view(np.float32))
        parts = (bits_of(sizes(part)) for part in chunks(self.elements, chunk_on(device)))
        inside = torch.cat([bits[(bits >> 16) == wanted] for bits in parts])
        kth = inside.kthvalue(inside.numel() - (k - above) + 1).values
        return float(kth.view(torch.float32))

    @cached_property
    def odd_bins(self) -> tuple[int, NDArray[np.int32]]:
        """The lowest bin with stored values; and how many stored values are below this bin, and below the end of each
        bin from it on, up to the highest."""
        assert self.odd is not None, "they are too many"
        lowest, highest = (int(self.odd[0]) >> 16, int(self.odd[-1]) >> 16) if len(self.odd) else (0, -1)
        edges = (np.arange(lowest, highest + 2, dtype=np.int64) << 16) - 1
        return lowest, self.odd.searchsorted(edges.astype(np.int32), "right").astype(np.int32)

    def zeros(self, sizes: Sizes, device: torch.device = CPU) -> int:
        """How many magnitudes are exactly 0.  sizes, device: as given to `of`."""
        if self.lowest > 0:
            return 0
        if self.odd is None:
            return sum(int((sizes(part) == 0).sum()) for part in chunks(self.elements, chunk_on(device)))
        lowest_bin = int(self.from_top[-1] - (self.from_top[-2] if len(self.from_top) > 1 else 0))
        return lowest_bin - int((self.odd < 1 << 16).sum())


def few_of(elements: int) -> int:
    """How many magnitudes between the bins' edges are few enough to be stored."""
    return 1024 + elements // 16


def bits_of(sizes: Tensor) -> Tensor:
    """The bits of magnitudes as int32, in the order of the magnitudes."""
    return sizes.view(torch.int32) & 0x7FFFFFFF  # NaN may come with a sign


def between_bins(bits: Tensor) -> NDArray[np.int32]:
    """Those that are not their bin's lower edge; numpy finds a few among many much faster than torch."""
    if bits.device.type != "cpu":
        apart: NDArray[np.int32] = bits[(bits & 0xFFFF) != 0].cpu().numpy()
        return apart
    found: NDArray[np.int32] = bits.numpy()[np.flatnonzero((bits & 0xFFFF).numpy() != 0)]
    return found
