"""Simplify: fewer sources and fewer coefficients, as long as the loss stays within a margin.

Greedy, in this order; every step is measured against the candidate itself, not against the step before:

    sources      leave one out, the one with the smallest weights first
    depth        one value along the depth for every coefficient; if that loses too much, one coefficient after the
                 other: one value, else three knots
    components   one value for all components, in the same way
    decimals     round to two decimals, then to one

A step is kept if, on the items of the search split,

    metric       the lower end of the paired 90% interval of the difference lies above -margin: a larger loss is
                 excluded
    value        its upper end lies above -margin: no larger loss of what trials are valued by (scale.py) is shown
    guards       no guard is broken more than by the candidate

Every recipe's scores are kept in the study, so a resumed search scores none twice.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.config.space import Granularity
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knob, is_named
from evomerge.merge.recipe.coefficients import filtered_values
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.space.nearest import EXACT, coefficients, nearest_point, nearest_values, per_layer
from evomerge.search.space.space import Group, Point, Space, axis_names
from evomerge.search.verdict.no_loss import NoLoss
from evomerge.search.verdict.verdict import difference_text
from evomerge.sources.tensor_names import coefficient_layer

KNOTS = 3  # along the depth, where one value loses too much
MOST_VALUES = 16  # along the depth, among which the form of a recipe is looked for; else one value per layer
DECIMALS = (2, 1)

Owner = tuple[str, str | None]
"""A coefficient: its knob, and its source or None."""

Keep = Callable[["Form", str], Awaitable[bool]]
"""Whether a simpler form may replace the present one.  The text says what was done."""


@dataclass(frozen=True)
class Form:
    """A recipe as a point of the smallest space that contains it.

    space: a group for every coefficient; what a search does not vary is fixed.
    decimals: to how many the values are rounded; None: they are not.
    """

    space: Space
    point: Point
    decimals: int | None = None

    @property
    def recipe(self) -> Recipe:
        return self.space.recipe(self.point)

    @property
    def sources(self) -> list[str]:
        return [s.name for s in self.space.config.sources]

    @property
    def count(self) -> int:
        """How many coefficients there are; those that change nothing are not counted."""
        return sum(len(g.axes) for g in self.free())

    def free(self) -> list[Group]:
        """The groups whose values count as coefficients."""
        return [g for g in self.space.groups if not g.fixed and not g.idle]

    def owners(self) -> dict[Owner, list[Group]]:
        """The free groups by their coefficient."""
        found: dict[Owner, list[Group]] = {}
        for group in self.free():
            found.setdefault((group.knob, group.source), []).append(group)
        return found

    def weight(self, source: str) -> float:
        """The mean size of a source's weights over the tensors that it can change."""
        places = [
            p for g in self.space.groups if (g.knob, g.source) == ("weight", source) for p in self.space.places(g)
        ]
        number, recipe = self.sources.index(source), self.recipe
        sizes = [abs(recipe.knobs(p, self.space.layers).each["weight"][number]) for p in places]
        return float(np.mean(sizes)) if sizes else 0.0


def form_of(space: Space, recipe: Recipe) -> Form | None:
    """The form of a recipe of the search's sources; None if it gives coefficients by the names of tensors, or where
    layers are searched."""
    if space.assembly is not None:
        return None
    given = [recipe.parameters, *(s.parameters for s in recipe.sources)]
    if any(filtered_values(value) for parameters in given for value in parameters.values()):
        return None
    places = {s.name: number for number, s in enumerate(recipe.sources)}
    own = [s for s in space.config.sources if s.name in places]
    if METHODS[recipe.method].ordered is not None:
        own.sort(key=lambda source: places[source.name])
    fixed_order = space.config.space.model_copy(update={"order": False})
    config = space.config.model_copy(update={"sources": own, "method": recipe.method, "space": fixed_order})
    reach = {s.name: space.reach[s.name] for s in own if s.name in space.reach}
    found = replace(space, config=config, reach=reach, groups=())
    groups: list[Group] = []
    point: Point = {}
    for name, knob in METHODS[recipe.method].knobs.items():
        for source in [s.name for s in own] if knob.each else [None]:
            value = recipe.parameters.get(name, knob.default)
            if source is not None:
                value = recipe.sources[places[source]].parameters.get(name, value)
            parts = [part for part in value if part != "default"] if isinstance(value, dict) else []
            new = [whole_group(name, source, part, knob) for part in (*parts, "default")]
            shaped = replace(found, groups=tuple(new))
            searched = any(g.knob == name and not g.fixed for g in space.groups)
            for group in new:
                settled, values = smallest(shaped, group, recipe, places, knob)
                if is_named(knob) or (not searched and len(values) == 1):
                    settled = replace(settled, low=values[0], high=values[0])
                groups.append(settled)
                if not settled.fixed:
                    point |= dict(zip(settled.axes, values, strict=True))
    form = Form(replace(found, groups=tuple(groups)), point)
    near = nearest_point(form.space, recipe)
    return form if near is not None and near.exact else None


