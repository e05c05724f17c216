"""Where each magnitude ranks in its row, in 256 levels."""

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.measure import sums
from evomerge.merge.measure.magnitudes import bits_of
from evomerge.merge.measure.sums import chunk_on, chunks


def rank_levels(source: Tensor, base: Tensor) -> Tensor:
    """The level of each |source - base| in its row of n elements: floor(256 rank / n), uint8 of the tensor's shape.

    Rank 0 is the smallest.  Magnitudes are ranked by their upper 16 bits (bfloat16, cut off); equal ones keep the order
    of their columns.  A vector is one row.
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
    for part in chunks(rows.shape[0], max(1, sums.CHUNK // max(1, n))):
        upper = (bits_of(rows[part]) >> 16).to(integer)
        keyed = sorted_rows(upper << shift | columns)
        keyed = sorted_rows((keyed & (1 << shift) - 1) << 8 | scale)
        levels[part] = (keyed & 0xFF).to(torch.uint8)
    return levels.reshape(base.shape)


def levels_by_scatter(rows: Tensor, integer: torch.dtype, shift: int) -> Tensor:
    """`rank_levels` of magnitudes (rows, n), with the same numbers, for a device that sorts and scatters fast."""
    n = rows.shape[1]
    columns = torch.arange(n, dtype=integer, device=rows.device)
    scale = (torch.arange(n, device=rows.device) * 256 // max(1, n)).to(torch.uint8)
    levels = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    for part in chunks(rows.shape[0], max(1, chunk_on(rows.device) // max(1, n))):
        keyed = ((bits_of(rows[part]) >> 16).to(integer) << shift | columns).sort(-1).values  # no two are equal
        levels[part].scatter_(1, (keyed & (1 << shift) - 1).long(), scale.expand_as(keyed))
    return levels


def sorted_rows(rows: Tensor) -> Tensor:
    """Integers sorted along the last dimension; numpy's sort is many times faster than torch's."""
    return torch.from_numpy(np.sort(rows.numpy(), axis=-1))
