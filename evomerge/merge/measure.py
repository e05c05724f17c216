"""Measure tensors for planners: each number once, kept for the next plan, and for the next run beside this one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merge import kernels, statistics
from evomerge.merge.gathered import Gathered
from evomerge.merge.plan import Chance, Gram
from evomerge.merge.statistics import Magnitudes, summed
from evomerge.sources.anatomy import place

T = TypeVar("T")
Kept = dict[tuple[Any, ...], Any]
"""What has been measured: (kind, tensor, sources ...) -> its value."""


class Tensors(Protocol):
    """Base and sources by tensor name, as the bank gives them."""

    def base(self, name: str) -> Tensor: ...
    def source(self, source: str, name: str) -> Tensor: ...


class Measurements:
    """`Measured`, for the tensor `name` of a base and the sources."""

    def __init__(
        self,
        tensors: Tensors,
        name: str,
        sources: Sequence[str],
        kept: Kept,
        mask: Callable[[int, Chance, slice], Tensor] | None = None,
        gathered: Sequence[Gathered] = (),
    ) -> None:
        """mask: (source, chance, slice of the flattened tensor) -> 1.0 where the random mask keeps.

        gathered: the sources' statistics, if the method uses them.
        """
        self.gathered = tuple(gathered)
        self.tensors, self.name, self.sources, self.kept, self.mask = tensors, name, tuple(sources), kept, mask

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found

    def operands(self) -> list[Tensor]:
        """Base and sources."""
        return [self.tensors.base(self.name), *(self.tensors.source(s, self.name) for s in self.sources)]

    def sizes(self, source: int) -> Callable[[slice], Tensor]:
        """A slice of the flattened tensor -> |d_source| in float32."""
        base = self.tensors.base(self.name).reshape(-1)
        x = self.tensors.source(self.sources[source], self.name).reshape(-1)
        return lambda part: (x[part].float() - base[part].float()).abs_()

    @property
    def elements(self) -> int:
        return self.tensors.base(self.name).numel()

    @property
    def gram(self) -> Gram:
        return self.once(("gram", self.name, *self.sources), lambda: statistics.gram_matrix(self.operands()))

    @property
    def source_count(self) -> int:
        return len(self.sources)

    @property
    def is_layer_matrix(self) -> bool:
        is_matrix = self.tensors.base(self.name).ndim == 2
        return is_matrix and place(self.name).component not in ("embedding", "head")

    @property
    def is_gathered(self) -> bool:
        return bool(self.gathered) and all(g.covers(self.name) for g in self.gathered)

    def fisher_size(self, source: int) -> float:
        return self.gathered[source].size

    def row_grams(self, axis: int) -> NDArray[np.float64]:
        key = ("row grams", self.name, axis, *self.sources)
        return self.once(key, lambda: statistics.row_gram_matrices(self.operands(), axis))

    def magnitudes(self, source: int) -> Magnitudes:
        key = ("magnitudes", self.name, self.sources[source])
        return self.once(key, lambda: Magnitudes(self.elements, self.sizes(source)))

    def magnitude(self, source: int, rank: int) -> float:
        if rank >= self.elements:
            return 0.0
        key = ("magnitude", self.name, self.sources[source], rank)
        return self.once(key, lambda: self.magnitudes(source).kth(rank))

    def l1(self, source: int, chance: Chance | None = None) -> float:
        sizes = self.sizes(source)
        if chance is None:
            key = ("l1", self.name, self.sources[source])
            return self.once(key, lambda: float(summed(self.elements, lambda p: sizes(p).double()[None])[0]))
        mask = self.mask
        assert mask is not None, "a random mask needs its keys"
        return float(summed(self.elements, lambda p: (sizes(p) * mask(source, chance, p)).double()[None])[0])

    def levels(self, source: int) -> Tensor:
        """uint8, of the tensor's shape; see `Chance`."""
        base, x = self.tensors.base(self.name), self.tensors.source(self.sources[source], self.name)
        key = ("levels", self.name, self.sources[source])
        return self.once(key, lambda: statistics.rank_levels(x, base))

    def rank_weighted_l1(self, source: int) -> float:
        sizes, levels = self.sizes(source), self.levels(source).reshape(-1)
        key = ("rank weighted l1", self.name, self.sources[source])

        def measure() -> float:
            terms = summed(self.elements, lambda p: (sizes(p).double() * ((levels[p].double() + 0.5) / 256))[None])
            return float(terms[0])

        return self.once(key, measure)

    def deltas(self, part: slice) -> list[Tensor]:
        base, *sources = (x.reshape(-1)[part].float() for x in self.operands())
        return [x - base for x in sources]

    def variance(self, share: float) -> float:
        key = ("variances", self.name, *self.sources)
        sizes = self.once(key, lambda: Magnitudes(self.elements, lambda p: kernels.variance(self.deltas(p))))
        zeros = sizes.zeros
        k = int((self.elements - zeros) * share)
        return sizes.kth(k) if k else float("inf")

    def mean_squares(self, floor: float) -> tuple[float, ...]:
        def squares(part: slice) -> Tensor:
            deltas = self.deltas(part)
            mask = (kernels.variance(deltas) >= floor).double()
            return torch.stack([d.double().square() * mask for d in deltas])

        key = ("mean squares", self.name, floor, *self.sources)
        sums = self.once(key, lambda: summed(self.elements, squares, len(self.sources)))
        return tuple(float(s) / max(1, self.elements) for s in sums)

    def divergences(self) -> Tensor:
        """KL of each row of the first source from the base, (..., 1) float32."""
        base, x = self.operands()[:2]
        return self.once(("divergences", self.name, self.sources[0]), lambda: statistics.divergences(x, base))

    def importance(self) -> float:
        def measure() -> float:
            base, sizes = self.tensors.base(self.name), self.sizes(0)
            rows = self.divergences().expand(base.shape).reshape(-1)
            ordered = Magnitudes(self.elements, lambda p: sizes(p) * rows[p])
            last = self.elements - 1
            low, median, high = (ordered.kth(self.elements - int(q * last)) for q in (0.25, 0.5, 0.75))
            return float(np.float32(median) + np.float32(1.5) * (np.float32(high) - np.float32(low)))

        return self.once(("importance", self.name, self.sources[0]), measure)

    def changed(self, epsilon: float) -> tuple[tuple[int, int], ...]:
        bound = float(np.float32(epsilon))

        def counts(part: slice) -> Tensor:
            moved = torch.stack([(d.abs() > bound) for d in self.deltas(part)])
            alone = moved & (moved.sum(0) == 1)
            return torch.cat([alone, moved & ~alone]).double()

        n = len(self.sources)
        found = self.once(("changed", self.name, epsilon, *self.sources), lambda: summed(self.elements, counts, 2 * n))
        return tuple((int(found[i]), int(found[n + i])) for i in range(n))
