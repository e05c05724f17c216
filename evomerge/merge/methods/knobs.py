"""The coefficients of a method (`Knob`), and their values at one tensor (`Knobs`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Knob:
    """One coefficient of a method.

    default: its value when a recipe does not give one; None if a recipe must.
    low, high: the least and the largest value that a recipe may give.
    each: one value per source; otherwise one for the merge.
    switch: true or false, never searched.
    choices: names of its only values, never searched; false and true are also allowed, and mean 0 and 1.
    smooth: whether the merged weights have a derivative by it that `merge/gradient` can compute.  It is false for what
        only selects elements (a density), and for what bounds an iteration.
    """

    default: float | None
    low: float = -float("inf")
    high: float = float("inf")
    each: bool = False
    switch: bool = False
    choices: Mapping[str, float] = field(default_factory=dict)
    smooth: bool = True


@dataclass(frozen=True)
class Knobs:
    """The values of a method's coefficients at one tensor.

    each: name -> one value per source.
    shared: name -> one value for the merge.
    count: the number of sources.
    """

    each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    count: int = 1


def is_named(knob: Knob) -> bool:
    """Whether the knob has a few named values and no bounds: it is never searched."""
    return knob.switch or bool(knob.choices)


def values_of(knob: Knob) -> set[float]:
    """The values that a knob with names (`is_named`) may have."""
    return {0.0, 1.0} | set(knob.choices.values())


def choices_of(knob: Knob) -> str:
    """What a knob may be, for an error message."""
    return "one of " + ", ".join((*knob.choices, "false", "true")) if is_named(knob) else "a number"
