"""Coarse to fine: CMA-ES searches few coordinates first, each the value of many axes, and then every axis by itself.

    stage 1    one coordinate for each knob and source
    stage 2    one for each knob, source and component
    then       every axis

Each begins at the best point so far.  A trial cannot tell many axes apart, and what all tensors of a source have in
common is found first (docs/search.md has the numbers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COARSER = 2  # a stage is left out if the next has not at least so many times its coordinates


@dataclass(frozen=True, eq=False)
class Stage:
    """A search in fewer coordinates than there are axes.

    results: of trials, after which the next stage begins.
    of_axis: (D,) the coordinate of each axis.
    """

    results: int
    of_axis: NDArray[np.int64]

    @property
    def dimension(self) -> int:
        """How many coordinates there are."""
        return int(self.of_axis.max()) + 1

    def coordinates(self, unit: NDArray[np.float64]) -> NDArray[np.float64]:
        """(d,) of a point in the unit cube, (D,): those of the first axis of each."""
        first = np.unique(self.of_axis, return_index=True)[1]
        return unit[first]

    def holds(self, unit: NDArray[np.float64]) -> bool:
        """Whether all axes of each coordinate have the same value at a point in the unit cube, (D,)."""
        return bool(np.allclose(self.coordinates(unit)[self.of_axis], unit, rtol=0.0, atol=1e-9))


def stages_of(axes: Sequence[str], ties: Sequence[Mapping[str, str]], results: int) -> list[Stage]:
    """The stages before all axes are searched.

    axes: their names in order.
    ties: for each stage, axis -> the name of its coordinate.
    results: of the first stage; 0 is no stage at all.
    """
    found: list[Stage] = []
    finer = len(axes)
    for number, names in reversed(list(enumerate(ties))):
        if results == 0 or any(axis not in names for axis in axes):
            continue
        order = {name: k for k, name in enumerate(dict.fromkeys(names[axis] for axis in axes))}
        stage = Stage(results * 2**number, np.array([order[names[axis]] for axis in axes]))
        if COARSER * stage.dimension <= finer:
            found.insert(0, stage)
            finer = stage.dimension
    return found
