"""The search space: named axes between bounds; from a point to a recipe and back.

From a point to a recipe (`Space.recipe`):

    point              {"weight.rev.mlp.depth0": 0.2, "weight.rev.mlp.depth1": 0.8, "weight.rev.depth0": ...}
    values of a group  [0.2, 0.8], of the group with knob `weight`, source `rev`, component `mlp`
    spread             [0.2, 0.4, 0.6, 0.8], one value per layer
    coefficient        {"mlp": [0.2, 0.4, 0.6, 0.8], "default": [...]}, all groups of one knob and source
    recipe             the coefficients of every knob, under its source or under `parameters`

From a recipe to the nearest point: nearest.py.  Where whole layers are chosen (`space.layers`) there are no
coefficients, and layer_assembly.py does both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import FloatDistribution

from evomerge.config.schema import SearchConfig
from evomerge.config.space import Axis, Granularity, SpaceConfig
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import Coefficient, PerLayer
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.space import order
from evomerge.search.space.config_recipe import config_recipe, config_source
from evomerge.search.space.layer_assembly import Assembly, AxisDistribution, build_assembly
from evomerge.sources.tensor_names import (
    Component,
    Part,
    TensorRole,
    coefficient_key,
    layer_count,
    tensor_role,
    towers_beside_decoder,
)

if TYPE_CHECKING:
    from evomerge.sources.open_models import Models

Finest = Component | Part
Point = dict[str, Any]
"""Axis name -> value, a number or the name of a choice: the parameters of one Optuna trial."""

KnobGradient = Mapping[tuple[str, str | None], Mapping[Finest, Sequence[float]]]
"""(Knob, source or None) -> part, or component without parts -> the derivative by the knob there, one a layer."""


@dataclass(frozen=True)
class Group:
    """The axes of one knob of one source in one component.

    knob: as the method names it.
    source: None for a knob that all sources share.
    component: `default` for the components that have no group of their own.
    granularity: how many values there are along the depth, and what they stand for (see `spread`).
    low, high: bounds of every value.
    axes: the names of the values; one for the granularity `model`.
    idle: whether it changes no tensor, because an adapter leaves this component alone.
    """

    knob: str
    source: str | None
    component: str
    granularity: Granularity
    low: float
    high: float
    axes: tuple[str, ...]
    idle: bool = False

    @property
    def fixed(self) -> bool:
        """Whether its values are no axes of the search."""
        return self.low == self.high


@dataclass(frozen=True)
class Space:
    """What may vary in one search.

    config: the search's.
    layers: how many the base model has.
    groups: every knob of the method, the fixed ones too.
    tensors: names of the base model's tensors.
    reach: source -> the parts, or components without parts, that it can change; empty: all sources change all of them.
    assembly: where layers are chosen; there are no groups then.
    keep: components that every candidate takes from the base (`kept_towers`).
    """

    config: SearchConfig
    layers: int
    groups: tuple[Group, ...]
    tensors: tuple[str, ...] = ()
    reach: Mapping[str, frozenset[str]] = field(default_factory=dict)
    assembly: Assembly | None = None
    keep: tuple[Component, ...] = ()

    @property
    def axes(self) -> dict[str, FloatDistribution]:
        """Coefficient by axis name -> its bounds, in a fixed order.  Fixed groups have no axes."""
        found = {a: FloatDistribution(g.low, g.high) for g in self.groups if not g.fixed for a in g.axes}
        return found | dict.fromkeys(self.given_order, FloatDistribution(0.0, 1.0))

    @property
    def given_order(self) -> dict[str, float]:
        """Where the order of the sources is searched: axis name -> its value for the configuration's order."""
        return order.point_of([s.name for s in self.config.sources]) if order.is_searched(self.config) else {}

    @property
    def ties(self) -> dict[str, str]:
        """Axis name -> the name of its group: of its knob, source and component.  A source's place is a group."""
        named = {".".join(filter(None, (g.knob, g.source, g.component))): g for g in self.groups if not g.fixed}
        return {axis: name for name, group in named.items() for axis in group.axes} | self.alone

    @property
    def pairs(self) -> dict[str, str]:
        """Axis name -> its knob and source."""
        free = [group for group in self.groups if not group.fixed]
        return {axis: ".".join(filter(None, (g.knob, g.source))) for g in free for axis in g.axes} | self.alone

    @property
    def alone(self) -> dict[str, str]:
        """The axes that belong to no group -> their names."""
        return {axis: axis for axis in self.given_order}

    @property
    def distributions(self) -> dict[str, AxisDistribution]:
        """All axes, what may be chosen included, in a fixed order."""
        return dict(self.axes) | (self.assembly.distributions if self.assembly else {})

    def recipe(self, point: Mapping[str, Any]) -> Recipe:
        """The recipe at a point; it has a value for every knob of the method."""
        if self.assembly is not None:
            return self.assembly.recipe(point)
        by_component: dict[tuple[str, str | None], dict[str, PerLayer]] = {}  # (knob, source) -> component -> values
        for group in self.groups:
            values = [group.low if group.fixed else point[a] for a in group.axes]
            per_layer = spread(values, group.granularity, self.layers)
            by_component.setdefault((group.knob, group.source), {})[group.component] = per_layer
        shared: dict[str, Coefficient] = {}
        per_source: dict[str, dict[str, Coefficient]] = {s.name: {} for s in self.config.sources}
        knobs = METHODS[self.config.method].knobs
        for (knob, source), components in by_component.items():
            value: Coefficient = components["default"] if len(components) == 1 else components
            if knobs[knob].switch:
                value = bool(value)
            elif knobs[knob].choices:
                value = next(name for name, number in knobs[knob].choices.items() if number == value)
            (per_source[source] if source else shared)[knob] = value
        by_name = {s.name: s for s in self.config.sources}
        names = order.order_at(point, list(by_name)) if self.given_order else by_name
        sources = [config_source(by_name[n], per_source[n]) for n in names]
        return config_recipe(self.config, sources, shared, keep=self.keep)

    def gradient(self, by_knob: KnobGradient) -> Point:
        """The derivative by each axis, from the derivatives by the knobs at every layer and component (chain rule).

        It is 0 for the order of the sources.
        """
        found: Point = dict.fromkeys(self.given_order, 0.0)
        for group in self.groups:
            if group.fixed:
                continue
            own = self.own_components(group)
            per_layer = np.zeros(max(1, self.layers))
            for component, values in by_knob.get((group.knob, group.source), {}).items():
                if coefficient_key(component, own) == group.component:
                    per_layer += values
            for number, axis in enumerate(group.axes):
                one = [float(k == number) for k in range(len(group.axes))]
                found[axis] = float(np.sum(np.asarray(spread(one, group.granularity, self.layers)) * per_layer))
        return found

    def point(self, each: Mapping[str, Mapping[str, float]], shared: Mapping[str, float]) -> Point | None:
        """The point where knobs have the same value everywhere in the model; None if it lies outside the bounds.

        each: source -> knob -> value.
        shared: knob -> value, of the knobs that all sources share.

        Knobs that are not named take the method's default, and the sources have the configuration's order.  A layer
        assembly has no such points.
        """
        if self.assembly is not None:
            return None
        point: Point = dict(self.given_order)
        for group in self.groups:
            given = each.get(group.source, {}) if group.source else shared
            default = METHODS[self.config.method].knobs[group.knob].default
            value = given.get(group.knob, default)
            if group.idle:
                continue
            if value is None or not group.low <= value <= group.high:
                return None
            if not group.fixed:
                point |= dict.fromkeys(group.axes, float(value))
        return point

    def own_components(self, group: Group) -> set[str]:
        """The components for which a group's knob and source have groups of their own, and `default`."""
        return {g.component for g in self.groups if (g.knob, g.source) == (group.knob, group.source)}

    def places(self, group: Group) -> list[TensorRole]:
        """The tensors that a group is for and that its source (without one, any source) can change."""
        own = self.own_components(group)
        found = [tensor_role(name) for name in self.tensors]
        found = [p for p in found if coefficient_key(p.finest, own) == group.component]
        reach = self.reach.get(group.source) if group.source else frozenset[str]().union(*self.reach.values())
        return [p for p in found if coefficient_key(p.finest, reach) != "default"] if reach else found


