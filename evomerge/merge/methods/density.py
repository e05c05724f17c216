"""How a density becomes a threshold for magnitudes, or the chance of a random mask.

`density` is the share of a task vector's n elements that a method keeps.
"""

import math
from functools import lru_cache

from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.plan import Chance


def kept_count(density: float, elements: int) -> int:
    """How many of n elements a trim at `density` keeps: max(1, floor(density n)), mergekit's rule."""
    return max(1, math.floor(density * elements))


def smallest_kept(measured: Measured, source: int, count: int) -> float:
    """The magnitude that the `count` largest elements of a task vector reach, and their equals.

    It is 0, without a measurement, if that is all of them.
    """
    return measured.magnitude(source, count) if count < measured.elements else 0.0


@lru_cache(maxsize=4096)
def chance(probability: float) -> Chance:
    """The same probability for every element, rounded to a multiple of 2^-32."""
    return Chance(min(2**32, max(0, round(probability * 2**32))))
