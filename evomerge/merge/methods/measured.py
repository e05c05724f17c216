"""What a planner may ask about one tensor (`Measured`); `measure/measurements.py` answers."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.merge.methods.plan import Chance

Gram = NDArray[np.float64]
"""Dot products of flattened tensors, symmetric."""


class Measured(Protocol):
    """Questions about one tensor of the base and of N sources.  d_i is the task vector x_i - base.

    source: the number of a source, from 0.
    """

    @property
    def count(self) -> int:
        """The number of sources."""

    @property
    def elements(self) -> int:
        """The number of elements of the tensor."""

    @property
    def gram(self) -> Gram:
        """Dot products of base and sources, (1 + N, 1 + N); the base comes first."""

    @property
    def task_gram(self) -> Gram:
        """Dot products of the task vectors, (N, N).

        They are subtracted before they are multiplied: computed from `gram` the same numbers are differences of nearly
        equal ones, wrong in their first digits where a task vector is 1e-8 of the base or less.
        """

    def row_grams(self, axis: int, of_task_vectors: bool = False) -> NDArray[np.float64]:
        """`gram` or `task_gram` of each slice along `axis` (0 or -1), (slices, ...).  A vector is a single slice."""

    @property
    def is_layer_matrix(self) -> bool:
        """Whether the tensor is the matrix of a layer: two axes, neither an embedding nor the head."""

    @property
    def is_gathered(self) -> bool:
        """Whether the statistics file of every source has this tensor."""

    def fisher_size(self, source: int) -> float:
        """The root mean square of a source's Fisher information over its whole model."""

    def magnitude(self, source: int, rank: int) -> float:
        """The `rank`-th largest |d_source|, 1 <= rank <= elements."""

    def l1(self, source: int, chance: Chance | None = None) -> float:
        """The sum of |d_source| over all elements, or over those that the random mask of a chance keeps."""

    def rank_weighted_l1(self, source: int) -> float:
        """The sum of |d_source| * (level + 1/2) / 256; for the levels see `Chance`."""

    def variance(self, share: float) -> float | None:
        """The k-th largest variance across the task vectors, k = floor(share * elements that vary); None if k is 0."""

    def mean_squares(self, floor: float) -> tuple[float, ...]:
        """The mean square of each d_i, where elements whose variance is below `floor` count as 0."""

    def importance(self) -> float:
        """median + 1.5 interquartile ranges of |d_0| * KL(softmax x_0 || softmax base), the softmax of each row."""

    def changed(self, epsilon: float) -> tuple[tuple[int, int], ...]:
        """For each source, how many elements with |d_i| > epsilon only it has, and how many other sources have too."""
