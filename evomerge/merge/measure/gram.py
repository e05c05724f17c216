"""Gram matrices: all pairwise dot products of tensors in float64, of whole tensors or of their slices."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merge.measure import sums
from evomerge.merge.measure.sums import abreast, chunk_on, chunks, in_order, lanes_of, total
from evomerge.merge.methods.measured import Gram


def gram_matrix(tensors: Sequence[Tensor], origin: Tensor | None = None) -> Gram:
    """All pairwise dot products of N tensors of one shape, (N, N) float64; products of float32 are exact there.

    origin: a tensor that is subtracted from every other first.
    """
    if tensors[0].device.type != "cpu":
        return gram_matrix_abreast(tensors, origin)
    n = len(tensors)
    flat = [t.reshape(-1) for t in tensors]
    flat_origin = None if origin is None else origin.reshape(-1)
    products = [np.zeros(n - i) for i in range(n)]  # of x_i with x_i, x_i+1, ...
    for segment in chunks(flat[0].numel(), sums.SEGMENT):
        width = min(sums.LANES, segment.stop - segment.start)
        wide = torch.empty((n, width), dtype=torch.float64)
        lanes = [torch.zeros((n - i, width), dtype=torch.float64) for i in range(n)]
        for part in chunks(segment.stop - segment.start, sums.LANES):
            size = part.stop - part.start
            for row, t in zip(wide, flat, strict=True):
                row[:size].copy_(t[segment.start + part.start : segment.start + part.stop])
            if flat_origin is not None:
                wide[:, :size].sub_(flat_origin[segment.start + part.start : segment.start + part.stop].double())
            for i in range(n):
                # Not addcmul_: on some processors it rounds once, and less an origin the products are not exact.
                lanes[i][:, :size].add_(wide[i, :size] * wide[i:, :size])
        for found, lane in zip(products, lanes, strict=True):
            found += total(lane).numpy()
    gram = np.zeros((n, n))
    for i, found in enumerate(products):
        gram[i, i:] = gram[i:, i] = found
    return gram


def gram_matrix_abreast(tensors: Sequence[Tensor], origin: Tensor | None = None) -> Gram:
    """`gram_matrix` with the same bits, for an accelerator; as `sums.summed_abreast`.

    One part of each segment is float64 at a time.
    """
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
    """A flat tensor of `size` elements: `flat`, then zeros."""
    return flat if flat.numel() == size else torch.nn.functional.pad(flat, (0, size - flat.numel()))


def row_gram_matrices(tensors: Sequence[Tensor], axis: int, origin: Tensor | None = None) -> NDArray[np.float64]:
    """`gram_matrix` of each of the S slices along `axis`, (S, N, N); a vector is one slice."""

    def matrix(t: Tensor) -> Tensor:
        """(S, elements of a slice)."""
        return t.reshape(1, -1) if t.ndim < 2 else t.movedim(axis, 0).flatten(1)

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
        found = torch.stack([total(wide[i] * wide[j]) for i, j in pairs]).cpu().numpy()  # the device is waited for once
        for (i, j), values in zip(pairs, found, strict=True):
            grams[part, i, j] = grams[part, j, i] = values
    return grams
