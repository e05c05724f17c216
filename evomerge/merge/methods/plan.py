"""What a merge method is: knobs and measurements in, a plan out.  The plans are all that the kernels understand."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Gram = NDArray[np.float64]
"""Dot products of the flattened tensors of one name, (1 + N, 1 + N): the base first, then the sources."""


@dataclass(frozen=True)
class Knob:
    """One coefficient of a method.

    default: its value when a recipe is silent; None if the recipe must give it.
    low, high: what a recipe may say (inclusive).  each: one value per source, else one for the merge.
    switch: true or false, never searched.  choices: names for its only values, never searched; false and true are
    those of 0 and 1.
    """

    default: float | None
    low: float = -float("inf")
    high: float = float("inf")
    each: bool = False
    switch: bool = False
    choices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Knobs:
    """The values of a method's knobs at one tensor.

    each: one value per source.  shared: one for all.  count: how many sources there are.
    """

    each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class Chance:
    """With which probability a random mask keeps an element, as integers over 2^32: low + step * level.

    level: 0 to 255, the element's rank among the magnitudes of its row (`statistics.rank_levels`); not looked at if
    `step` is 0.  With a step, low >= 1 and low + 255 step < 2^32.
    """

    low: int
    step: int = 0


class Measured(Protocol):
    """What a planner may ask about one tensor of the base and the sources.  d_i is the task vector x_i - base."""

    @property
    def count(self) -> int:
        """How many sources there are."""

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""

    @property
    def gram(self) -> Gram:
        """Dot products of base and sources, (1 + N, 1 + N)."""

    @property
    def task_gram(self) -> Gram:
        """Dot products of the task vectors, (N, N).

        They are subtracted before they are multiplied: from `gram` the same numbers are differences of nearly equal
        ones, wrong in their first digits where a task vector is 1e-8 of the base or less.
        """

    def row_grams(self, axis: int, of_task_vectors: bool = False) -> NDArray[np.float64]:
        """`gram` or `task_gram` for each slice along `axis` (0 or -1), (slices, ...); a vector is a single row."""

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is the matrix of a layer: two axes, neither an embedding nor the head."""

    @property
    def is_gathered(self) -> bool:
        """Whether the sources' statistics files speak of this tensor."""

    def fisher_size(self, source: int) -> float:
        """The root mean square of a source's Fisher information over its whole model."""

    def magnitude(self, source: int, rank: int) -> float:
        """The `rank`-th largest |d_source|, 1 <= rank <= elements."""

    def l1(self, source: int, chance: Chance | None = None) -> float:
        """The sum of |d_source| over the elements that its random mask keeps, or over all."""

    def rank_weighted_l1(self, source: int) -> float:
        """The sum of |d_source| * (level + 1/2) / 256, the level of a `Chance`."""

    def variance(self, share: float) -> float | None:
        """The k-th largest variance across the task vectors, k = floor(share * varying elements); None if k is 0."""

    def mean_squares(self, floor: float) -> tuple[float, ...]:
        """The mean square of each d_i, where elements whose variance is below `floor` count as 0."""

    def importance(self) -> float:
        """median + 1.5 interquartile ranges of |d_0| * KL(softmax x_0 || softmax base), row by row."""

    def changed(self, epsilon: float) -> tuple[tuple[int, int], ...]:
        """Per source, how many elements with |d_i| > epsilon it changed alone, and how many others did too."""


@dataclass(slots=True)  # frozen it takes three times as long to make, and a candidate makes one for each tensor
class Blend:
    """A linear combination, rounded once.

    of_task_vectors: out = base + sum_i sources[i] * (x_i - base), and `base` is not used;
    otherwise:       out = base * b + sum_i sources[i] * x_i.
    A source whose coefficient is 0 is not read.
    """

    sources: tuple[float, ...]
    base: float = 0.0
    of_task_vectors: bool = False


@dataclass(frozen=True, eq=False)
class SliceBlend:
    """A `Blend` whose coefficients differ along one axis: out = [base +] sum_i sources[i][slice] * x_i or d_i.

    sources: (N, slices) float64.  base: (slices,), used unless `of_task_vectors`.  axis: where the slices lie.
    """

    sources: NDArray[np.float64]
    base: NDArray[np.float64] | None
    axis: int = 0
    of_task_vectors: bool = False


Elect = Literal["weighted", "plain"] | None
Keep = Literal["all", "magnitude", "band", "random", "rank", "variance", "importance"]


