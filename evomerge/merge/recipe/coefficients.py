"""Coefficients as a recipe writes them (per layer, component or tensor name), and their number for one tensor."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from evomerge.merge.methods.knobs import Knob, choices_of
from evomerge.sources.tensor_names import COMPONENTS, PARTS, TensorRole, coefficient_key, coefficient_layer

Number = Annotated[float, Field(allow_inf_nan=False)]
PerLayer = Number | list[Number]
Name = Annotated[str, Field(pattern="^[a-z]")]  # what begins with a digit is a number (YAML takes 1e-5 for text)


class FilteredValue(BaseModel):
    """A coefficient's value for the tensors whose name contains `filter`; without a filter, for all other tensors."""

    model_config = ConfigDict(extra="forbid")
    filter: str | None = None
    value: PerLayer


Coefficient = bool | PerLayer | dict[str, PerLayer] | Annotated[list[FilteredValue], Field(min_length=1)] | Name
"""One of these: a number; a list of one number per layer; a mapping from components or their parts to such values, with
`default` for the others; a list of such values by tensor name, of which the first whose filter fits counts; the name of
one of a knob's choices."""


BASIC = ("attention", "mlp", "norm", "embedding", "head", "other")
"""The components that every language model may have.  A mapping with all of them needs no `default`: the remaining
components then take the value of `other`."""


def value_at(coefficient: Coefficient | None, role: TensorRole, layers: int) -> float:
    """The number that a coefficient has for a tensor in a model of `layers` layers."""
    if type(coefficient) is float:
        return coefficient  # the usual case; this is called thousands of times for each candidate
    assert coefficient is not None, "a required knob was not checked"
    value = number_or_list_at(coefficient, role)
    return float(value[coefficient_layer(role, layers)] if isinstance(value, list) else value)


def number_or_list_at(coefficient: Coefficient, role: TensorRole) -> PerLayer:
    """The number, or the list of one number per layer, that a coefficient has for a tensor."""
    assert not isinstance(coefficient, str), "a name was not checked"
    if isinstance(coefficient, dict):
        return coefficient.get(coefficient_key(role.finest, coefficient), coefficient.get("other", 0.0))
    if entries := filtered_values(coefficient):
        return next(e.value for e in entries if e.filter is None or e.filter in role.tensor)
    assert not isinstance(coefficient, dict)
    return coefficient  # type: ignore[return-value]


def filtered_values(coefficient: Coefficient) -> list[FilteredValue]:
    """The entries of a coefficient that is given by tensor names; none for any other coefficient."""
    return [entry for entry in coefficient if isinstance(entry, FilteredValue)] if isinstance(coefficient, list) else []


def all_numbers(coefficient: Coefficient) -> list[float]:
    """Every number in a coefficient."""
    assert not isinstance(coefficient, str), "a name was not checked"
    values = numbers_and_lists(coefficient)
    return [float(x) for value in values for x in (value if isinstance(value, list) else [value])]


def coefficient_problems(where: str, coefficient: Coefficient, knob: Knob) -> list[str]:
    """What is wrong with a coefficient of a knob, one line at most.  where: its key, for the message."""
    if isinstance(coefficient, str):
        if coefficient in knob.choices:
            return []
        return [f"{where}: {coefficient!r} is not {choices_of(knob)}"]
    if isinstance(coefficient, dict):
        unknown = set(coefficient) - {*COMPONENTS, *PARTS, "default"}
        if unknown:
            allowed = ", ".join((*COMPONENTS, *PARTS))
            return [f"{where}: {min(unknown)!r} is not a component; allowed: {allowed}, default"]
        if "default" not in coefficient and not coefficient.keys() >= set(BASIC):
            return [f"{where}: needs `default` for the components it does not name"]
    if entries := filtered_values(coefficient):
        if entries[-1].filter is not None:
            return [f"{where}: needs a last entry without `filter` for the tensors that no other names"]
        if any(not entry.filter for entry in entries[:-1]):
            return [f"{where}: an entry without `filter` fits every tensor, so it must be the last"]
    if any(isinstance(value, list) and not value for value in numbers_and_lists(coefficient)):
        return [f"{where}: an empty list"]
    if knob.choices and set(all_numbers(coefficient)) - set(knob.choices.values()):
        return [f"{where}: not one of {', '.join(knob.choices)}, false, true"]
    outside = [x for x in all_numbers(coefficient) if not knob.low <= x <= knob.high]
    return [f"{where}: {outside[0]} is outside {knob.low:g} to {knob.high:g}"] if outside else []


def numbers_and_lists(coefficient: Coefficient) -> list[Any]:
    """The values of a coefficient without components and filters: numbers, and lists of one number per layer."""
    if isinstance(coefficient, dict):
        return list(coefficient.values())
    return [entry.value for entry in filtered_values(coefficient)] or [coefficient]
