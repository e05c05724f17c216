"""Coefficients as a recipe writes them: by layer, by component or by tensor name; and the number at one place."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evomerge.merge.methods.knobs import Knob, choices_of
from evomerge.sources.anatomy import COMPONENTS, Place, relative_depth

Number = Annotated[float, Field(allow_inf_nan=False)]
PerLayer = Number | list[Number]
Name = Annotated[str, Field(pattern="^[a-z]")]  # what begins with a digit is a number (YAML takes 1e-5 for text)


class Part(BaseModel):
    """A coefficient's value for the tensors whose name contains `filter`; for all that are left if there is none."""

    model_config = ConfigDict(extra="forbid")
    filter: str | None = None
    value: PerLayer


Coefficient = bool | PerLayer | dict[str, PerLayer] | Annotated[list[Part], Field(min_length=1)] | Name
"""A number; a list of one number per layer; either of them per component, with `default` for the rest; a list of parts
by tensor name, of which the first that fits decides; or the name of one of a knob's choices."""


BASIC = ("attention", "mlp", "norm", "embedding", "head", "other")
"""The components that every language model may have; who names all of them has named `other` for the rest."""


def value_at(coefficient: Coefficient | None, where: Place, layers: int) -> float:
    """The number that a coefficient has at a place."""
    if type(coefficient) is float:
        return coefficient  # most are, and a candidate asks thousands of times
    assert coefficient is not None, "a required knob was not checked"
    along = part_at(coefficient, where)
    return float(along[relative_depth(where, layers)] if isinstance(along, list) else along)


def part_at(coefficient: Coefficient, where: Place) -> PerLayer:
    """The part of a coefficient that a tensor uses."""
    assert not isinstance(coefficient, str), "a name was not checked"
    if isinstance(coefficient, dict):
        return coefficient.get(where.component, coefficient.get("default", coefficient.get("other", 0.0)))
    if parts := named_parts(coefficient):
        return next(p.value for p in parts if p.filter is None or p.filter in where.tensor)
    assert not isinstance(coefficient, dict)
    return coefficient  # type: ignore[return-value]


def named_parts(coefficient: Coefficient) -> list[Part]:
    """The parts of a coefficient that is given by tensor names; of any other, none."""
    return [p for p in coefficient if isinstance(p, Part)] if isinstance(coefficient, list) else []


def numbers(coefficient: Coefficient) -> list[float]:
    """Every number that a coefficient can give."""
    assert not isinstance(coefficient, str), "a name was not checked"
    return [float(x) for part in as_parts(coefficient) for x in (part if isinstance(part, list) else [part])]


def coefficient_problems(where: str, coefficient: Coefficient, knob: Knob) -> list[str]:
    if isinstance(coefficient, str):
        if coefficient in knob.choices:
            return []
        return [f"{where}: {coefficient!r} is not {choices_of(knob)}"]
    if isinstance(coefficient, dict):
        unknown = set(coefficient) - {*COMPONENTS, "default"}
        if unknown:
            return [f"{where}: {min(unknown)!r} is not a component; allowed: {', '.join(COMPONENTS)}, default"]
        if "default" not in coefficient and not coefficient.keys() >= set(BASIC):
            return [f"{where}: needs `default` for the components it does not name"]
    if parts := named_parts(coefficient):
        if parts[-1].filter is not None:
            return [f"{where}: needs a last entry without `filter` for the tensors that no other names"]
        if any(not part.filter for part in parts[:-1]):
            return [f"{where}: an entry without `filter` fits every tensor, so it must be the last"]
    if any(isinstance(part, list) and not part for part in as_parts(coefficient)):
        return [f"{where}: an empty list"]
    if knob.choices and set(numbers(coefficient)) - set(knob.choices.values()):
        return [f"{where}: not one of {', '.join(knob.choices)}, false, true"]
    outside = [x for x in numbers(coefficient) if not knob.low <= x <= knob.high]
    return [f"{where}: {outside[0]} is outside {knob.low:g} to {knob.high:g}"] if outside else []


def as_parts(coefficient: Coefficient) -> list[Any]:
    if isinstance(coefficient, dict):
        return list(coefficient.values())
    return [part.value for part in named_parts(coefficient)] or [coefficient]
