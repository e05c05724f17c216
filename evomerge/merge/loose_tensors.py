"""Measurements of a few tensors that belong to no model, for pictures and tests of planners."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evomerge.merge.kernels.operands import Keys
from evomerge.merge.kernels.random_masks import random_mask
from evomerge.merge.measure.measurements import Measurements
from evomerge.merge.methods.plan import Chance


@dataclass
class Loose:
    """Base and sources of one tensor; the sources are called 0, 1, 2, ..."""

    tensors: Sequence[Tensor]

    def base(self, name: str) -> Tensor:
        return self.tensors[0]

    def source(self, source: str, name: str) -> Tensor:
        return self.tensors[1 + int(source)]


def measure_loose(
    base: Tensor, sources: Sequence[Tensor], keys: Keys, statistics: Sequence[Any] = (), name: str = "tensor"
) -> Measurements:
    """What a planner may ask about a tensor and the sources' tensors of the same shape.

    keys: of the random masks.  statistics: what the sources' statistics files hold.  name: the tensor's.
    """

    def mask(source: int, chance: Chance, part: slice) -> Tensor:
        levels = measured.levels(source).reshape(-1)[part] if chance.step else None
        return random_mask(chance, part.start, part.stop - part.start, (keys[0], keys[1][source]), levels)

    names = [str(k) for k in range(len(sources))]
    measured = Measurements(Loose([base, *sources]), name, names, {}, mask, statistics)
    return measured
