"""What planners ask of the sources: dot products, magnitudes, ranks, variances.  Every sum has one fixed order."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merge.methods.plan import Gram

CPU = torch.device("cpu")
LANES = 1 << 14  # partial sums that run along a tensor side by side; those of four models fit a core's cache
SEGMENT = 1 << 22  # elements whose lanes are added up by halving; the segments' sums follow one another
CHUNK = 1 << 17  # elements looked at in one go
CHUNK_ON_ACCELERATOR = 1 << 25  # there every go costs some launches, and a look at its result stops the queue
ABREAST = 8  # segments that an accelerator sums at a time, each in its own lanes; a power of two


def chunks(elements: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, elements)) for start in range(0, elements, size))


def total(lanes: Tensor) -> Tensor:
    """The sum over the last dimension by halving (v[:n/2] + v[n/2:]), which changes `lanes`; a library's own sum
    would depend on its vector width and threads."""
    size = lanes.shape[-1]
    while size > 1:
        half = size // 2
        lanes[..., :half].add_(lanes[..., size - half : size])
        size -= half
    return lanes[..., 0]


def chunk_on(device: torch.device) -> int:
    """Elements looked at in one go on a device."""
    return CHUNK if device.type == "cpu" else CHUNK_ON_ACCELERATOR


def summed(
    elements: int, terms: Callable[[slice], Tensor], rows: int = 1, device: torch.device = CPU
) -> NDArray[np.float64]:
    """The sums of `rows` sequences of float64 terms over a whole tensor, (rows,).

    terms: a slice of the flattened tensor -> (rows, length) float64.  device: where the terms are.
    """
    if device.type != "cpu":
        return summed_abreast(elements, terms, rows)
    sums = np.zeros(rows)
    for segment in chunks(elements, SEGMENT):
        lanes = torch.zeros((rows, min(LANES, segment.stop - segment.start)), dtype=torch.float64)
        for part in chunks(segment.stop - segment.start, LANES):
            found = terms(slice(segment.start + part.start, segment.start + part.stop))
            lanes[:, : found.shape[1]].add_(found)
        sums += total(lanes).numpy()
    return sums


def summed_abreast(elements: int, terms: Callable[[slice], Tensor], rows: int) -> NDArray[np.float64]:
    """`summed` with the same bits, for a device where a launch costs more than a pass: several segments at a time,
    and one look at the results."""
    found = []
    for part in abreast(elements):
        size = part.stop - part.start
        segments, parts, width = lanes_of(size)
        each = terms(part)  # (rows, size)
        if each.shape[1] < segments * parts * width:  # adding zero changes no lane
            each = torch.nn.functional.pad(each, (0, segments * parts * width - size))
        each = each.view(rows, segments, parts, width)
        lanes = torch.zeros((rows, segments, width), dtype=torch.float64, device=each.device)
        for k in range(parts):
            lanes.add_(each[:, :, k])
        found.append(total(lanes))
    return in_order(found, (rows,))


def abreast(elements: int) -> Iterator[slice]:
    """Runs of up to ABREAST whole segments; a last segment that is not whole comes alone."""
    whole = elements // SEGMENT * SEGMENT
    yield from chunks(whole, ABREAST * SEGMENT)
    if whole < elements:
        yield slice(whole, elements)


def lanes_of(size: int) -> tuple[int, int, int]:
    """How a run of segments lies in memory: segments, parts of each, elements of a part (one lane each)."""
    segment = min(size, SEGMENT)
    width = min(LANES, segment)
    return -(-size // SEGMENT), -(-segment // width), width


def in_order(found: Sequence[Tensor], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The sum of the segments' sums, one after the other.  found: (shape ..., segments) each, on any device."""
    sums = np.zeros(shape)
    if found:
        for segment in np.moveaxis(torch.cat(list(found), -1).cpu().numpy(), -1, 0):
            sums += segment
    return sums


