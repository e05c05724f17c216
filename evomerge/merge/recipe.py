"""The recipe: a complete description of one merge, and the only input of materialisation."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evomerge.errors import EvomergeError
from evomerge.files import read_yaml, sha256
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Knob, Knobs
from evomerge.sources.anatomy import COMPONENTS, Place, relative_depth
from evomerge.sources.locate import fingerprint, locate, looks_like_hub_id

Number = Annotated[float, Field(allow_inf_nan=False)]
PerLayer = Number | list[Number]
Coefficient = bool | PerLayer | dict[str, PerLayer]
"""A number; a list of one number per layer; or either of them per component, with `default` for the rest."""

Dtype = Literal["float32", "bfloat16", "float16"]


class Model(BaseModel):
    """A model that goes into a merge: a folder or a hub id, and the SHA-256 of its files once they are known."""

    model_config = ConfigDict(extra="forbid")
    path: str
    sha256: dict[str, str] = {}


class RecipeSource(Model):
    """statistics: the file of `evomerge statistics` for the methods that need one, and its SHA-256 once known."""

    name: str
    statistics: str | None = None
    statistics_sha256: str | None = None
    parameters: dict[str, Coefficient] = {}


class Recipe(BaseModel):
    """One merge.

    Coefficients are looked up by layer and component: tensors before the stack (embeddings) take the first
    layer's value, those after it (final norm, head) the last layer's.
    """

    model_config = ConfigDict(extra="forbid")
    recipe: Literal[1] = 1
    method: str
    dtype: Dtype = "bfloat16"
    seed: int = Field(default=0, ge=0, lt=2**63)
    base: Model
    sources: list[RecipeSource] = Field(min_length=1)
    parameters: dict[str, Coefficient] = {}
    outputs: dict[str, str] = {}

    @model_validator(mode="after")
    def check_against_method(self) -> "Recipe":
        if problems := recipe_problems(self):
            raise ValueError("; ".join(problems))
        return self

    def knobs(self, where: Place, layers: int) -> Knobs:
        """The values of all knobs for a tensor at `where` in a model of `layers` layers."""
        each: dict[str, tuple[float, ...]] = {}
        shared: dict[str, float] = {}
        for name, knob in METHODS[self.method].knobs.items():
            if knob.each:
                each[name] = tuple(
                    value_at(s.parameters.get(name, self.parameters.get(name, knob.default)), where, layers)
                    for s in self.sources
                )
            else:
                shared[name] = value_at(self.parameters.get(name, knob.default), where, layers)
        return Knobs(each, shared)


def value_at(coefficient: Coefficient | None, where: Place, layers: int) -> float:
    """The number that a coefficient has at a place."""
    assert coefficient is not None, "a required knob was not checked"
    if isinstance(coefficient, dict):
        coefficient = coefficient.get(where.component, coefficient.get("default", 0.0))
    if isinstance(coefficient, list):
        return float(coefficient[relative_depth(where, layers)])
    return float(coefficient)


def numbers(coefficient: Coefficient) -> list[float]:
    """Every number that a coefficient can give."""
    parts = list(coefficient.values()) if isinstance(coefficient, dict) else [coefficient]
    return [float(x) for part in parts for x in (part if isinstance(part, list) else [part])]


def recipe_problems(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe beyond its types: unknown method or knob, values out of range, counts."""
    method = METHODS.get(recipe.method)
    if method is None:
        return [f"method: {recipe.method!r} is not one of {', '.join(METHODS)}"]
    problems = []
    least, most = method.sources
    if len(recipe.sources) < least or (most is not None and len(recipe.sources) > most):
        allowed = f"{least}" if most == least else f"{least} to {most}" if most else f"at least {least}"
        problems.append(f"sources: {recipe.method} takes {allowed}, here are {len(recipe.sources)}")
    if method.statistics and (lacking := [s.name for s in recipe.sources if s.statistics is None]):
        problems.append(
            f"sources.{lacking[0]}.statistics: {recipe.method} needs a file there; make it with "
            f"`evomerge statistics --kind {method.statistics}`"
        )
    names = [s.name for s in recipe.sources]
    if len(set(names)) < len(names):
        problems.append("sources: two have the same name")
    places: list[tuple[str, dict[str, Coefficient], str | None]] = [("parameters", recipe.parameters, None)]
    places += [(f"sources.{s.name}.parameters", s.parameters, s.name) for s in recipe.sources]
    for where, parameters, source in places:
        for name, coefficient in parameters.items():
            knob = method.knobs.get(name)
            if knob is None or (source and not knob.each):
                allowed = ", ".join(k for k, v in method.knobs.items() if v.each or not source)
                problems.append(f"{where}.{name}: not a coefficient of {recipe.method} here; allowed: {allowed}")
            else:
                problems += coefficient_problems(f"{where}.{name}", coefficient, knob)
    for name, knob in method.knobs.items():
        silent = [s.name for s in recipe.sources if name not in s.parameters] if knob.each else [""]
        if knob.default is None and name not in recipe.parameters and silent:
            problems.append(f"{name}: must be given" + (f" for {', '.join(silent)}" if knob.each else ""))
    return problems


