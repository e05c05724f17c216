"""The recipe: a complete description of one merge, and the only input of materialisation."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from evomerge.errors import EvomergeError
from evomerge.files.read import absolute_path, read_yaml
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.method import Method
from evomerge.merge.recipe.coefficients import (
    Coefficient,
    all_numbers,
    coefficient_problems,
    numbers_and_lists,
    value_at,
)
from evomerge.merge.recipe.slices import BASE, Slice
from evomerge.sources.config_differences import Allowed
from evomerge.sources.locate import absolute_model, matching_models
from evomerge.sources.tensor_names import Component, TensorRole
from evomerge.sources.tokenizer import VOCABULARY_CHOICES

Dtype = Literal["float32", "bfloat16", "float16"]


class Model(BaseModel):
    """A model that a merge reads.

    path: a folder or a hub id.
    asked: the hub id that the user wrote, if `path` is `owner/name@commit`.
    sha256: of its files, once they are known.
    """

    model_config = ConfigDict(extra="forbid")
    path: str
    asked: str | None = Field(default=None, exclude_if=lambda asked: asked is None)
    sha256: dict[str, str] = {}


class RecipeSource(Model):
    """A source: a model on disk (`path`), or the result of another `recipe`, rounded to that recipe's dtype.

    statistics: the file of `evomerge statistics` for the methods that need one, and its SHA-256 once it is known.
    parameters: coefficients of this source, which precede the recipe's.
    """

    name: str
    path: str = ""
    recipe: "Recipe | None" = None
    statistics: str | None = None
    statistics_sha256: str | None = None
    parameters: dict[str, Coefficient] = {}

    @model_validator(mode="after")
    def check_origin(self) -> "RecipeSource":
        if bool(self.path) == (self.recipe is not None):
            raise ValueError("needs a `path` or a `recipe`, and not both")
        if self.recipe and self.statistics:
            raise ValueError("statistics: can be given for a model on disk, not for a recipe")
        if self.recipe and self.sha256:
            raise ValueError("sha256: belongs to the models of the `recipe`, not to the recipe")
        return self


class Recipe(BaseModel):
    """One merge.

    vocabulary: the tokenizer of the output if those of the models differ: `base`, `union` or a source's name.  Rows of
        embedding and head are then merged by token.  None: the tokenizers must be equal.
    chat_template: of the output, as Jinja.  None: the one of its tokenizer.
    keep: components that are the base's, whatever the coefficients say; for example the vision tower.
    allow_differences: in what the models' configurations may differ (`rope_theta`, `rope_scaling`); the output has
        the base's configuration.
    outputs: file of the exported model -> SHA-256, once it is exported.

    A coefficient is looked up by a tensor's layer, component and name.  Tensors before the layers (embeddings) take the
    first layer's value, those after them (final norm, head) the last layer's.  With `slices`, layers are those of the
    output.
    """

    model_config = ConfigDict(extra="forbid")
    recipe: Literal[1] = 1
    method: str
    dtype: Dtype = "bfloat16"
    seed: int = Field(default=0, ge=0, lt=2**63)
    base: Model
    sources: list[RecipeSource] = Field(min_length=1)
    parameters: dict[str, Coefficient] = {}
    slices: list[Slice] = []
    vocabulary: str | None = None
    keep: list[Component] = []
    allow_differences: list[Allowed] = []
    chat_template: str | None = None
    outputs: dict[str, str] = {}

    @field_validator("sources", mode="before")
    @classmethod
    def expand_checkpoints(cls, entries: Any, info: ValidationInfo) -> Any:
        """Replace entries that name checkpoints by a pattern by one source per checkpoint.

        The context of the validation is the folder of the recipe file; without it nothing is replaced.
        """
        if info.context is None or not isinstance(entries, list):
            return entries
        return [source for entry in entries for source in plain_sources(entry, info.context)]

    @model_validator(mode="after")
    def check_against_method(self) -> "Recipe":
        if problems := recipe_problems(self):
            raise ValueError("; ".join(problems))
        return self

    def knobs(self, role: TensorRole, layers: int, among: Collection[str] | None = None) -> Knobs:
        """The values of all knobs for one tensor.

        role: its layer and component.  layers: the number of layers of the model.
        among: the sources that the tensor is made of; None for all.
        """
        each: dict[str, tuple[float, ...]] = {}
        shared: dict[str, float] = {}
        for name, knob in METHODS[self.method].knobs.items():
            if knob.each:
                each[name] = tuple(
                    value_at(s.parameters.get(name, self.parameters.get(name, knob.default)), role, layers)
                    for s in self.sources
                    if among is None or s.name in among
                )
            else:
                given = self.parameters.get(name, knob.default)
                shared[name] = knob.choices[given] if isinstance(given, str) else value_at(given, role, layers)
        return Knobs(each, shared, len(self.sources) if among is None else len(among))


def plain_sources(entry: Any, folder: Path) -> list[Any]:
    """The sources that one entry of a recipe file stands for.

    An entry `checkpoints: PATTERN, last: K` stands for the K newest model folders that match, oldest first, each named
    after its folder; a relative pattern starts from `folder`.  Any other entry stands for itself.  ValueError if the
    entry is malformed, or fewer than K folders match.
    """
    if not isinstance(entry, dict) or "checkpoints" not in entry:
        return [entry]
    pattern, last = entry["checkpoints"], entry.get("last")
    if entry.keys() != {"checkpoints", "last"} or not isinstance(pattern, str) or type(last) is not int or last < 1:
        raise ValueError(f"{entry}: give `checkpoints`, a pattern, and `last`, a number of 1 or more, and no other key")
    found = matching_models(pattern, folder)
    if len(found) < last:
        raise ValueError(
            f"{pattern} matches {len(found)} model folders, but `last` is {last} "
            "(a model folder has config.json or adapter_config.json)"
        )
    return [{"name": checkpoint.name, "path": str(checkpoint.resolve())} for checkpoint in found[-last:]]


def recipe_problems(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe apart from types: unknown method or knob, values out of range, numbers of sources."""
    try:
        method = METHODS[recipe.method]
    except EvomergeError as error:
        return [f"method: {error}"]
    problems = []
    if method.statistics and (lacking := [s.name for s in recipe.sources if s.statistics is None]):
        problems.append(
            f"sources.{lacking[0]}.statistics: {recipe.method} needs a file there; make it with "
            f"`evomerge statistics --kind {method.statistics}`"
        )
    names = [s.name for s in recipe.sources]
    if recipe.slices:
        problems += slice_problems(recipe, method)
    else:
        problems += count_problems("sources", method, len(names))
    if recipe.keep and recipe.slices:
        problems.append("keep: has no meaning beside `slices`; leave out one of them")
    if len(set(names)) < len(names):
        problems.append("sources: two have the same name")
    if (
        recipe.vocabulary is not None
        and names.count(recipe.vocabulary) + (recipe.vocabulary in VOCABULARY_CHOICES) != 1
    ):
        problems.append(
            f"vocabulary: {recipe.vocabulary!r} is not one (alone) of {', '.join([*VOCABULARY_CHOICES, *names])}"
        )
    owners: list[tuple[str, dict[str, Coefficient], str | None]] = [("parameters", recipe.parameters, None)]
    owners += [(f"sources.{s.name}.parameters", s.parameters, s.name) for s in recipe.sources]
    for where, parameters, source in owners:
        for name, coefficient in parameters.items():
            knob = method.knobs.get(name)
            if knob is None or (source and not knob.each):
                allowed = ", ".join(k for k, v in method.knobs.items() if v.each or not source)
                hint = f"allowed: {allowed}" if allowed else "it has none"
                problems.append(f"{where}.{name}: not a coefficient of {recipe.method} here; {hint}")
            else:
                problems += coefficient_problems(f"{where}.{name}", coefficient, knob)
    for name, knob in method.knobs.items():
        without = [s.name for s in recipe.sources if name not in s.parameters] if knob.each else [""]
        if knob.default is None and name not in recipe.parameters and without:
            problems.append(f"{name}: must be given" + (f" for {', '.join(without)}" if knob.each else ""))
    for switch, name in method.excludes.items():
        moved = any(x != method.knobs[name].default for x in all_numbers(recipe.parameters.get(name, [])))
        if moved and any(all_numbers(recipe.parameters.get(switch, []))):
            problems.append(f"parameters.{name}: has no meaning beside {switch}; leave out one of them")
    return problems