def gram_matrix(tensors: Sequence[Tensor], origin: Tensor | None = None) -> Gram:
    """All pairwise dot products, (len(tensors), len(tensors)) float64; the products of float32 are exact.

    origin: what is subtracted from every tensor first.
    """
    if tensors[0].device.type != "cpu":
        return gram_matrix_abreast(tensors, origin)
    n = len(tensors)
    flat = [t.reshape(-1) for t in tensors]
    flat_origin = None if origin is None else origin.reshape(-1)
    sums = [np.zeros(n - i) for i in range(n)]  # of x_i with x_i, x_i+1, ...
    for segment in chunks(flat[0].numel(), SEGMENT):
        width = min(LANES, segment.stop - segment.start)
        wide = torch.empty((n, width), dtype=torch.float64)
        lanes = [torch.zeros((n - i, width), dtype=torch.float64) for i in range(n)]
        for part in chunks(segment.stop - segment.start, LANES):
            size = part.stop - part.start
            for row, t in zip(wide, flat, strict=True):
                row[:size].copy_(t[segment.start + part.start : segment.start + part.stop])
            if flat_origin is not None:
                wide[:, :size].sub_(flat_origin[segment.start + part.start : segment.start + part.stop].double())
            for i in range(n):
                lanes[i][:, :size].addcmul_(wide[i, :size], wide[i:, :size])
        for found, lane in zip(sums, lanes, strict=True):
            found += total(lane).numpy()
    gram = np.zeros((n, n))
    for i, found in enumerate(sums):
        gram[i, i:] = gram[i:, i] = found
    return gram


def gram_matrix_abreast(tensors: Sequence[Tensor], origin: Tensor | None = None) -> Gram:
    """`gram_matrix` with the same bits, as `summed_abreast`; of each segment one part is float64 at a time."""
    n = len(tensors)
    flat = [t.reshape(-1) for t in (*tensors, *([] if origin is None else [origin]))]
    found = []
    for run in abreast(flat[0].numel()):
        size = run.stop - run.start
        segments, parts, width = lanes_of(size)
        views = [padded(x[run], segments * parts * width).view(segments, parts, width) for x in flat]
        lanes = torch.zeros((n, n, segments, width), dtype=torch.float64, device=flat[0].device)
        for k in range(parts):
            wide = torch.stack([v[:, k].double() for v in views[:n]])  # (n, segments, width)
            if origin is not None:
                wide = wide - views[n][:, k].double()
            lanes.add_(wide[:, None] * wide[None])  # not addcmul_: on CUDA it would round only once
        found.append(total(lanes))
    return in_order(found, (n, n))


def padded(flat: Tensor, size: int) -> Tensor:
    """A flat tensor with zeros behind it."""
    return flat if flat.numel() == size else torch.nn.functional.pad(flat, (0, size - flat.numel()))


