"""Baselines: recipes that are evaluated first.  The search starts at the best, and the winner must beat them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.load_merge import load_merge
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.normalization import nonzero_divisor
from evomerge.merge.recipe.coefficients import Coefficient, filtered_values
from evomerge.merge.recipe.pinned_inputs import pin
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.space.config_recipe import config_recipe, config_source, source_key
from evomerge.search.space.space import Point, Space
from evomerge.sources.tensor_names import COMPONENTS, PARTS, TensorRole

Kind = Literal["base", "parent", "uniform", "greedy", "recommended", "given", "start"]
OF_THE_USER = ("given", "start")


@dataclass(frozen=True)
class Baseline:
    """A recipe that the search did not find.

    name: its name in tables.
    kind: `base`, the base model; `parent`, one source; `uniform`, the mean of all; `greedy`, the greedy soup;
        `recommended`, a recipe that papers recommend; `given`, a recipe of the user's; `start`, a point at which
        `start_from` lets the search begin, and which competes as a candidate of the search.
    point: its point in the search space; None if it is outside.
    """

    name: str
    kind: Kind
    recipe: Recipe
    point: Point | None


def baselines(space: Space, first: Sequence[Baseline] = (), tried: Sequence[Baseline] = ()) -> list[Baseline]:
    """The baselines of a search, in the order in which they are evaluated.

    first: those of `start_from` (start_points.py).
    tried: the best recipe of each method that the search could choose (choose_method.py).

    After the first come each source alone, the uniform blend, the recommended recipes, those tried, and the files that
    the configuration lists under `baselines`.  The greedy soup needs the parents' scores and comes later
    (greedy_soup.py).

    Recommended are task arithmetic at 0.5 and 0.8 (Ilharco et al. 2023 find the best scale there for several tasks),
    dare_ties with density and weight 0.5 (the usual starting point), and, where the configuration gives roles, a linear
    blend of 0.65 specialists and 0.35 generalists.

    Raises EvomergeError if a file is not a recipe of this search's models.
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
    files = [Path(path) for path in space.config.baselines]
    own = [Baseline(path.stem, "given", given_recipe(space.config, path), None) for path in files]
    return distinct([*first, *found, *tried, *own], space.layers)


def base_alone(space: Space) -> Baseline:
    """The base model itself as a baseline; the verdict compares the winner with it too."""
    weights = {s.name: 0.0 for s in space.config.sources}
    return Baseline("base", "base", plain_recipe(space, "task_arithmetic", weights, 1.0), None)


def reference(space: Space, known: Sequence[Baseline], name: str) -> Baseline:
    """The model that a guard compares with.

    known: the baselines.  name: `base`, or that of a source.

    Raises EvomergeError if that source is not among the baselines, because another one makes the same model.
    """
    if name == "base":
        return base_alone(space)
    found = next((b for b in known if b.kind == "parent" and b.name == name), None)
    if found is None:
        raise EvomergeError(f"guards: the source {name} makes the same model as another one; name that as `of`")
    return found


def distinct(found: Sequence[Baseline], layers: int) -> list[Baseline]:
    """The baselines without those that make the same model as another.

    Of equal ones the first stays that is not the user's.  The order stays.

    layers: how many the base model has.
    """
    unique: dict[object, Baseline] = {}
    for baseline in sorted(found, key=lambda b: b.kind in OF_THE_USER):
        unique.setdefault(model_key(baseline.recipe, layers), baseline)
    return [baseline for baseline in found if any(baseline is one for one in unique.values())]


def model_key(recipe: Recipe, layers: int) -> object:
    """A key that is equal for recipes that make the same model, rounding aside.

    Recipes of linear and task_arithmetic are compared by the weight of each model in every layer and component.  Of
    other methods only equal recipes have equal keys.

    layers: how many the base model has.
    """
    parameters = [recipe.parameters, *(s.parameters for s in recipe.sources)]
    if recipe.method not in ("linear", "task_arithmetic") or recipe.slices:  # one search has one vocabulary
        return recipe.model_dump_json(exclude={"outputs"})
    if any(filtered_values(value) for given in parameters for value in given.values()):
        return recipe.model_dump_json(exclude={"outputs"})
    counts, names = [], [source_key(s) for s in recipe.sources]
    kinds = [(c, None) for c in COMPONENTS] + [(c, p) for c in COMPONENTS for p in PARTS if p.startswith(f"{c}.")]
    for layer, (component, part) in product((None, *range(layers)), kinds):
        where = TensorRole(layer, component, part=part)
        knobs = recipe.knobs(where, layers)
        weights = knobs.each["weight"]
        divisor = nonzero_divisor(sum(weights)) if knobs.shared["normalize"] else 1.0
        scale = knobs.shared.get("lambda", 1.0) / divisor
        per_model = {s: round(scale * w, 9) for s, w in zip(names, weights, strict=True)}
        rest = 1.0 - sum(per_model.values()) if recipe.method == "task_arithmetic" else 0.0
        per_model[recipe.base.path] = round(per_model.get(recipe.base.path, 0.0) + rest, 9)
        counts.append(frozenset((path, amount) for path, amount in per_model.items() if amount))
    return frozenset(recipe.keep), *counts


