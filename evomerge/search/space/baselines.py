"""Known good points, tried first: they start the search, and the winner must beat them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.read import load_merge
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.recipe.coefficients import Coefficient, named_parts
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, pin
from evomerge.search.space.space import Point, Space
from evomerge.sources.anatomy import COMPONENTS, Place

Kind = Literal["base", "parent", "uniform", "greedy", "recommended", "given"]


@dataclass(frozen=True)
class Baseline:
    """A recipe that nobody searched for.

    name: how tables call it.  point: where it is in the search space, None if it is not in it.
    """

    name: str
    kind: Kind
    recipe: Recipe
    point: Point | None


def baselines(space: Space) -> list[Baseline]:
    """Each source alone, the uniform blend, and the recommended recipes; the greedy soup needs their scores (soup.py).

    Recommended: task arithmetic at 0.5 and 0.8 (Ilharco et al. 2023 find the best scale there for several tasks),
    dare_ties with density and weight 0.5 (the common starting point), and specialists 0.65 to generalists 0.35
    where the configuration gives roles.  `start_from` comes first; last come the recipes that the configuration names.
    """
    names = [s.name for s in space.config.sources]
    count = len(names)
    found = [in_space(space, n, "parent", {s: float(s == n) for s in names}, "linear") for n in names]
    if count > 1:
        found.append(in_space(space, "uniform", "uniform", dict.fromkeys(names, 1.0 / count), "linear"))
        found += [
            in_space(space, f"task_arithmetic {w:g}", "recommended", dict.fromkeys(names, w), "task_arithmetic")
            for w in (0.5, 0.8)
        ]
        found.append(in_space(space, "dare_ties 0.5", "recommended", dict.fromkeys(names, 0.5), "dare_ties", 0.5))
    roles = {s.name: s.role for s in space.config.sources}
    specialists = [n for n in names if roles[n] == "specialist"]
    generalists = [n for n in names if roles[n] == "generalist"]
    if specialists and generalists:
        weights = dict.fromkeys(names, 0.0)
        weights |= dict.fromkeys(specialists, 0.65 / len(specialists))
        weights |= dict.fromkeys(generalists, 0.35 / len(generalists))
        found.append(in_space(space, "specialists 0.65", "recommended", weights, "linear"))
    if space.config.start_from:
        start = given(space, Path(space.config.start_from))
        point = space.point_of(start.recipe)
        found.insert(0, start if point is None else replace(start, recipe=space.recipe(point), point=point))
    return distinct(found + [given(space, Path(path)) for path in space.config.baselines], space.layers)


def base_alone(space: Space) -> Baseline:
    """The base model itself, whose scores a verdict shows beside the others'."""
    weights = {s.name: 0.0 for s in space.config.sources}
    return Baseline("base", "base", plain_recipe(space, "task_arithmetic", weights, 1.0), None)


def distinct(found: Sequence[Baseline], layers: int) -> list[Baseline]:
    """Baselines in their order, one of those that make the same model: the first that is no file of the user's."""
    unique: dict[object, Baseline] = {}
    for baseline in sorted(found, key=lambda b: b.kind == "given"):
        unique.setdefault(model_key(baseline.recipe, layers), baseline)
    return [baseline for baseline in found if any(baseline is one for one in unique.values())]


def model_key(recipe: Recipe, layers: int) -> object:
    """Equal for recipes that make the same model but for rounding.

    Averages and task arithmetic are compared by how much each model counts in every layer and component; of other
    methods only equal recipes make the same model.
    """
    parameters = [recipe.parameters, *(s.parameters for s in recipe.sources)]
    plain = not (recipe.slices or recipe.vocabulary or any(s.recipe for s in recipe.sources))
    if recipe.method not in ("linear", "task_arithmetic") or not plain:
        return recipe.model_dump_json(exclude={"outputs"})
    if any(named_parts(value) for given in parameters for value in given.values()):
        return recipe.model_dump_json(exclude={"outputs"})
    counts = []
    for where in (Place(layer, component) for component in COMPONENTS for layer in (None, *range(layers))):
        knobs = recipe.knobs(where, layers)
        weights = knobs.each["weight"]
        divisor = nonzero_divisor(sum(weights)) if knobs.shared["normalize"] else 1.0
        scale = knobs.shared.get("lambda", 1.0) / divisor
        per_model = {s.path: round(scale * w, 9) for s, w in zip(recipe.sources, weights, strict=True)}
        rest = 1.0 - sum(per_model.values()) if recipe.method == "task_arithmetic" else 0.0
        per_model[recipe.base.path] = round(per_model.get(recipe.base.path, 0.0) + rest, 9)
        counts.append(frozenset((path, amount) for path, amount in per_model.items() if amount))
    return tuple(counts)


def given(space: Space, path: Path) -> Baseline:
    """A recipe or mergekit file of the user's, named by the file.

    Sources are the search's by their paths, else by their names.  EvomergeError if one is not among the search's.
    """
    recipe = pin(load_merge(path)[0], space.config.hub)
    names = {s.path: s.name for s in space.config.sources}
    sources = [s.model_copy(update={"name": names.get(s.path, s.name)}) for s in recipe.sources]
    if unknown := [s.name for s in sources if s.name not in names.values()]:
        raise EvomergeError(
            f"{path}: the source {unknown[0]!r} is not one of the search's: {', '.join(names.values())}"
        )
    if recipe.slices or recipe.vocabulary or any(s.recipe for s in recipe.sources):
        raise EvomergeError(
            f"{path}: a baseline is merged into the search's own model, so it cannot have `slices`, a `vocabulary` or "
            "a source with a `recipe`; merge it with `evomerge merge` and compare with `evomerge evaluate`"
        )
    allowed = space.config.allow_differences  # of the same models, so an export of it opens them alike
    recipe = recipe.model_copy(update={"dtype": space.config.dtype, "sources": sources, "allow_differences": allowed})
    return Baseline(path.stem, "given", recipe, None)


def in_space(
    space: Space, name: str, kind: Kind, weights: dict[str, float], method: str, density: float = 1.0
) -> Baseline:
    """A baseline by weights: a point of the search's own method where that means the same, else a recipe of its own.

    Weights that add up to 1 mean the same in linear and in task arithmetic.
    """
    own = space.config.method
    same = own == method or ({own, method} == {"linear", "task_arithmetic"} and abs(sum(weights.values()) - 1) < 1e-9)
    alone = kind == "parent" and "weight" in METHODS[own].knobs and METHODS[own].keeps_parent
    if same or alone:
        each = {s: {"weight": w, "density": density} for s, w in weights.items()}
        point = space.point(each, {"lambda": 1.0})
        if point is not None:
            return Baseline(name, kind, space.recipe(point), point)
    return Baseline(name, kind, plain_recipe(space, method, weights, density), None)


def plain_recipe(space: Space, method: str, weights: dict[str, float], density: float) -> Recipe:
    """A recipe of `method` with one weight per source and one density.  Sources of weight 0 are left out."""
    knobs = METHODS[method].knobs
    sources = []
    for source in space.config.sources:
        parameters: dict[str, Coefficient] = {"weight": weights[source.name]}
        if "density" in knobs:
            parameters["density"] = density
        sources.append(RecipeSource(name=source.name, path=source.path, parameters=parameters))
    sources = [s for s in sources if weights[s.name] != 0.0] or sources[:1]  # a recipe has at least one
    return Recipe(
        method=method,
        dtype=space.config.dtype,
        seed=space.config.seed,
        base=Model(path=space.config.base),
        sources=sources,
        allow_differences=space.config.allow_differences,
    )