def whole_group(knob: str, source: str | None, component: str, bounds: Knob) -> Group:
    """A group with one value.  bounds: of the knob."""
    return Group(knob, source, component, "model", bounds.low, bounds.high, (axis_name(knob, source, component),))


def axis_name(knob: str, source: str | None, component: str) -> str:
    return ".".join(part for part in (knob, source, component) if part)


def with_values(group: Group, granularity: Granularity, count: int) -> Group:
    """The group with so many values along the depth."""
    stem = axis_name(group.knob, group.source, group.component)
    return replace(group, granularity=granularity, axes=axis_names(stem, granularity, count))


def smallest(
    space: Space, group: Group, recipe: Recipe, sources: dict[str, int], knob: Knob
) -> tuple[Group, list[float]]:
    """The group with the fewest values along the depth that has the recipe's coefficients, and these values."""
    wanted = coefficients(space, group, recipe, sources)
    if not wanted:
        group = replace(group, low=knob.default or 0.0, high=knob.default or 0.0, idle=True)
        return group, [group.low]
    layers = max(1, space.layers)
    forms: list[tuple[Granularity, int]] = [("model", 1)]
    for count in range(2, min(layers, MOST_VALUES + 1)):
        forms += [("depth", count), ("group", count)]
    for granularity, count in [*forms, ("layer", layers)]:
        tried = with_values(group, granularity, count)
        values = nearest_values(wanted, tried, space.layers, knob.default or 0.0)
        along = per_layer(values, granularity, space.layers)
        if all(abs(along[coefficient_layer(place, space.layers)] - value) <= EXACT for place, value in wanted):
            break
    return tried, values


def without_source(form: Form, name: str) -> Form | None:
    """The form without a source; None if the method cannot leave it out."""
    method = METHODS[form.space.config.method]
    if "weight" not in method.knobs or len(form.sources) <= max(1, method.sources[0]):
        return None
    config = form.space.config
    left = config.model_copy(update={"sources": [s for s in config.sources if s.name != name]})
    groups = tuple(g for g in form.space.groups if g.source != name)
    reach = {source: found for source, found in form.space.reach.items() if source != name}
    point = {axis: form.point[axis] for g in groups if not g.fixed for axis in g.axes}
    return replace(form, space=replace(form.space, config=left, groups=groups, reach=reach), point=point)


def tied_along_depth(form: Form, owners: Sequence[Owner], count: int) -> Form | None:
    """The form with at most so many values along the depth in each of some coefficients; None if it has that already.

    count: 1 is one value, else that many knots.
    """
    groups = [
        with_values(g, "model" if count == 1 else "depth", count)
        if (g.knob, g.source) in owners and len(g.axes) > count
        else g
        for g in form.space.groups
    ]
    return refitted(form, groups)


def tied_components(form: Form, owners: Sequence[Owner]) -> Form | None:
    """The form with one group for all components in each of some coefficients; None if it has that already."""
    groups: list[Group] = []
    for group in form.space.groups:
        owner = (group.knob, group.source)
        all_of_it = [g for g in form.space.groups if (g.knob, g.source) == owner]
        if owner not in owners or len(all_of_it) == 1:
            groups.append(group)
        elif group.component == "default":
            finest = max((g for g in all_of_it if not g.idle), key=lambda g: len(g.axes))
            groups.append(with_values(replace(finest, component="default"), finest.granularity, len(finest.axes)))
    return refitted(form, groups)


def refitted(form: Form, groups: Sequence[Group]) -> Form | None:
    """The form with other groups, at the nearest point to what it was; None if that has no fewer coefficients."""
    space = replace(form.space, groups=tuple(groups))
    near = nearest_point(space, form.recipe)
    found = None if near is None else replace(form, space=space, point=near.point)
    return found if found is not None and found.count < form.count else None


def rounded(form: Form, decimals: int) -> Form | None:
    """The form with its coefficients rounded; None if it is rounded already, or would leave the method's bounds."""
    point = {axis: round(value, decimals) + 0.0 for axis, value in form.point.items()}
    inside = all(g.low <= point[axis] <= g.high for g in form.free() for axis in g.axes)
    empty = any(point[axis] == 0 for g in form.free() if g.knob == "density" for axis in g.axes)
    return replace(form, point=point, decimals=decimals) if inside and not empty and point != form.point else None