def given_recipe(config: SearchConfig, path: Path) -> Recipe:
    """The recipe of a file of the user's, recipe or mergekit file, with the names of the search's sources.

    Raises EvomergeError if a source is not among the search's, or if the recipe has another `vocabulary`, a source with
    another `recipe`, or `slices` that the search does not have (`space.layers`).
    """
    given = pin(load_merge(path)[0], config.hub)
    recipe = renamed(given, config)
    names = [s.name for s in config.sources]
    if unknown := [s.name for s in recipe.sources if s.name not in names]:
        raise EvomergeError(f"{path}: the source {unknown[0]!r} is not one of the search's: {', '.join(names)}")
    other_layers = bool(recipe.slices) and config.space.layers is None
    own = {old.name: new.name for old, new in zip(given.sources, recipe.sources, strict=True)}
    other_tokens = given.vocabulary is not None and own.get(given.vocabulary, given.vocabulary) != config.vocabulary
    known = {source_key(s) for s in config.sources}
    other_merge = any(s.recipe and source_key(s) not in known for s in recipe.sources)
    if other_layers or other_tokens or other_merge:
        raise EvomergeError(
            f"{path}: a baseline is merged into the search's own model, so it cannot have `slices`, another "
            "`vocabulary` or a source with another `recipe`; "
            "merge it with `evomerge merge` and compare with `evomerge evaluate`"
        )
    return recipe


def renamed(recipe: Recipe, config: SearchConfig) -> Recipe:
    """A recipe with the names that a search gives to its sources, by their paths, and with the search's settings."""
    names = {source_key(s): s.name for s in config.sources}
    sources = [s.model_copy(update={"name": names.get(source_key(s), s.name)}) for s in recipe.sources]
    allowed = config.allow_differences  # the same models, so an export opens them in the same way
    own = {"dtype": config.dtype, "vocabulary": config.vocabulary, "allow_differences": allowed}
    return recipe.model_copy(update={"sources": sources, **own})


def in_space(
    space: Space, name: str, kind: Kind, weights: dict[str, float], method: str, density: float = 1.0
) -> Baseline:
    """A baseline by the weights of its sources.

    weights: source -> its weight.
    method: in which these weights are meant.
    density: of every source.

    It is a point of the space where the search's method makes the same model of these weights and they lie within the
    bounds, else a recipe outside the space.  Weights that add up to 1 mean the same in linear and task_arithmetic.
    """
    own = space.config.method
    if space.assembly is not None and kind == "parent":
        alone = space.assembly.whole(name)
        return Baseline(name, kind, space.recipe(alone), alone)
    same = own == method or ({own, method} == {"linear", "task_arithmetic"} and abs(sum(weights.values()) - 1) < 1e-9)
    kept = kind == "parent" and "weight" in METHODS[own].knobs and METHODS[own].keeps_parent
    if same or kept:
        each = {s: {"weight": w, "density": density} for s, w in weights.items()}
        point = space.point(each, {"lambda": 1.0})
        if point is not None:
            return Baseline(name, kind, space.recipe(point), point)
    return Baseline(name, kind, plain_recipe(space, method, weights, density), None)


def plain_recipe(space: Space, method: str, weights: dict[str, float], density: float) -> Recipe:
    """A recipe of `method` with one weight per source and one density.  Sources of weight 0 are left out.

    weights: source -> its weight.
    """
    knobs = METHODS[method].knobs
    sources = []
    for source in space.config.sources:
        parameters: dict[str, Coefficient] = {"weight": weights[source.name]}
        if "density" in knobs:
            parameters["density"] = density
        sources.append(config_source(source.model_copy(update={"statistics": None}), parameters))
    sources = [s for s in sources if weights[s.name] != 0.0] or sources[:1]  # a recipe has at least one
    return config_recipe(space.config, sources, method=method, keep=space.keep)
