"""What a merge method is: knobs in, a plan out.  The two plans are all that the kernels understand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Gram = NDArray[np.float64]
"""Dot products of the flattened tensors of one name, (1 + N, 1 + N): the base first, then the sources."""


@dataclass(frozen=True)
class Knob:
    """One coefficient of a method.

    default: its value when a recipe is silent; None if the recipe must give it.
    low, high: what a recipe may say (inclusive).  each: one value per source, else one for the merge.
    switch: true or false, never searched.
    """

    default: float | None
    low: float = -float("inf")
    high: float = float("inf")
    each: bool = False
    switch: bool = False


@dataclass(frozen=True)
class Knobs:
    """The values of a method's knobs at one tensor.

    each: one value per source.  shared: one for all.  count: how many sources there are.
    """

    each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class Blend:
    """A linear combination, rounded once.

    of_task_vectors: out = base + sum_i sources[i] * (x_i - base), and `base` is not used;
    otherwise:       out = base * b + sum_i sources[i] * x_i.
    A source whose coefficient is 0 is not read.
    """

    sources: tuple[float, ...]
    base: float = 0.0
    of_task_vectors: bool = False


@dataclass(frozen=True)
class SparseBlend:
    """Mask, elect, blend:  out = base + scale * [sum_i weight_i gain_i m_i d_i] / [sum_i weight_i m_i].

    d_i is the task vector x_i - base.  m_i keeps an element if it is among the `density_i` share of largest
    magnitude (`top`) or its hash says so (`random`); with `elect` also only if weight_i d_i has the sign of the
    elementwise sum of the kept.  The divisor is there only with `normalize`; where it is 0 it counts as 1.
    """

    weights: tuple[float, ...]
    density: tuple[float, ...]
    keep: Literal["top", "random"]
    gains: tuple[float, ...]
    elect: bool
    normalize: bool
    scale: float


Plan = Blend | SparseBlend


@dataclass(frozen=True)
class Method:
    """A merge method as the registry knows it.

    plan: pure, (knobs, gram) -> Plan; the gram is None unless `needs_gram`.
    sources: the least and the most sources it takes (None: any number).
    excludes: switch -> the knob that must keep its default while the switch is on.
    """

    name: str
    knobs: Mapping[str, Knob]
    plan: Callable[[Knobs, Gram | None], Plan]
    sources: tuple[int, int | None] = (1, None)
    needs_gram: bool = False
    excludes: Mapping[str, str] = field(default_factory=dict)


def share(total: float) -> float:
    """A divisor for normalisation; a sum too close to zero counts as 1 (mergekit's rule)."""
    return 1.0 if abs(total) < 1e-8 else total
