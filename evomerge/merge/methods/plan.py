"""Plans: what a planner computes, and all that the kernels (`evomerge/merge/kernels`) understand.

b is the base, x_i are the sources, d_i = x_i - b the task vectors, N the number of sources.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Chance:
    """The probability that a random mask keeps an element, in units of 2^-32: low + step * level.

    level: 0 to 255, where the element's magnitude ranks in its row (`measure/ranks.py`); not needed if `step` is 0.
    With a step, low >= 1 and low + 255 step < 2^32.
    """

    low: int
    step: int = 0


@dataclass(slots=True)  # frozen it takes three times as long to make, and a candidate makes one for each tensor
class Blend:
    """A linear combination, rounded once.

    of_task_vectors: out = b + sum_i sources[i] * d_i, and `base` is not used;
    otherwise:       out = base * b + sum_i sources[i] * x_i.
    A source whose coefficient is 0 is not read.
    """

    sources: tuple[float, ...]
    base: float = 0.0
    of_task_vectors: bool = False


@dataclass(frozen=True, eq=False)
class SliceBlend:
    """A `Blend` whose coefficients differ along one axis: out = [b +] sum_i sources[i][slice] * x_i or d_i.

    sources: (N, slices) float64.
    base: (slices,), the base's coefficients; used unless `of_task_vectors`.
    axis: the axis of the slices.
    """

    sources: NDArray[np.float64]
    base: NDArray[np.float64] | None
    axis: int = 0
    of_task_vectors: bool = False


Elect = Literal["weighted", "plain"] | None
Keep = Literal["all", "magnitude", "band", "random", "rank", "variance", "importance"]


@dataclass(slots=True)
class SparseBlend:
    """Mask, elect, blend:  out = b + scale * [sum_i w_i g_i a_i m_i d_i] / [sum_i w_i m_i].

    weights: w_i.  gains: g_i, 1 by default.
    keep: the rule of the masks m_i; an element of d_i is kept
      magnitude:   if |d_i| is at least floors[i]; `band`: and at most ceilings[i]
      random:      if its hash is below chances[i]; `rank`: the chance depends on the element's rank in its row
      variance:    if the variance of d across the sources is at least floors[0]
      importance:  if |d_i| times the row's divergence is at least floors[i]
    elect: an element also needs w_i g_i d_i to have the sign of the sum over i of the kept w_i g_i d_i ("weighted"),
        or of the kept d_i ("plain").  A sum of 0 counts as positive.
    normalize: whether there is a divisor; it counts only elements whose w_i g_i d_i, in float32, is not 0, and is 1
        where it would be 0.
    alone: a_i where m_i is the only mask that is 1; elsewhere, and by default, a_i is 1.
    """

    weights: tuple[float, ...]
    keep: Keep = "all"
    gains: tuple[float, ...] | None = None
    floors: tuple[float, ...] | None = None
    ceilings: tuple[float, ...] | None = None
    chances: tuple[Chance, ...] | None = None
    alone: tuple[float, ...] | None = None
    elect: Elect = None
    normalize: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Clip:
    """out = b + d clamped to [-limit, limit], for one source."""

    limit: float


@dataclass(frozen=True)
class FisherBlend:
    """A mean whose weights differ from element to element:  out = b + [sum_i f_i d_i] / [sum_i f_i].

    f_i = weights[i] * max(scales[i] * F_i, floor), where F_i is the source's diagonal Fisher information.  Where the
    sum of the f_i is 0 the divisor is 1.
    """

    weights: tuple[float, ...]
    scales: tuple[float, ...]
    floor: float


@dataclass(frozen=True)
class Derived:
    """A blend of matrices that linear algebra derives from the task vectors:  out = b + sum_j coefficients[j] * D_j.

    kind: how the D_j are computed (`kernels/derived.py`).
    settings: the coefficients of the method on which the D_j depend.  Without any they are computed once and kept;
        otherwise they are computed for every merge.
    """

    kind: Literal["tsv", "iso_c", "regmean"]
    coefficients: tuple[float, ...]
    settings: tuple[float, ...] = ()


Plan = Blend | SliceBlend | SparseBlend | Clip | FisherBlend | Derived