def count_problems(where: str, method: Method, count: int) -> list[str]:
    """What is wrong with a number of sources, one line at most.  where: the key, for the message."""
    least, most = method.sources
    if least <= count and (most is None or count <= most):
        return []
    allowed = f"{least}" if most == least else f"{least} to {most}" if most else f"at least {least}"
    return [f"{where}: {method.name} takes {allowed}, here are {count}"]


def slice_problems(recipe: Recipe, method: Method) -> list[str]:
    """What is wrong with the slices.  A slice of the base alone is a copy of the base's layers, whatever the method."""
    names = [s.name for s in recipe.sources]
    problems = [f"sources: {BASE!r} is the base's name in slices; give the source another name"] * (BASE in names)
    problems += [f"slices: {method.name} needs statistics, which describe whole models"] * bool(method.statistics)
    for number, part in enumerate(recipe.slices):
        where = f"slices.{number}.layers"
        used = [n for n in part.layers if n != BASE]
        if unknown := [n for n in used if n not in names]:
            problems.append(f"{where}: {unknown[0]!r} is not one of {', '.join([BASE, *names])}")
        problems += count_problems(where, method, len(used)) if used else []
        if BASE not in part.layers and (method.without_base is None or len(used) < method.without_base):
            problems.append(f"{where}: {recipe.method} needs the base's layers too: `{BASE}: [start, end]`")
    idle = [n for n in names if not any(n in part.layers for part in recipe.slices)]
    return problems + [f"slices: {n} has no layer in any of them; leave the source out" for n in idle]


