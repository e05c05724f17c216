"""Layer assembly: every layer of the output is one layer of one source (the data-flow space of Akiba et al. 2024).

The slots are the layers in their order; those of `range` follow one another `passes` times.  A point says for every
slot which source gives its layer, or that there is none:

    4 layers, passes: 2, range: [1, 3]
    slots     layer0   layer1   layer2   layer1.pass1   layer2.pass1   layer3
    point     math     math     code     skip           math           code      and embedding: math, head: code
    recipe    slices   math [0, 2]   code [2, 3]   math [2, 3]   code [3, 4]     by passthrough

`embedding` is the source of what comes before the layers, `head` of what follows them.  With `scale` every slot has a
factor too, of the two matrices that write to the residual stream, so that x + f(x) becomes x + scale f(x).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optuna.distributions import CategoricalDistribution, FloatDistribution

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.coefficients import Coefficient, filtered_values
from evomerge.merge.recipe.recipe import Recipe
from evomerge.merge.recipe.slices import BASE, Slice
from evomerge.search.space.config_recipe import config_recipe, config_source
from evomerge.sources.tensor_names import COMPONENTS, PARTS, TensorRole, tensor_role

if TYPE_CHECKING:
    from evomerge.sources.open_models import Models

AxisDistribution = FloatDistribution | CategoricalDistribution
"""What an axis of a search may be: a coefficient between bounds, or a choice by name."""

SKIP = "skip"  # the choice of a slot that gives no layer
WRITERS = ("attention.o", "mlp.down")  # the matrices that write to the residual stream
EVERYWHERE = [TensorRole(None, c, part=p) for c in COMPONENTS for p in (None, *PARTS) if p is None or p.startswith(c)]


@dataclass(frozen=True)
class Slot:
    """A place for one layer of the output.

    layer: its number in the sources.  passed: how many times it was there before.
    """

    layer: int
    passed: int

    @property
    def name(self) -> str:
        return f"layer{self.layer}" + (f".pass{self.passed}" if self.passed else "")


@dataclass(frozen=True)
class Assembly:
    """The axes of a layer assembly; from a point to a recipe and back.

    config: the search's; its `space.layers` is given.
    layers: how many the base model has.
    slots: in the order of the output.
    """

    config: SearchConfig
    layers: int
    slots: tuple[Slot, ...]

    @property
    def sources(self) -> list[str]:
        return [s.name for s in self.config.sources]

    @property
    def scale(self) -> tuple[float, float] | None:
        """The bounds of the factors; None: all are 1."""
        return self.config.space.layers.scale if self.config.space.layers else None

    def choices(self, slot: Slot) -> list[str]:
        """What a slot may have: a source's name, or SKIP.  A layer's further passes may always be skipped."""
        assert self.config.space.layers is not None, "only such a search has an assembly"
        return self.sources + [SKIP] * (self.config.space.layers.skip or slot.passed > 0)

    @property
    def distributions(self) -> dict[str, AxisDistribution]:
        """Axis name -> its choices or bounds, in a fixed order.  What has one choice only is no axis."""
        choices = {"embedding": self.sources} | {s.name: self.choices(s) for s in self.slots} | {"head": self.sources}
        found: dict[str, AxisDistribution] = {
            name: CategoricalDistribution(several) for name, several in choices.items() if len(several) > 1
        }
        if self.scale is not None:
            found |= {f"scale.{s.name}": FloatDistribution(*self.scale) for s in self.slots}
        return found

    def whole(self, source: str) -> dict[str, Any]:
        """The point of a source as it is."""
        chosen = {s.name: SKIP if s.passed else source for s in self.slots}
        return self.point(source, source, chosen, {})

    def point(
        self, embedding: str, head: str, chosen: Mapping[str, str], scales: Mapping[str, float]
    ) -> dict[str, Any]:
        """A point.  chosen: slot -> source or SKIP.  scales: slot -> factor, 1 where none is given."""
        given: dict[str, Any] = {"embedding": embedding, "head": head, **chosen}
        if self.scale is not None:
            low, high = self.scale
            given |= {f"scale.{s.name}": min(max(scales.get(s.name, 1.0), low), high) for s in self.slots}
        return {name: given[name] for name in self.distributions}

    def recipe(self, point: Mapping[str, Any]) -> Recipe:
        """The recipe at a point.  A source that gives everything is that source, without slices.

        Without any layer there is no model, so the last layer stays, from the source of the head.
        """
        only = self.sources[0]  # where there is no axis
        embedding, head = point.get("embedding", only), point.get("head", only)
        rows = [(s, source) for s in self.slots if (source := point.get(s.name, only)) != SKIP]
        rows = rows or [(self.slots[-1], head)]
        scales = [point.get(f"scale.{s.name}", 1.0) for s, _ in rows]
        slices = slices_of([(source, s.layer) for s, source in rows], embedding, head)
        whole = slices == [Slice(layers={embedding: (0, self.layers)})]
        used = {name for part in slices for name in part.layers}
        by_matrix: dict[str, Any] = dict.fromkeys(WRITERS, scales)
        scaled = any(scale != 1.0 for scale in scales)
        return config_recipe(
            self.config,
            [config_source(s) for s in self.config.sources if s.name in used],
            {"scale": by_matrix | {"default": 1.0}} if scaled else {},
            slices=[] if whole else slices,
        )

    def point_of(self, recipe: Recipe) -> dict[str, Any] | None:
        """A point that gives the model of a recipe; None if there is none.  Seeds are not compared."""
        if recipe.method != self.config.method or {s.name for s in recipe.sources} - set(self.sources):
            return None
        slices = recipe.slices or [Slice(layers={recipe.sources[0].name: (0, self.layers)})]
        if any(len(part.layers) > 1 or BASE in part.layers for part in slices):
            return None
        rows = [(name, at) for part in slices for name, (start, end) in part.layers.items() for at in range(start, end)]
        scales = self.scales_of(recipe, rows)
        places = find_in_order(rows, self.slots)
        if not rows or scales is None or places is None:
            return None
        chosen = {s.name: SKIP for s in self.slots} | {
            slot.name: source for slot, (source, _) in zip(places, rows, strict=True)
        }
        if any(chosen[s.name] not in self.choices(s) for s in self.slots):
            return None
        embedding, head = (next(iter(part.layers)) for part in (slices[0], slices[-1]))
        return self.point(embedding, head, chosen, {s.name: x for s, x in zip(places, scales, strict=True)})

    def scales_of(self, recipe: Recipe, rows: Sequence[tuple[str, int]]) -> list[float] | None:
        """The factor of each layer of a recipe; None if no point has such factors.  rows: (source, its layer)."""
        given: list[Coefficient] = [*recipe.parameters.values()]
        given += [c for s in recipe.sources for c in s.parameters.values()]
        if any(map(filtered_values, given)):
            return None
        low, high = self.scale or (1.0, 1.0)
        found: list[float] = []
        for number, (source, _) in enumerate(rows):
            writers: set[float] = set()
            others: set[float] = set()
            for place in EVERYWHERE:
                knobs = recipe.knobs(replace(place, layer=number), len(rows), [source])
                (writers if place.part in WRITERS else others).update(knobs.each["scale"])
            if others != {1.0} or len(writers) > 1 or not low <= min(writers) <= high:
                return None
            found += writers
        return found

    @property
    def deepest(self) -> list[Slice]:
        """Slices of all models that have a layer for every slot: what the live model must have room for."""
        runs: list[list[int]] = []
        for slot in self.slots:
            if runs and runs[-1][1] == slot.layer:
                runs[-1][1] += 1
            else:
                runs.append([slot.layer, slot.layer + 1])
        return [Slice(layers=dict.fromkeys([BASE, *self.sources], (start, end))) for start, end in runs]


def slices_of(rows: Sequence[tuple[str, int]], embedding: str, head: str) -> list[Slice]:
    """The fewest slices for the layers of an output.

    rows: (source, its layer).  embedding, head: the sources of what comes before and after the layers.
    """
    runs: list[tuple[str, int, int]] = []
    for source, layer in rows:
        if runs and (runs[-1][0], runs[-1][2]) == (source, layer):
            runs[-1] = (source, runs[-1][1], layer + 1)
        else:
            runs.append((source, layer, layer + 1))
    if runs[0][0] != embedding:
        runs.insert(0, (embedding, 0, 0))
    if runs[-1][0] != head:
        runs.append((head, 0, 0))
    return [Slice(layers={source: (start, end)}) for source, start, end in runs]


def find_in_order(rows: Sequence[tuple[str, int]], slots: Sequence[Slot]) -> list[Slot] | None:
    """The first slot for each layer, in order; None if they have no such order.  rows: (source, its layer)."""
    left = iter(slots)
    found = [next((slot for slot in left if slot.layer == layer), None) for _, layer in rows]
    return None if None in found else [slot for slot in found if slot is not None]


def build_assembly(config: SearchConfig, models: "Models") -> Assembly | None:
    """The layer assembly of a configuration; None if it has no `space.layers`.

    EvomergeError if the range of the passes is not one of the models' layers, if the models' layers do not fit
    together, or if `scale` has no matrix to act on.
    """
    if (options := config.space.layers) is None:
        return None
    from evomerge.merge.recipe.layout import build_layout  # they import torch
    from evomerge.merge.recipe.sliced_config import find_layer_stack

    depth = find_layer_stack(BASE, models.base).depth
    start, end = options.range or (0, depth)
    if end > depth:
        raise EvomergeError(f"space.layers.range: [{start}, {end}] goes beyond the {depth} layers of the base model")
    slots = [Slot(k, 0) for k in range(start)]
    slots += [Slot(k, passed) for passed in range(options.passes) for k in range(start, end)]
    slots += [Slot(k, 0) for k in range(end, depth)]
    found = Assembly(config, depth, tuple(slots))
    layout = build_layout(models, found.deepest)
    parts = {tensor_role(name).part for name in layout.tensors}
    if options.scale is not None and (lacking := [matrix for matrix in WRITERS if matrix not in parts]):
        raise EvomergeError(f"space.layers.scale: the models have no tensor {lacking[0]}, which it would scale")
    return found