def coefficient_problems(where: str, coefficient: Coefficient, knob: Knob) -> list[str]:
    if isinstance(coefficient, dict):
        unknown = set(coefficient) - {*COMPONENTS, "default"}
        if unknown:
            return [f"{where}: {min(unknown)!r} is not a component; allowed: {', '.join(COMPONENTS)}, default"]
        if "default" not in coefficient and len(coefficient) < len(COMPONENTS):
            return [f"{where}: needs `default` for the components it does not name"]
    if any(isinstance(part, list) and not part for part in as_parts(coefficient)):
        return [f"{where}: an empty list"]
    outside = [x for x in numbers(coefficient) if not knob.low <= x <= knob.high]
    return [f"{where}: {outside[0]} is outside {knob.low:g} to {knob.high:g}"] if outside else []


def as_parts(coefficient: Coefficient) -> list[Any]:
    return list(coefficient.values()) if isinstance(coefficient, dict) else [coefficient]


def check_layers(recipe: Recipe, layers: int) -> None:
    """Lists in a recipe must have one number per layer.  EvomergeError names the one that does not."""
    owners = [("parameters", recipe.parameters)]
    owners += [(f"sources.{s.name}.parameters", s.parameters) for s in recipe.sources]
    for where, parameters in owners:
        for name, coefficient in parameters.items():
            for part in as_parts(coefficient):
                if isinstance(part, list) and len(part) != layers:
                    raise EvomergeError(
                        f"{where}.{name}: has {len(part)} values, but the base model has {layers} layers"
                    )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.  EvomergeError lists everything that is wrong with it.  Relative model paths are
    taken from the recipe's folder."""
    content = read_yaml(path)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise EvomergeError(f"{path}: not a recipe:\n  " + "\n  ".join(x.lstrip(": ") for x in lines)) from error
    for model in (recipe.base, *recipe.sources):
        if (path.parent / model.path).is_dir() or not looks_like_hub_id(model.path):
            model.path = str((path.parent / os.path.expanduser(model.path)).resolve())
    for source in recipe.sources:
        if source.statistics is not None:
            source.statistics = str((path.parent / os.path.expanduser(source.statistics)).resolve())
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    content = recipe.model_dump(exclude_defaults=True)
    head = {"recipe": recipe.recipe, "method": recipe.method, "dtype": recipe.dtype, "seed": recipe.seed}
    text: str = yaml.safe_dump({**head, **content}, sort_keys=False, default_flow_style=None, width=110)
    return text


def model_folders(recipe: Recipe) -> tuple[Path, dict[str, Path]]:
    """Where the base and the sources lie.  EvomergeError if one cannot be found."""
    return locate(recipe.base.path), {s.name: locate(s.path) for s in recipe.sources}


def check_fingerprints(recipe: Recipe) -> None:
    """Compare the inputs with the SHA-256 sums that the recipe records.  EvomergeError names what differs."""
    base, sources = model_folders(recipe)
    differing = []
    folders = [base, *sources.values()]
    for model, folder in zip((recipe.base, *recipe.sources), folders, strict=True):
        if model.sha256:
            now = fingerprint(folder)
            differing += [f"{folder / f}" for f, digest in model.sha256.items() if now.get(f) != digest]
    for source in recipe.sources:
        if source.statistics is not None and source.statistics_sha256 is not None:
            file = Path(source.statistics)
            if not file.is_file() or sha256(file) != source.statistics_sha256:
                differing.append(str(file))
    if differing:
        raise EvomergeError(
            "these inputs are not the files that the recipe was made with:\n  " + "\n  ".join(differing)
        )