def check_layers(recipe: Recipe, layers: int) -> None:
    """EvomergeError if a list in a recipe does not have one number per layer."""
    owners = [("parameters", recipe.parameters)]
    owners += [(f"sources.{s.name}.parameters", s.parameters) for s in recipe.sources]
    for where, parameters in owners:
        for name, coefficient in parameters.items():
            for part in numbers_and_lists(coefficient):
                if isinstance(part, list) and len(part) != layers:
                    whose = "the slices have" if recipe.slices else "the base model has"
                    raise EvomergeError(f"{where}.{name}: has {len(part)} values, but {whose} {layers} layers")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.  EvomergeError lists everything that is wrong with it.

    Relative paths of models start from the recipe's folder.  Checkpoints that the file names by a pattern become one
    source each, so the recipe states what is merged, whatever the training run writes later.
    """
    return parse_recipe(read_yaml(path), path)


def parse_recipe(content: Any, path: Path) -> Recipe:
    """Check the content of a recipe file, see `load_recipe`.

    path: the file, named in errors; relative model paths are taken from its folder.
    """
    try:
        recipe = Recipe.model_validate(content, context=path.parent)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise EvomergeError(f"{path}: not a recipe:\n  " + "\n  ".join(x.lstrip(": ") for x in lines)) from error
    for _, model in models_on_disk(recipe):
        model.path = absolute_model(model.path, path.parent)
        if isinstance(model, RecipeSource) and model.statistics is not None:
            model.statistics = absolute_path(model.statistics, path.parent)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back."""
    content = recipe.model_dump(exclude_defaults=True)
    head = {"recipe": recipe.recipe, "method": recipe.method, "dtype": recipe.dtype, "seed": recipe.seed}
    text: str = yaml.safe_dump({**head, **content}, sort_keys=False, default_flow_style=None, width=110)
    return text


def models_on_disk(recipe: Recipe, above: str = "") -> Iterator[tuple[str, Model]]:
    """Every model on disk that a recipe reads, with its name.

    above: what precedes the names.  The models of a source's own recipe are called `source/name`.
    """
    yield f"{above}{BASE}", recipe.base
    for source in recipe.sources:
        if source.recipe:
            yield from models_on_disk(source.recipe, f"{above}{source.name}/")
        else:
            yield f"{above}{source.name}", source
