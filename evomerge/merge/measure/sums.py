"""Sums over the elements of a tensor in one fixed order, on any device; every other file here builds on them.

Float64 terms are added in LANES partial sums side by side, which are added by halving at the end of each SEGMENT of
elements.  So the bits depend neither on threads nor on the width of a processor's vectors.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")
LANES = 1 << 14  # partial sums side by side; those of four models fit a core's cache
SEGMENT = 1 << 22  # elements after which the lanes are added by halving; the sums of segments are added in order
CHUNK = 1 << 17  # elements that are read at a time
CHUNK_ON_ACCELERATOR = 1 << 25  # there each chunk costs several launches, and reading its result stops the queue
ABREAST = 8  # segments that an accelerator sums at a time, each in its own lanes; a power of two


def chunks(elements: int, size: int) -> Iterator[slice]:
    """Slices of `size` elements that cover 0 .. elements - 1; the last may be shorter."""
    return (slice(start, min(start + size, elements)) for start in range(0, elements, size))


def total(lanes: Tensor) -> Tensor:
    """The sum over the last dimension by halving (v[:n/2] + v[n/2:]); it overwrites `lanes`.

    A library's own sum would depend on the width of vectors and on threads.
    """
    size = lanes.shape[-1]
    while size > 1:
        half = size // 2
        lanes[..., :half].add_(lanes[..., size - half : size])
        size -= half
    return lanes[..., 0]


def chunk_on(device: torch.device) -> int:
    """Elements that are read at a time on a device."""
    return CHUNK if device.type == "cpu" else CHUNK_ON_ACCELERATOR


def summed(
    elements: int, terms: Callable[[slice], Tensor], rows: int = 1, device: torch.device = CPU
) -> NDArray[np.float64]:
    """The sums of `rows` sequences of float64 terms over the `elements` of a tensor, (rows,).

    terms: a slice of the flattened tensor -> (rows, length) float64.
    device: of the terms.
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
    """`summed` with the same bits, for a device where a launch costs more than a pass over memory.

    Several segments are summed at a time, and the results are read once.
    """
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
    """Slices of up to ABREAST complete segments; an incomplete last segment is a slice of its own."""
    whole = elements // SEGMENT * SEGMENT
    yield from chunks(whole, ABREAST * SEGMENT)
    if whole < elements:
        yield slice(whole, elements)


def lanes_of(size: int) -> tuple[int, int, int]:
    """The shape of a run of segments: segments, parts of a segment, elements of a part (one for each lane)."""
    segment = min(size, SEGMENT)
    width = min(LANES, segment)
    return -(-size // SEGMENT), -(-segment // width), width


def in_order(found: Sequence[Tensor], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The sum of the segments' sums, added one after the other, of `shape`.

    found: for each run (shape ..., segments), on any device.
    """
    sums = np.zeros(shape)
    if found:
        for segment in np.moveaxis(torch.cat(list(found), -1).cpu().numpy(), -1, 0):
            sums += segment
    return sums
