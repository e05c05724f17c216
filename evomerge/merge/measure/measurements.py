"""The answers to a planner's questions about one tensor (`Measurements`); each is measured once and kept."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.measure.divergence import divergences
from evomerge.merge.measure.gram import row_gram_matrices
from evomerge.merge.measure.magnitudes import Magnitudes, Sizes
from evomerge.merge.measure.scan import Scan
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.measure.sums import summed
from evomerge.merge.methods.measured import Gram
from evomerge.merge.methods.plan import Chance, Plan, SparseBlend
from evomerge.sources.tensor_names import tensor_role

T = TypeVar("T")
MeasurementCache = dict[tuple[Any, ...], Any]
"""What has been measured: (kind, tensor, sources ...) -> value."""


class Tensors(Protocol):
    """What measurements need of the bank: the tensors of base and sources by name."""

    def base(self, name: str) -> Tensor: ...
    def source(self, source: str, name: str) -> Tensor: ...


class Measurements:
    """`methods.measured.Measured` for one tensor: its docstrings say what each method measures."""

    def __init__(
        self,
        tensors: Tensors,
        name: str,
        sources: Sequence[str],
        cache: MeasurementCache,
        mask: Callable[[int, Chance, slice], Tensor] | None = None,
        statistics: Sequence[StatisticsFile] = (),
        scan: Scan | None = None,
        plane: Callable[[tuple[str, ...], Callable[[], Tensor]], Tensor] | None = None,
    ) -> None:
        """
        tensors: read base and sources.
        name: of the tensor.
        sources: the names of those that take part.
        cache: where numbers are kept.
        mask: (source, chance, slice of the flattened tensor) -> 1.0 where the random mask keeps an element.
        statistics: the sources' statistics files, if the method uses any.
        scan: compiled passes, if there are.
        plane: (key, how to compute it) -> a measurement as large as a tensor; the bank keeps these and counts bytes.
        """
        self.plane = plane or self.once
        self.scan = scan or Scan()
        self.statistics = tuple(statistics)
        self.tensors, self.name, self.sources, self.cache, self.mask = tensors, name, tuple(sources), cache, mask
        self.read: dict[int, Tensor] = {}
        # By source: what planners ask for every candidate, found without a key of strings.
        self.ordered: dict[int, Magnitudes] = {}
        self.norms: dict[int, float] = {}
        self.ranked_norms: dict[int, float] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """The kept value of a key; `make` measures it the first time."""
        if key not in self.cache:
            self.cache[key] = make()
        found: T = self.cache[key]
        return found

    @cached_property
    def base(self) -> Tensor:
        """The base's tensor."""
        return self.tensors.base(self.name)

    def source(self, number: int) -> Tensor:
        """A source's tensor."""
        if number not in self.read:
            self.read[number] = self.tensors.source(self.sources[number], self.name)
        return self.read[number]

    @cached_property
    def device(self) -> torch.device:
        return self.base.device

    def sum(self, terms: Callable[[slice], Tensor], rows: int = 1) -> list[float]:
        """`sums.summed` over the tensor."""
        return [float(s) for s in summed(self.elements, terms, rows, self.device)]

    def operands(self) -> list[Tensor]:
        """Base and sources."""
        return [self.base, *map(self.source, range(len(self.sources)))]

    def sizes(self, source: int) -> Sizes:
        """A slice of the flattened tensor -> |d_source| in float32."""
        base, x = self.base, self.source(source)
        return lambda part: (x.reshape(-1)[part].float() - base.reshape(-1)[part].float()).abs_()

    def deltas(self) -> Callable[[slice], list[Tensor]]:
        """A slice of the flattened tensor -> the task vectors in float32."""
        base, *sources = (x.reshape(-1) for x in self.operands())
        return lambda part: [x[part].float() - base[part].float() for x in sources]

    def untouched(self, source: int) -> bool:
        """Whether the source's tensor is the base's own object: an adapter does not change it."""
        return self.source(source) is self.base

    @property
    def count(self) -> int:
        return len(self.sources)

    @cached_property
    def elements(self) -> int:
        return self.base.numel()

    def in_any_order(self, kind: str, measure: Callable[[], NDArray[np.float64]], first: int) -> NDArray[np.float64]:
        """A Gram matrix, or one of each slice, which is measured for one order of the sources only.

        kind: of the matrix.  first: the row of the first source.  The products have the same bits in every order.
        """

        def make() -> NDArray[np.float64]:
            if len(self.sources) < 3:
                return measure()
            order = np.argsort(self.sources, kind="stable")
            kept = ("in order", kind, self.name, *sorted(self.sources))
            rows = np.r_[:first, first + order]
            if kept not in self.cache:
                found = measure()
                self.cache[kept] = found[..., rows[:, None], rows]
                return found
            back = np.argsort(rows)
            return np.ascontiguousarray(self.cache[kept][..., back[:, None], back])

        return self.once((kind, self.name, *self.sources), make)

    @property
    def gram(self) -> Gram:
        return self.in_any_order("gram", lambda: self.scan.gram_matrix(self.operands()), 1)

    @property
    def task_gram(self) -> Gram:
        def measure() -> Gram:
            base, *sources = self.operands()
            return self.scan.gram_matrix(sources, origin=base)

        return self.in_any_order("task gram", measure, 0)

    def row_grams(self, axis: int, of_task_vectors: bool = False) -> NDArray[np.float64]:
        def measure() -> NDArray[np.float64]:
            tensors = self.operands()
            origin = tensors.pop(0) if of_task_vectors else None
            return row_gram_matrices(tensors, axis, origin)

        kind = f"row grams {axis}{' of task vectors' * of_task_vectors}"
        return self.in_any_order(kind, measure, 0 if of_task_vectors else 1)

    @property
    def is_layer_matrix(self) -> bool:
        is_matrix = self.base.ndim == 2
        return is_matrix and tensor_role(self.name).component not in ("embedding", "head")

    @property
    def is_gathered(self) -> bool:
        return bool(self.statistics) and all(g.covers(self.name) for g in self.statistics)

    def fisher_size(self, source: int) -> float:
        return self.statistics[source].size

    def magnitudes(self, source: int) -> Magnitudes:
        """The histogram of |d_source|."""
        key = ("magnitudes", self.name, self.sources[source])
        return self.once(key, lambda: self.scan.magnitudes(self.base, self.source(source)))

    def magnitude(self, source: int, rank: int) -> float:
        ordered = self.ordered.get(source)
        if ordered is None:
            if self.untouched(source):
                return 0.0
            ordered = self.ordered[source] = self.magnitudes(source)
        return ordered.kth(rank, lambda part: self.sizes(source)(part), self.device)

    def l1(self, source: int, chance: Chance | None = None) -> float:
        if chance is None and source in self.norms:
            return self.norms[source]

        def measure() -> float:
            if self.untouched(source):
                return 0.0
            if chance is None:
                return self.scan.l1(self.base, self.source(source))[0]
            sizes, mask = self.sizes(source), self.mask
            assert mask is not None, "nothing gives random masks"
            return self.sum(lambda p: (sizes(p) * mask(source, chance, p)).double()[None])[0]

        if chance is not None:
            return measure()
        self.norms[source] = found = self.once(("l1", self.name, self.sources[source]), measure)
        return found

    def levels(self, source: int) -> Tensor:
        """The levels of a `Chance`, uint8 of the tensor's shape."""

        def measure() -> Tensor:
            base, x = self.base, self.source(source)
            return self.scan.levels(base, x) if x is not base else no_levels(base)

        return self.plane(("levels", self.name, self.sources[source]), measure)

    def rank_weighted_l1(self, source: int) -> float:
        if source in self.ranked_norms:
            return self.ranked_norms[source]

        def measure() -> float:
            if self.untouched(source):
                return 0.0
            plain, weighted = self.scan.l1(self.base, self.source(source), self.levels(source))
            self.cache.setdefault(("l1", self.name, self.sources[source]), plain)  # planners ask for it too
            return weighted

        self.ranked_norms[source] = found = self.once(("rank weighted l1", self.name, self.sources[source]), measure)
        return found

    def variance(self, share: float) -> float | None:
        deltas = self.deltas()

        def sizes(part: slice) -> Tensor:
            return elementwise.variance(deltas(part))

        def measure() -> tuple[Magnitudes, int]:
            found = Magnitudes.of(self.elements, sizes, self.device)
            return found, self.elements - found.zeros(sizes, self.device)

        ordered, varying = self.once(("variances", self.name, *self.sources), measure)
        k = min(varying, int(np.float32(varying) * np.float32(share)))  # mergekit counts in float32
        return ordered.kth(k, sizes, self.device) if k else None

    def mean_squares(self, floor: float) -> tuple[float, ...]:
        deltas = self.deltas()

        def squares(part: slice) -> Tensor:
            found = deltas(part)
            mask = (elementwise.variance(found) >= floor).double()
            return torch.stack([d.double().square() * mask for d in found])

        return tuple(s / max(1, self.elements) for s in self.sum(squares, len(self.sources)))

    def divergences(self) -> Tensor:
        """KL of each row of the first source from the base, (..., 1) float32."""
        key = ("divergences", self.name, self.sources[0])
        return self.once(key, lambda: divergences(self.operands()[1], self.operands()[0]))

    def importance(self) -> float:
        def measure() -> float:
            n, sizes = self.elements, self.sizes(0)
            if n == 0:
                return 0.0
            rows = self.divergences().expand(self.base.shape).reshape(-1)

            def scores(part: slice) -> Tensor:
                return sizes(part) * rows[part]

            ordered = Magnitudes.of(n, scores, self.device)
            ranks = (n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75))
            low, median, high = (np.float32(ordered.kth(k, scores, self.device)) for k in ranks)
            with np.errstate(over="ignore", invalid="ignore"):
                return float(median + np.float32(1.5) * (high - low))

        return self.once(("importance", self.name, self.sources[0]), measure)

    def changed(self, epsilon: float) -> tuple[tuple[int, int], ...]:
        n, bound = len(self.sources), float(np.float32(epsilon))

        def measure() -> list[float]:
            deltas = self.deltas()

            def counts(part: slice) -> Tensor:
                moved = torch.stack([d.abs() > bound for d in deltas(part)])
                alone = moved & (moved.sum(0) == 1)
                return torch.cat([alone, moved & ~alone]).double()

            return self.sum(counts, 2 * n)

        found = self.once(("changed", self.name, epsilon, *self.sources), measure)
        return tuple((int(found[i]), int(found[n + i])) for i in range(n))

    def planes(self, plan: Plan) -> list[Tensor]:
        """What a plan's mask needs besides the tensors: the levels of each source, or the row factors of the first."""
        if isinstance(plan, SparseBlend) and plan.keep == "importance":
            return [self.divergences()]
        if isinstance(plan, SparseBlend) and plan.keep == "rank":
            assert plan.chances is not None, "ranks without chances"
            return [self.levels(i) if c.step else no_levels(self.base) for i, c in enumerate(plan.chances)]
        return []


def no_levels(like: Tensor) -> Tensor:
    """Levels for a chance without a step, which are not read: of a tensor's shape, but one number in memory."""
    return torch.zeros((), dtype=torch.uint8, device=like.device).expand(like.shape)
