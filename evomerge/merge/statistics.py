"""What planners and kernels need to know of the sources beforehand: dot products and trimming thresholds."""

import math

import numpy as np
import torch

from evomerge.merge.plan import Gram

CHUNK = 1 << 20


def dot(x: torch.Tensor, y: torch.Tensor) -> float:
    """The dot product of two flattened tensors in float64.

    Summed by halving (v[:n/2] + v[n/2:]) in a fixed order, so that every machine gets the same bits; a
    library's sum would depend on its vector width and threads.
    """
    x, y = x.reshape(-1), y.reshape(-1)
    total = 0.0
    for start in range(0, x.numel(), CHUNK):
        products = x[start : start + CHUNK].double() * y[start : start + CHUNK].double()
        size = products.numel()
        while size > 1:
            half = size // 2
            products[:half].add_(products[size - half : size])
            size -= half
        total += float(products[0]) if products.numel() else 0.0
    return total


def gram_matrix(tensors: list[torch.Tensor]) -> Gram:
    """All pairwise dot products, (len(tensors), len(tensors)) float64."""
    n = len(tensors)
    gram = np.zeros((n, n))
    for i in range(n):
        for j in range(i, n):
            gram[i, j] = gram[j, i] = dot(tensors[i], tensors[j])
    return gram


def kept_count(density: float, elements: int) -> int:
    """How many elements a trim at `density` keeps: max(1, floor(density n)), mergekit's rule."""
    return max(1, math.floor(density * elements))


class Magnitudes:
    """The sizes of a task vector's elements, ready for "what is the k-th largest?" without a sort.

    A histogram over the upper 16 bits of |d| as a float32 (32,768 bins, in the order of the magnitudes) finds the
    bin; a second look at the elements of that bin alone gives the exact value.
    """

    def __init__(self, source: torch.Tensor, base: torch.Tensor) -> None:
        self.source, self.base = source.reshape(-1), base.reshape(-1)
        counts = torch.zeros(1 << 15, dtype=torch.int64, device=base.device)
        for start in range(0, self.base.numel(), CHUNK):
            counts += torch.bincount(self.pattern(start) >> 16, minlength=1 << 15)
        self.from_top = counts.flip(0).cumsum(0).cpu()  # how many are in the r + 1 highest bins

    def pattern(self, start: int) -> torch.Tensor:
        """|d| of one chunk as the integers of their float32 bits, which have the same order."""
        part = slice(start, start + CHUNK)
        return (self.source[part].float() - self.base[part].float()).abs().view(torch.int32)

    def threshold(self, density: float) -> float:
        """The k-th largest magnitude, k = max(1, floor(density n)); 0 if the trim keeps all."""
        elements = self.base.numel()
        k = kept_count(density, elements)
        if k >= elements:
            return 0.0
        rank = int(torch.searchsorted(self.from_top, k))
        above = int(self.from_top[rank - 1]) if rank else 0
        wanted = (1 << 15) - 1 - rank
        found = []
        for start in range(0, elements, CHUNK):
            bits = self.pattern(start)
            found.append(bits[(bits >> 16) == wanted])
        inside = torch.cat(found)
        kth = inside.kthvalue(inside.numel() - (k - above) + 1).values
        return float(kth.view(torch.float32))