def changed_components(models: "Models") -> dict[str, set[Finest]]:
    """Source -> the parts, or components without parts, in which it can differ; an adapter leaves some alone."""
    found = {}
    for name, source in models.sources.items():
        touched = [t for t in models.base.tensors if source.may_differ(t)]
        found[name] = {tensor_role(t).finest for t in touched}
    return found


def kept_towers(config: SearchConfig, names: Sequence[str]) -> tuple[Component, ...]:
    """The towers beside a language model, without those that the configuration names under `components`.

    names: of the base's tensors.
    """
    given = config.space.axes(METHODS[config.method]).values()
    axes = [*given, *(axis for source in config.space.sources.values() for axis in source.values())]
    named = {*config.space.components, *(c for axis in axes for c in axis.components or ())}
    return tuple(c for c in towers_beside_decoder(names) if c not in named)


def build_space(config: SearchConfig, models: "Models") -> Space:
    """The search space of a configuration.

    The towers of a model that sees or hears are the base's, unless the configuration names them.  An axis that would
    change nothing (a component that an adapter leaves alone) is fixed at its lower bound.
    """
    layers = layer_count(list(models.base.tensors))
    if (assembly := build_assembly(config, models)) is not None:
        return Space(config, layers, (), tuple(models.base.tensors), assembly=assembly)
    keep = kept_towers(config, list(models.base.tensors))
    changed = {name: parts.difference(keep) for name, parts in changed_components(models).items()}
    method = METHODS[config.method]
    given = config.space.axes(method)
    groups: list[Group] = []
    for knob_name, knob in method.knobs.items():
        for source in [s.name for s in config.sources] if knob.each else [None]:
            axis = given.get(knob_name)
            if source:
                axis = config.space.sources.get(source, {}).get(knob_name, axis)
            if axis is None:
                assert knob.default is not None, f"the configuration was not checked: {knob_name} is missing"
                axis = Axis(low=knob.default, high=knob.default)
            reach = changed[source] if source else set().union(*changed.values())
            groups += component_groups(knob_name, source, axis, config.space, layers, reach)
    found = {name: frozenset[str](components) for name, components in changed.items()}
    return Space(config, layers, tuple(groups), tuple(models.base.tensors), found, keep=keep)