async def simplest(form: Form, keep: Keep) -> Form:
    """Simplify a form step by step.  keep: is asked about every step, and stops nothing but that step."""

    async def try_(tried: Form | None, what: str) -> bool:
        nonlocal form
        if tried is None or not await keep(tried, what):
            return False
        form = tried
        return True

    for name in sorted(form.sources, key=form.weight):
        await try_(without_source(form, name), f"without {name}")
    deep = [owner for owner, groups in form.owners().items() if any(len(g.axes) > 1 for g in groups)]
    if not await try_(tied_along_depth(form, deep, 1), "one value along the depth"):
        for owner in deep if len(deep) > 1 else []:
            await try_(tied_along_depth(form, [owner], 1), f"one value along the depth for {text_of(owner)}")
        for owner in deep:
            await try_(tied_along_depth(form, [owner], KNOTS), f"{KNOTS} knots along the depth for {text_of(owner)}")
    broad = [owner for owner, groups in form.owners().items() if len(groups) > 1]
    if not await try_(tied_components(form, broad), "one value for all components") and len(broad) > 1:
        for owner in broad:
            await try_(tied_components(form, [owner]), f"one value for all components for {text_of(owner)}")
    for decimals in DECIMALS:
        await try_(rounded(form, decimals), f"rounded to {decimals} decimal{'s' * (decimals > 1)}")
    return form


def most_steps(space: Space) -> int:
    """How many recipes a simplification scores at most, the candidate included.  space: of the search."""
    owners = len({(g.knob, g.source) for g in space.groups if not g.fixed})
    return 1 + len(space.config.sources) + 2 + 3 * owners + len(DECIMALS)


def text_of(owner: Owner) -> str:
    return owner[0] if owner[1] is None else f"{owner[0]} of {owner[1]}"


@dataclass(frozen=True)
class Simplified:
    """A simplified candidate, and what it leaves out, in words."""

    recipe: Recipe
    sentence: str


def sentence_of(before: Form, after: Form) -> str:
    """What a simplification has left out."""
    parts = []
    if gone := [name for name in before.sources if name not in after.sources]:
        parts.append(f"{len(after.sources)} sources instead of {len(before.sources)} (without {', '.join(gone)})")
    if after.count < before.count:
        parts.append(f"{after.count} coefficient{'s' * (after.count != 1)} instead of {before.count}")
    if after.decimals is not None:
        parts.append(f"rounded to {after.decimals} decimal{'s' * (after.decimals > 1)}")
    return f"Simplified: {', '.join(parts)}."


async def simplify(
    space: Space, evaluations: Evaluations, recipe: Recipe, margin: float, log: Callable[[str], None]
) -> list[Simplified]:
    """Simpler recipes, the simplest first, of which the search split's items show no loss beyond a margin.

    space: of the search.
    recipe: the candidate.
    margin: the largest loss of the mean metric.
    log: takes one line for each step.

    Each has one step less than the one before.  None at all if nothing can be left out; a line says why.
    """
    if (form := form_of(space, recipe)) is None:
        log("simplify: the candidate's coefficients cannot be made fewer")
        return []
    kept: list[Form] = []
    judge = NoLoss(evaluations, await evaluations.score("search", recipe, "candidate", everything=True), margin)
    equal = judge.metric_difference(judge.candidate)
    if equal.low is None or equal.low <= -margin:
        least = "" if equal.low is None else f"; give a margin above {-equal.low:.3g}, or more search items"
        log(f"simplify: the search items are too few to exclude a loss of {margin:g}, even of equal models{least}")
        return []

    async def keep(tried: Form, what: str) -> bool:
        try:
            scores = await evaluations.score("search", tried.recipe, f"simplified, {what}", everything=True)
        except (ArithmeticError, RuntimeError) as error:
            log(f"simplify: {what}: no, it cannot be scored: {error}")
            return False
        metric, value = judge.metric_difference(scores), judge.value_difference(scores)
        yes = judge.within(metric, value) and judge.holds_guards(scores)
        log(f"simplify: {what}: {'yes' if yes else 'no'}, metric {difference_text(metric)}")
        kept.extend([tried] * yes)
        return yes

    await simplest(form, keep)
    return [Simplified(simpler.recipe, sentence_of(form, simpler)) for simpler in reversed(kept)]
