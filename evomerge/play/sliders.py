"""What can be moved in a recipe (`Slider`), and the recipe after a move.

A slider shows the mean of a coefficient over the weights of the model, or over those of some components.  Moving it
scales the coefficient, so that differences between layers stay:

    c_l -> c_l * target / mean(c)          where the mean is almost 0 beside the c_l: c_l -> target

Results are cut to what the method allows.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from evomerge.errors import EvomergeError
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import is_named
from evomerge.merge.recipe.coefficients import Coefficient, FilteredValue, filtered_values, value_at
from evomerge.merge.recipe.recipe import Recipe, RecipeSource
from evomerge.sources.tensor_names import COMPONENTS, TensorRole

SHOWN = {"weight": 1.5, "density": 1.0, "lambda": 2.0, "t": 1.0}
"""The knobs that have sliders, with the right end of each slider unless a value lies beyond it."""

BLOCKS = {"attention": ("attention", "mixer"), "mlp": ("mlp",)}
GROUPS = {**BLOCKS, "rest": tuple(c for c in COMPONENTS if not any(c in block for block in BLOCKS.values()))}
"""The groups of components that may have sliders of their own."""

ALMOST_ZERO = 0.1  # the mean beside the mean magnitude, below which coefficients are replaced and not scaled

Places = Sequence[tuple[TensorRole, int]]
"""The tensors of a model: the role of each and its number of elements."""


@dataclass(frozen=True)
class Slider:
    """One thing that can be moved.

    knob: as the method names it.
    source: None for a knob that all sources share.
    group: of GROUPS; None for the whole model.
    """

    knob: str
    source: str | None = None
    group: str | None = None


Moves = Mapping[Slider, float]
"""Slider -> the mean that it is moved to."""


def shown_knobs(method: str) -> list[str]:
    """The knobs of a method that have sliders."""
    return [k for k in SHOWN if k in METHODS[method].knobs and not is_named(METHODS[method].knobs[k])]


def shown_methods(count: int, with_statistics: bool) -> list[str]:
    """The methods with sliders.

    count: how many sources there are.
    with_statistics: whether all of them have the statistics files that some methods need.
    """
    found = []
    for name, method in METHODS.items():
        least, most = method.sources
        fits = least <= count and (most is None or count <= most)
        if shown_knobs(name) and fits and (method.statistics is None or with_statistics):
            found.append(name)
    return sorted(found)


def sliders(method: str, sources: Sequence[str], reach: Mapping[str, set[str]], split: bool) -> list[Slider]:
    """The sliders of a method.

    sources: all that may take part.
    reach: source -> the components that it can change.
    split: whether each group of components has its own.
    """
    found = []
    for knob in shown_knobs(method):
        if not METHODS[method].knobs[knob].each:
            found.append(Slider(knob))
            continue
        for source in sources:
            groups = [g for g, components in GROUPS.items() if reach[source] & set(components)] if split else [None]
            found += [Slider(knob, source, group) for group in groups]
    return found


def coefficient_of(recipe: Recipe, slider: Slider) -> Coefficient:
    """The coefficient that a slider moves.  A source that takes no part has the weight 0."""
    default = METHODS[recipe.method].knobs[slider.knob].default
    shared = recipe.parameters.get(slider.knob, default)
    if slider.source is not None:
        source = next((s for s in recipe.sources if s.name == slider.source), None)
        shared = (
            (0.0 if slider.knob == "weight" else default)
            if source is None
            else source.parameters.get(slider.knob, shared)
        )
    return 0.0 if shared is None else shared


def mean_of(coefficient: Coefficient, group: str | None, places: Places, layers: int) -> tuple[float, float]:
    """The mean of a coefficient over the weights of a group of components, and the mean of its magnitude."""
    total = mean = magnitude = 0.0
    for role, elements in places:
        if group is None or role.component in GROUPS[group]:
            value = value_at(coefficient, role, layers)
            total += elements
            mean += elements * value
            magnitude += elements * abs(value)
    return (mean / total, magnitude / total) if total else (0.0, 0.0)


def shown_value(recipe: Recipe, slider: Slider, places: Places, layers: int) -> float:
    """Where a slider stands for a recipe."""
    return round(mean_of(coefficient_of(recipe, slider), slider.group, places, layers)[0], 2)


def moved(recipe: Recipe, moves: Moves, everyone: Sequence[RecipeSource], places: Places, layers: int) -> Recipe:
    """The recipe after all moves; the same recipe if there is none.

    everyone: the sources that may take part, without parameters.  One that does not yet is added when it gets a weight.
    places, layers: of the model.

    EvomergeError if the method does not allow the result, or sliders of single components cannot change it.
    """
    if not moves:
        return recipe
    copy = recipe.model_copy(deep=True)
    joining = {m.source for m, to in moves.items() if m.knob == "weight" and to} - {s.name for s in copy.sources}
    copy.sources += [s.model_copy(update={"parameters": {"weight": 0.0}}) for s in everyone if s.name in joining]
    present = {role.component for role, _ in places}
    for slider, to in moves.items():
        source = next((s for s in copy.sources if s.name == slider.source), None)
        if slider.source is not None and source is None:
            continue  # it has a density and no weight
        coefficient, knob = coefficient_of(copy, slider), METHODS[copy.method].knobs[slider.knob]
        mean, magnitude = mean_of(coefficient, slider.group, places, layers)
        step = Step(to, None if abs(mean) <= ALMOST_ZERO * magnitude else to / mean, knob.low, knob.high)
        owner = copy.parameters if source is None else source.parameters
        if slider.group is None:
            owner[slider.knob] = changed(coefficient, step)
        else:
            owner[slider.knob] = changed_in(coefficient, slider.group, present, step)
    return checked(copy)


@dataclass(frozen=True)
class Step:
    """What a move does to every number of a coefficient.

    to: the mean that is wanted.
    factor: None if the numbers are replaced by `to`.
    low, high: what the method allows.
    """

    to: float
    factor: float | None
    low: float
    high: float

    def of(self, value: float) -> float:
        return min(max(self.to if self.factor is None else value * self.factor, self.low), self.high)


def changed(coefficient: Any, step: Step) -> Any:
    """A coefficient, or a part of one, with a step applied to every number."""
    if isinstance(coefficient, dict):
        return {key: changed(value, step) for key, value in coefficient.items()}
    if isinstance(coefficient, list):
        return [changed(value, step) for value in coefficient]
    if isinstance(coefficient, FilteredValue):
        return coefficient.model_copy(update={"value": changed(coefficient.value, step)})
    return step.of(float(coefficient))


def changed_in(coefficient: Coefficient, group: str, present: Container[str], step: Step) -> Coefficient:
    """A coefficient with a step applied in a group of components.

    present: the components that the model has.

    EvomergeError if the coefficient is given by tensor names.
    """
    if filtered_values(coefficient):
        raise EvomergeError("this recipe has coefficients by tensor name; move its sliders for the whole model")
    parts: dict[str, Any] = dict(coefficient) if isinstance(coefficient, dict) else {"default": coefficient}
    parts.setdefault("default", parts.get("other", 0.0))
    for component in GROUPS[group]:
        if component in present:
            parts.setdefault(component, parts["default"])
    return {k: changed(v, step) if k.split(".")[0] in GROUPS[group] else v for k, v in parts.items()}


def with_method(recipe: Recipe, method: str, everyone: Sequence[RecipeSource]) -> Recipe:
    """The recipe with another method: the coefficients that both have stay, the others begin at their defaults.

    everyone: the sources, all of which take part.

    EvomergeError if the method does not take them.
    """
    if method == recipe.method:
        return recipe
    first = {"weight": 1.0 / len(everyone), "t": 0.5}  # of knobs without a default

    def coefficients(source: str | None) -> dict[str, Coefficient]:
        found: dict[str, Coefficient] = {}
        for name in shown_knobs(method):
            knob = METHODS[method].knobs[name]
            if knob.each != (source is not None):
                continue
            if name in shown_knobs(recipe.method):
                found[name] = coefficient_of(recipe, Slider(name, source))
            elif knob.default is None:
                found[name] = first[name]
        return found

    sources = [s.model_copy(update={"parameters": coefficients(s.name)}) for s in everyone]
    return checked(recipe.model_copy(update={"method": method, "sources": sources, "parameters": coefficients(None)}))


def checked(recipe: Recipe) -> Recipe:
    """The recipe, checked as one that is read from a file.  EvomergeError lists what is wrong."""
    try:
        return Recipe.model_validate(recipe.model_dump())
    except ValidationError as error:
        problems = (e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise EvomergeError(f"{recipe.method}: {'; '.join(problems)}") from error