def component_groups(
    knob: str, source: str | None, axis: Axis, space: SpaceConfig, layers: int, reach: set[Finest]
) -> list[Group]:
    """The groups of one knob of one source: one per component that has coefficients of its own, one for the rest.

    axis: bounds, granularity and components of the knob, as configured.
    space: what holds where `axis` says nothing.
    layers: how many the base model has.
    reach: the parts, or components without parts, that the source can change.
    """
    fixed = axis.low == axis.high
    granularity: Granularity = "model" if fixed else axis.granularity or space.granularity
    components = [] if fixed else [*(axis.components if axis.components is not None else space.components)]
    counts = {
        "model": 1,
        "depth": space.knots,
        "group": min(space.groups, max(1, layers)),
        "layer": max(1, layers),
    }
    groups = []
    for component in [*components, "default"]:
        moves = any(coefficient_key(finest, components) == component for finest in reach)
        fine: Granularity = granularity if moves else "model"
        stem = ".".join(p for p in (knob, source, None if component == "default" else component) if p)
        axes = axis_names(stem, fine, counts[fine])
        groups.append(Group(knob, source, component, fine, axis.low, axis.high if moves else axis.low, axes, not moves))
    return groups


def axis_names(stem: str, granularity: Granularity, count: int) -> tuple[str, ...]:
    """The names of a group's axes, `count` of them unless the granularity is `model`."""
    return (stem,) if granularity == "model" else tuple(f"{stem}.{granularity}{k}" for k in range(count))


def spread(values: list[float], granularity: Granularity, layers: int) -> PerLayer:
    """One value per layer from the values of a group.

    values: one for `model`, else one for each knot, group or layer.
    granularity: `model`: one number for all layers, which is returned as it is.  `depth`: the values are knots, evenly
        spaced from the first layer to the last, with straight lines between (as mergekit's gradients).  `group`: each
        value is that of a run of layers; the runs are as equally long as possible.  `layer`: one value for each.
    layers: how many the base model has.
    """
    if granularity == "model":
        return values[0]
    if granularity == "layer":
        return list(values)
    if granularity == "group":
        return [values[min(layer * len(values) // layers, len(values) - 1)] for layer in range(layers)]
    per_layer = []
    for layer in range(layers):
        at = layer / max(1, layers - 1) * (len(values) - 1)  # between two knots
        left = min(int(at), len(values) - 2)
        per_layer.append(values[left] + (values[left + 1] - values[left]) * (at - left))
    return per_layer
