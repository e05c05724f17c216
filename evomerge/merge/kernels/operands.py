"""The tensors that a plan is executed on (`Operands`), and small tensors of plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
Keys = tuple[int, Sequence[int]]
"""The 64-bit words of a tensor's random masks: the tensor's own (of which 32 bits are used), and one per source."""


@dataclass(eq=False, slots=True)
class Memo:
    """What a launcher remembers of the last call over the same tensors.

    key: everything else that the answer depends on.
    found: the call's kind and row (`launch.py`).
    """

    key: tuple[Any, ...] = ()
    found: Any = None


@dataclass(eq=False, slots=True)
class Operands:
    """What a plan is executed on: tensors of one shape, of any floating types.

    base: the base's tensor.
    sources: N tensors.
    planes: what masks need besides: per source the uint8 levels (`rank`), the float32 factor of each row
        (`importance`), or the Fisher information (`FisherBlend`); empty for all other plans.
    keys: of the random masks.
    memo: of the tensors, if they stay where they are from candidate to candidate.
    """

    base: Tensor
    sources: Sequence[Tensor]
    planes: Sequence[Tensor] = ()
    keys: Keys = (0, ())
    memo: Memo | None = None


def in_row_order(rows: Mapping[int, Sequence[T]]) -> list[T]:
    """The rows of a small matrix one after the other.  rows: number of the row, from 0 -> its values."""
    return [value for row in range(len(rows)) for value in rows[row]]


def number_tensor(numbers: object, dtype: type[np.generic], device: torch.device) -> Tensor:
    """A small tensor of plain numbers.

    `torch.tensor` takes three times as long, and a candidate makes hundreds.
    """
    return torch.from_numpy(np.array(numbers, dtype=dtype)).to(device)