@dataclass(slots=True)
class SparseBlend:
    """Mask, elect, blend:  out = base + scale * [sum_i w_i g_i a_i m_i d_i] / [sum_i w_i m_i].

    m_i keeps an element of the task vector d_i = x_i - base
      magnitude:   if |d_i| is at least floors[i]; `band`: and at most ceilings[i]
      random:      if its hash is below chances[i]; `rank`: the chance depends on the element's rank in its row
      variance:    if the variance of d across the sources is at least floors[0]
      importance:  if |d_i| times the row's divergence is at least floors[i]
    and with `elect` also only if w_i g_i d_i has the sign of the elementwise sum of the kept ("weighted"), or of the
    kept d_i ("plain").  The divisor is there only with `normalize`, counts only d_i other than 0, and is 1 where it
    would be 0.  a_i is `alone[i]` where m_i alone is 1, and else 1.
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
    """out = base + d clamped to [-limit, limit], for one source."""

    limit: float


@dataclass(frozen=True)
class FisherBlend:
    """A mean whose weights differ per element:  out = base + [sum_i f_i d_i] / [sum_i f_i].

    f_i = weights[i] * max(scales[i] * F_i, floor), F_i the source's diagonal Fisher information; where the sum of
    the f_i is 0 the divisor is 1.
    """

    weights: tuple[float, ...]
    scales: tuple[float, ...]
    floor: float


@dataclass(frozen=True)
class Derived:
    """A blend of matrices that linear algebra makes of the task vectors:  out = base + sum_j coefficients[j] * D_j.

    kind: how the D_j are made (`derived.py`).  settings: what they depend on besides the tensors; without settings
    they are made once and kept, with settings for every merge anew.
    """

    kind: Literal["tsv", "iso_c", "regmean"]
    coefficients: tuple[float, ...]
    settings: tuple[float, ...] = ()


Plan = Blend | SliceBlend | SparseBlend | Clip | FisherBlend | Derived


Statistics = Literal["fisher", "regmean"]
"""What is gathered on a source's own items: squared gradients, or Gram matrices of the linear layers' inputs."""


@dataclass(frozen=True)
class Method:
    """A merge method as the registry knows it.

    plan: pure, (knobs, measured) -> Plan.
    sources: the least and the most sources it takes (None: any number).
    without_base: from how many sources on its plans leave the base alone (None: never); only then may a slice of
    layers leave it out.
    measures: what its plans ask for at every tensor, so that it can be measured beforehand in one pass.
    excludes: switch -> the knob that must keep its default while the switch is on.
    statistics: the kind of statistics file that every source must have (`gathered.py`).
    keeps_parent: whether weight 1 for one source and 0 for the others gives that source.
    """

    name: str
    knobs: Mapping[str, Knob]
    plan: Callable[[Knobs, Measured], Plan]
    sources: tuple[int, int | None] = (1, None)
    without_base: int | None = None
    measures: frozenset[Literal["gram", "task_gram", "magnitudes", "ranks"]] = frozenset()
    excludes: Mapping[str, str] = field(default_factory=dict)
    statistics: Statistics | None = None
    keeps_parent: bool = True


def share(total: float) -> float:
    """A divisor for normalisation; a sum too close to zero counts as 1 (mergekit's rule)."""
    return 1.0 if abs(total) < 1e-8 else total


def divided(knobs: Knobs, elect: Elect) -> tuple[bool, float]:
    """`normalize` and `scale` of a sparse plan: without election the divisor is one number and goes into the scale."""
    normalize, scale = bool(knobs.shared["normalize"]), knobs.shared["lambda"]
    return (normalize, scale) if elect or not normalize else (False, scale / share(sum(knobs.each["weight"])))


@lru_cache(maxsize=4096)
def chance(probability: float) -> Chance:
    """The same probability for every element."""
    return Chance(min(2**32, max(0, round(probability * 2**32))))


def trim(measured: Measured, source: int, rank: int) -> float:
    """The floor that keeps the `rank` largest of a task vector and their equals; 0, unmeasured, if that is all."""
    return measured.magnitude(source, rank) if rank < measured.elements else 0.0


def kept_count(density: float, elements: int) -> int:
    """How many elements a trim at `density` keeps: max(1, floor(density n)), mergekit's rule."""
    return max(1, math.floor(density * elements))


def is_named(knob: Knob) -> bool:
    """Whether the knob has a few values and no bounds: it is never searched."""
    return knob.switch or bool(knob.choices)


def values_of(knob: Knob) -> set[float]:
    """The values of a knob that `is_named`."""
    return {0.0, 1.0} | set(knob.choices.values())


def choices_of(knob: Knob) -> str:
    """What a knob may be, for a message."""
    return "one of " + ", ".join((*knob.choices, "false", "true")) if is_named(knob) else "a number"