def row_gram_matrices(tensors: Sequence[Tensor], axis: int, origin: Tensor | None = None) -> NDArray[np.float64]:
    """`gram_matrix` for each slice along `axis`, (slices, N, N); a vector is one slice."""

    def matrix(t: Tensor) -> Tensor:
        return t.reshape(1, -1) if t.ndim < 2 else t.movedim(axis, 0).flatten(1)  # (slices, n)

    views = [matrix(t) for t in tensors]
    slices, n = views[0].shape
    grams = np.zeros((slices, len(views), len(views)))
    if n == 0:
        return grams
    for part in chunks(slices, max(1, chunk_on(tensors[0].device) // max(1, n))):
        wide = [v[part].double() for v in views]
        if origin is not None:
            shift = matrix(origin)[part].double()
            wide = [w - shift for w in wide]
        pairs = [(i, j) for i in range(len(wide)) for j in range(i + 1)]
        found = torch.stack([total(wide[i] * wide[j]) for i, j in pairs]).cpu().numpy()  # one look at the device
        for (i, j), values in zip(pairs, found, strict=True):
            grams[part, i, j] = grams[part, j, i] = values
    return grams


EDGES = (np.arange(1 << 15, dtype=np.int32) << 16).view(np.float32)
"""The lower edge of each bin of `Magnitudes`."""
Sizes = Callable[[slice], Tensor]
"""A slice of a flattened tensor -> |values| in float32."""


class Magnitudes:
    """The sizes of many numbers, ready for "what is the k-th largest?" without a sort.

    A histogram over the upper 16 bits of the sizes as float32 (32,768 bins, in the order of the magnitudes) finds
    the bin, and a look at the elements of that bin the exact value.  Between checkpoints in bfloat16 almost every
    difference is a bfloat16 number, the bin itself; the few others are kept aside, so the look is a short one.
    The sizes are not held, but given again with each question.
    """

    def __init__(self, elements: int, counts: NDArray[np.int64], odd: NDArray[np.int32] | None) -> None:
        """counts: of the sizes in each bin, (32768,).  odd: those that are not their bin's lower edge, if few."""
        filled = np.flatnonzero(counts != 0)  # of booleans it takes a tenth of the time
        self.elements = elements
        self.lowest, self.highest = (int(filled[0]), int(filled[-1])) if len(filled) else (0, 0)
        self.from_top = counts[self.lowest : self.highest + 1][::-1].cumsum()  # in the r + 1 highest bins
        self.odd = None if odd is None else np.sort(odd)

    @classmethod
    def of(cls, elements: int, sizes: Sizes, device: torch.device = CPU) -> "Magnitudes":
        """Measured by torch.  device: where the sizes are."""
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
        """From what `state` gave."""
        self = cls.__new__(cls)
        self.from_top, self.odd = state["from_top"].numpy(), state["odd"].numpy() if "odd" in state else None
        self.elements, self.lowest, self.highest = map(int, state["range"])
        return self

    def state(self) -> dict[str, Tensor]:
        limits = torch.tensor([self.elements, self.lowest, self.highest])
        found = {"from_top": torch.from_numpy(self.from_top), "range": limits}
        return found if self.odd is None else found | {"odd": torch.from_numpy(self.odd)}

    def kth(self, k: int, sizes: Sizes, device: torch.device = CPU) -> float:
        """The k-th largest size, 1 <= k <= elements."""
        rank = int(self.from_top.searchsorted(k))
        above = self.from_top.item(rank - 1) if rank else 0
        wanted = self.highest - rank
        if self.odd is not None:
            first, until = self.odd_bins
            number = wanted - first
            last = until.item(number + 1) if 0 <= number < len(until) - 1 else 0
            if not last or k - above > last - until.item(number):  # one of those that are the bin's own lower edge
                return EDGES.item(wanted)
            return float(self.odd[last - (k - above)].view(np.float32))
        parts = (bits_of(sizes(part)) for part in chunks(self.elements, chunk_on(device)))
        inside = torch.cat([bits[(bits >> 16) == wanted] for bits in parts])
        kth = inside.kthvalue(inside.numel() - (k - above) + 1).values
        return float(kth.view(torch.float32))

    @cached_property
    def odd_bins(self) -> tuple[int, NDArray[np.int32]]:
        """The lowest bin of what is kept aside; and how many are below that bin and below the end of each from it on,
        up to their highest."""
        assert self.odd is not None, "they are too many"
        lowest, highest = (int(self.odd[0]) >> 16, int(self.odd[-1]) >> 16) if len(self.odd) else (0, -1)
        edges = (np.arange(lowest, highest + 2, dtype=np.int64) << 16) - 1
        return lowest, self.odd.searchsorted(edges.astype(np.int32), "right").astype(np.int32)

    def zeros(self, sizes: Sizes, device: torch.device = CPU) -> int:
        """How many are exactly zero."""
        if self.lowest > 0:
            return 0
        if self.odd is None:
            return sum(int((sizes(part) == 0).sum()) for part in chunks(self.elements, chunk_on(device)))
        lowest_bin = int(self.from_top[-1] - (self.from_top[-2] if len(self.from_top) > 1 else 0))
        return lowest_bin - int((self.odd < 1 << 16).sum())


def few_of(elements: int) -> int:
    """How many sizes between the bins' edges are few enough to be kept aside."""
    return 1024 + elements // 16


def bits_of(sizes: Tensor) -> Tensor:
    return sizes.view(torch.int32) & 0x7FFFFFFF  # NaN may come with a sign


def between_bins(bits: Tensor) -> NDArray[np.int32]:
    """Those that are not their bin's lower edge; numpy looks for a few among many much faster than torch."""
    if bits.device.type != "cpu":
        apart: NDArray[np.int32] = bits[(bits & 0xFFFF) != 0].cpu().numpy()
        return apart
    found: NDArray[np.int32] = bits.numpy()[np.flatnonzero((bits & 0xFFFF).numpy() != 0)]
    return found


def rank_levels(source: Tensor, base: Tensor) -> Tensor:
    """Where each |source - base| stands in its row, as uint8: floor(256 rank / n), rank 0 the smallest.

    Magnitudes are ranked by their upper 16 bits (as bfloat16, cut); equal ones keep the order of their columns.  A
    vector is one row.
    """
    delta = (source.float() - base.float()).abs()
    rows = delta.reshape(1, -1) if delta.ndim < 2 else delta.flatten(1)
    n = rows.shape[1]
    integer, shift = (torch.int32, 16) if n <= 1 << 16 else (torch.int64, 32)
    if rows.device.type != "cpu":
        return levels_by_scatter(rows, integer, shift).reshape(base.shape)
    # Sorting (magnitude, column) and then (column, level) is faster than sorting once and scattering.
    columns = torch.arange(n, dtype=integer)
    scale = (torch.arange(n) * 256 // max(1, n)).to(integer)
    levels = torch.empty(rows.shape, dtype=torch.uint8)
    for part in chunks(rows.shape[0], max(1, CHUNK // max(1, n))):
        upper = (bits_of(rows[part]) >> 16).to(integer)
        keyed = sorted_rows(upper << shift | columns)
        keyed = sorted_rows((keyed & (1 << shift) - 1) << 8 | scale)
        levels[part] = (keyed & 0xFF).to(torch.uint8)
    return levels.reshape(base.shape)


def levels_by_scatter(rows: Tensor, integer: torch.dtype, shift: int) -> Tensor:
    """`rank_levels` of sizes (rows, n), for a device that sorts and scatters fast; the same numbers."""
    n = rows.shape[1]
    columns = torch.arange(n, dtype=integer, device=rows.device)
    scale = (torch.arange(n, device=rows.device) * 256 // max(1, n)).to(torch.uint8)
    levels = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    for part in chunks(rows.shape[0], max(1, chunk_on(rows.device) // max(1, n))):
        keyed = ((bits_of(rows[part]) >> 16).to(integer) << shift | columns).sort(-1).values  # no two are equal
        levels[part].scatter_(1, (keyed & (1 << shift) - 1).long(), scale.expand_as(keyed))
    return levels


def sorted_rows(rows: Tensor) -> Tensor:
    """Integers sorted along the last dimension; numpy's sort is many times as fast as torch's."""
    return torch.from_numpy(np.sort(rows.numpy(), axis=-1))


def divergences(source: Tensor, base: Tensor) -> Tensor:
    """KL(softmax source || softmax base) of each row over the last dimension, both plus 1e-8; (..., 1) float32.

    A number is a row of one; a divergence below 0 is rounding, and 0.
    """
    shape = (*base.shape[:-1], 1) if base.ndim else ()
    if base.numel() == 0:
        return torch.zeros(shape, device=base.device)
    width = base.shape[-1] if base.ndim else 1
    rows, base_rows = source.reshape(-1, width), base.reshape(-1, width)
    found = torch.zeros(rows.shape[0], device=base.device)
    for part in chunks(rows.shape[0], max(1, chunk_on(base.device) // width)):
        p = rows[part].double().softmax(-1) + 1e-8
        q = base_rows[part].double().softmax(-1) + 1e-8
        found[part] = total(p * (p / q).log()).clamp(min=0.0)
    return found.reshape(shape)
