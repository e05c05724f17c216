"""The order in which sources are merged, for methods that merge one after the other.

A point has a number from 0 to 1 for each source, `order.NAME`; the sources are merged from the smallest to the largest
(random keys: Bean 1994).  So a sampler of numbers searches orders, and close points have similar orders.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.config.schema import SearchConfig
from evomerge.merge.methods import METHODS


def is_searched(config: SearchConfig) -> bool:
    """Whether a search looks for the order of its sources: the result depends on it, and `space.order` is not off."""
    least = METHODS[config.method].ordered
    return config.space.order and least is not None and len(config.sources) >= least


def axis_of(source: str) -> str:
    """The name of a source's axis."""
    return f"order.{source}"


def point_of(names: Sequence[str]) -> dict[str, float]:
    """The point of an order; its numbers lie evenly between 0 and 1."""
    return {axis_of(name): (place + 0.5) / len(names) for place, name in enumerate(names)}


def order_at(point: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The sources in the order of a point; equal ones stay as they are, and so do all at a point without an order."""
    return sorted(names, key=lambda name: float(point.get(axis_of(name), 0.0)))
