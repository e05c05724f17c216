"""From a recipe to the point of a search space whose recipe is the most similar.

The values x of a group (knots, runs of layers) give its coefficient at every tensor by a linear map S (`spread`).  With
c, the recipe's coefficients there:

    minimise  |S x - c|^2    with    low <= x <= high

Every tensor counts once.  For a recipe that the space can express, S x = c, so its own point is found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.config.space import Granularity
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import is_named
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.space import order
from evomerge.search.space.space import Group, Point, Space, spread
from evomerge.sources.tensor_names import TensorRole, coefficient_layer

Vector = NDArray[np.float64]
AtTensor = tuple[TensorRole, float]  # a tensor and the coefficient there

EXACT = 1e-9  # a difference of coefficients that is rounding
SWEEPS = 10_000  # of coordinate descent, at most; more knots than layers need thousands
CONVERGED = 1e-12  # a sweep that changes no value by more is the last


@dataclass(frozen=True)
class Nearest:
    """The nearest point to a recipe.

    difference: the largest one between a coefficient of the recipe and of the point's recipe, over all tensors.
    where: the coefficient and the tensor that have it.
    """

    point: Point
    difference: float
    where: str

    @property
    def exact(self) -> bool:
        """Whether the point's recipe is the recipe itself."""
        return self.difference <= EXACT


def nearest_point(space: Space, recipe: Recipe) -> Nearest | None:
    """The nearest point to a recipe in a space.  Seeds are not compared.

    A source that the recipe does not have gets weight 0, and is the last in the order.  None if there is no such point:
    the recipe has another method, a source that the space does not have, or another value of a switch; or it lacks a
    source and the method has no weights; or it merges in an order that is not searched; or its layers are not the
    space's, or are chosen in this space otherwise.
    """
    if space.assembly is not None:
        found = space.assembly.point_of(recipe)
        return None if found is None else Nearest(found, 0.0, "")
    sources = {s.name: i for i, s in enumerate(recipe.sources)}
    own = [s.name for s in space.config.sources]
    names = set(own)
    knobs = METHODS[space.config.method].knobs
    if recipe.method != space.config.method or sources.keys() - names:
        return None
    if names - sources.keys() and "weight" not in knobs:
        return None
    merged = [*sources, *(name for name in own if name not in sources)]
    point: Point = order.point_of(merged) if space.given_order else {}
    least = METHODS[recipe.method].ordered
    moved = list(sources) != [name for name in own if name in sources]
    if moved and not space.given_order and least is not None and len(sources) >= least:
        return None
    difference, where = 0.0, ""
    for group in space.groups:
        if group.idle:
            continue
        wanted = coefficients(space, group, recipe, sources)
        values = nearest_values(wanted, group, space.layers, knobs[group.knob].default or 0.0)
        along = per_layer(values, group.granularity, space.layers)
        for place, value in wanted:
            gap = abs(float(along[coefficient_layer(place, space.layers)]) - value)
            if gap > EXACT and is_named(knobs[group.knob]):
                return None
            if gap > difference:
                difference = gap
                where = f"{group.knob}{f' of {group.source}' if group.source else ''} at {place.tensor}"
        if not group.fixed:
            point |= dict(zip(group.axes, values, strict=True))
    return Nearest(point, difference, where)


def coefficients(space: Space, group: Group, recipe: Recipe, sources: Mapping[str, int]) -> list[AtTensor]:
    """The recipe's coefficient at every tensor that a group is for and can change.

    sources: source -> its place in the recipe.

    For a source that the recipe lacks the weight is 0, and other coefficients do not matter.
    """
    places = space.places(group)
    if group.source and group.source not in sources:
        return [(place, 0.0) for place in places] if group.knob == "weight" else []
    found = []
    for place in places:
        knobs = recipe.knobs(place, space.layers)
        value = knobs.each[group.knob][sources[group.source]] if group.source else knobs.shared[group.knob]
        found.append((place, value))
    return found


def nearest_values(wanted: Sequence[AtTensor], group: Group, layers: int, default: float) -> list[float]:
    """The values of a group that come nearest to coefficients of tensors.

    wanted: tensors with their coefficients.  default: the value where there is no tensor.

    Where the tensors leave a value open (a knot that no layer depends on), it is interpolated.
    """
    count = len(group.axes)
    if group.fixed or not wanted:
        return [float(np.clip(default, group.low, group.high))] * count
    by_layer: dict[int, list[float]] = {}
    for place, value in wanted:
        by_layer.setdefault(coefficient_layer(place, layers), []).append(value)
    depths = sorted(by_layer)
    means = np.array([np.mean(by_layer[d]) if len(set(by_layer[d])) > 1 else by_layer[d][0] for d in depths])
    weights = np.sqrt([len(by_layer[d]) for d in depths])  # (n,) of n layers
    units = np.eye(count)
    matrix = np.stack([per_layer(list(u), group.granularity, layers)[depths] for u in units], axis=1)  # (n, count)
    guess = interpolated(depths, means, group.granularity, count, layers)
    left, right = matrix * weights[:, None], (means - matrix @ guess) * weights
    values = guess + np.linalg.lstsq(left, right, rcond=None)[0]
    inside = np.clip(values, group.low, group.high)
    if np.abs(inside - values).max() > EXACT:
        inside = within_bounds(left, means * weights, inside, group.low, group.high)
    return [float(value) for value in inside]


def within_bounds(left: Vector, right: Vector, start: Vector, low: float, high: float) -> Vector:
    """Minimise |left x - right|^2 over low <= x <= high by coordinate descent.

    left: (n, count).  right: (n,).  start: (count,), within the bounds.
    """
    gram, linear = left.T @ left, left.T @ right  # (count, count), (count,)
    values = start.copy()
    for _ in range(SWEEPS):
        before = values.copy()
        for k in np.flatnonzero(np.diag(gram) > 0):
            values[k] = np.clip(values[k] + (linear[k] - gram[k] @ values) / gram[k, k], low, high)
        if np.abs(values - before).max() <= CONVERGED:
            break
    return values


def per_layer(values: list[float], granularity: Granularity, layers: int) -> Vector:
    """`spread` as an array with one value per layer, for the granularity `model` too."""
    along = spread(values, granularity, layers)
    return np.asarray(along if isinstance(along, list) else [along] * max(1, layers), dtype=np.float64)


def interpolated(depths: list[int], known: Vector, granularity: Granularity, count: int, layers: int) -> Vector:
    """A guess of the values of a group: what lies at its knots and layers, straight lines between known layers.

    depths: the known layers, sorted.  known: (n,) their coefficients.

    It is exact for values that `spread` made, unless a knot of `depth` lies between two layers.
    """
    if granularity == "model":
        return known[:1].copy()
    values = np.interp(range(layers), depths, known)  # (layers,)
    if granularity == "depth":
        values = np.interp(np.linspace(0, layers - 1, count), range(layers), values)
    if granularity == "group":
        values = values[[-(-k * layers // count) for k in range(count)]]  # the first layer of each group
    return np.asarray(values, dtype=np.float64)
