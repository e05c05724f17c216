"""From a `MergekitFile` to the recipe of the same merge: sources, knobs, slices, vocabulary."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.chat_template import template_text
from evomerge.merge.mergekit.coefficient_from_values import shortest_coefficient
from evomerge.merge.mergekit.filters_and_gradients import OutputTensor, output_tensors, parameter_at
from evomerge.merge.mergekit.mergekit_file import InputModel, MergekitFile, ModelReference, OutputSlice, Parameters
from evomerge.merge.mergekit.mergekit_methods import BOUNDS, MERGEKIT, Scalar, is_required, parameter_kind
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import Coefficient
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.locate import before_download, locate
from evomerge.sources.open_models import stored_tensors
from evomerge.sources.tensor_names import layer_count

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def to_recipe(file: MergekitFile, path: Path, made: Mapping[str, Recipe] | None = None) -> tuple[Recipe, list[str]]:
    """The recipe of the merge that mergekit makes of a file, and notes on what was ignored.

    path: of the file, for the message.
    made: the recipes of the file's other documents, by name.

    Gradients are written out layer by layer, so the base model is opened.  EvomergeError lists what a recipe cannot
    express.
    """
    conversion = Conversion(file, made or {})
    stored = stored_tensors(conversion.base)
    tensors = list(output_tensors(conversion.slices, list(stored)))
    shared, each = conversion.recipe_parameters(tensors)
    vocabulary, template = conversion.recipe_vocabulary(), conversion.chat_template()
    if conversion.problems:
        raise EvomergeError(f"{path}: {len(conversion.problems)} problem(s):\n  " + "\n  ".join(conversion.problems))
    try:
        content: dict[str, Any] = {
            "method": file.method,
            "dtype": conversion.output_dtype(),
            "base": Model(path=conversion.base),
            "sources": list(map(conversion.recipe_source, conversion.names, conversion.sources, each)),
            "parameters": shared,
            "vocabulary": vocabulary,
            "chat_template": template,
            "slices": conversion.recipe_slices(layer_count(list(stored))),
        }
        return Recipe(**content), conversion.notes()
    except ValidationError as error:
        lines = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
        raise EvomergeError(f"{path}: evomerge cannot make this merge:\n  " + "\n  ".join(lines)) from error


class Conversion:
    """The conversion of one merge to a recipe; collects what is wrong.

    made: the recipes of the file's other documents, by name.
    method: mergekit's description of the method.
    slices: of the file, with the base model among the inputs where mergekit adds it.
    has_base: whether the method treats the base model as a base, and not as one of the models.
    config_model: the model that the output takes its configuration and its tokenizer from.
    base: the path of the recipe's base.
    sources, names: the recipe's sources and their names.
    problems: what is wrong, a line each.
    """

    def __init__(self, file: MergekitFile, made: Mapping[str, Recipe]) -> None:
        self.file, self.made = file, made
        self.method = MERGEKIT[file.method]
        self.problems: list[str] = []
        self.slices = [OutputSlice(list(s.inputs), s.parameters) for s in file.slices]
        whole = [s for s in self.slices if all(i.layers is None for i in s.inputs)]
        if whole and file.base and all(i.model != file.base for i in whole[0].inputs):
            whole[0].inputs.append(InputModel(file.base, None, {}))  # mergekit adds the base to `models`
        self.has_base = self.method.base != "input" and file.base is not None
        inputs = list(dict.fromkeys(i.model for s in self.slices for i in s.inputs))
        self.config_model = file.base or inputs[0]
        self.base = made[self.config_model.model].base.path if self.config_model.merged else self.config_model.model
        others = [m for m in inputs if not (self.has_base and m == file.base)]
        # A recipe's base must be a checkpoint on disk.  In slerp, mergekit's base model is one of the two models, so if
        # it is made first, it becomes the recipe's first source.
        self.base_is_source = self.has_base and file.method == "slerp" and self.is_made(self.config_model)
        self.sources = [self.config_model, *others] if self.base_is_source else others
        self.names = source_names(self.sources)
        self.check_models()

    def check_models(self) -> None:
        """Collect what is wrong with base models and numbers of models, slice by slice."""
        file, (least, most) = self.file, self.method.models
        if not self.sources:
            self.problems.append("models: there is none besides the base")
        if self.method.base == "required" and file.base is None:
            self.problems.append(f"base_model: {file.method} needs it")
        if self.has_base and self.is_made(self.config_model) and not self.base_is_source:
            what = "an adapter" if self.config_model.lora else f"the merge {self.config_model.model!r}"
            self.problems.append(
                f"base_model: {what} cannot be the base of {file.method}; merge it into a checkpoint first"
            )
        for number, part in enumerate(self.slices):
            where = f"slices.{number}" if part.inputs[0].layers else "models"
            models = [i.model for i in part.inputs]
            if len(set(models)) < len(models):
                self.problems.append(f"{where}: the same model twice")
            if self.has_base and file.base not in models:
                self.problems.append(f"{where}: lacks the base model, which {file.method} needs in every slice")
            count = len([m for m in models if not (self.has_base and m == file.base)])
            if count < least or (most is not None and count > most):
                wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"at most {most}"
                beside = " besides the base" if self.has_base else ""
                self.problems.append(f"{where}: {file.method} takes {wanted} model(s){beside}, here are {count}")
        if any(i.model.merged and i.model.lora for s in self.slices for i in s.inputs):
            self.problems.append("models: an adapter on a merge of this file is not supported; merge in two steps")

    def is_made(self, model: ModelReference) -> bool:
        """Whether a model is not on disk but made first: another document's merge, or an adapter on a checkpoint."""
        return model.merged or model.lora is not None

    def recipe_source(self, name: str, model: ModelReference, parameters: dict[str, Coefficient]) -> RecipeSource:
        """A model as a source of the recipe.

        As in mergekit, an adapter on another model than the base is merged into that model first.
        """
        if model.merged:
            return RecipeSource(name=name, recipe=self.made[model.model], parameters=parameters)
        if model.lora is None or model.model == self.base:
            return RecipeSource(name=name, path=model.lora or model.model, parameters=parameters)
        adapted = Recipe(
            method="passthrough",
            dtype=stored_dtype(model.model),  # type: ignore[arg-type]
            base=Model(path=model.model),
            sources=[RecipeSource(name=name, path=model.lora)],
        )
        return RecipeSource(name=name, recipe=adapted, parameters=parameters)

    def output_dtype(self) -> str:
        """The output's type: that of the file, else the one to which the types of all models are promoted."""
        if self.file.dtype:
            return self.file.dtype
        found = [
            TORCH_DTYPES[self.made[m.model].dtype if m.merged else stored_dtype(m.model)]
            for m in {i.model for part in self.slices for i in part.inputs}
        ]
        return NAMES[reduce(torch.promote_types, found)]

    def scopes(self, part: OutputSlice) -> list[Parameters]:
        """The scopes that hold parameters for all models of a slice, in order of precedence."""
        return [part.parameters, *self.file.parameters]

    def values_for_all(self, parameter: str, default: Scalar, tensors: list[OutputTensor]) -> dict[str, float]:
        """The values of a parameter that all models share, by tensor."""
        return self.values_by_tensor(
            parameter, default, ((t, t.name, self.scopes(t.slice)) for t in tensors), "the merge"
        )

    def values_for_model(
        self, parameter: str, default: Scalar, tensors: list[OutputTensor], source: ModelReference
    ) -> dict[str, float]:
        """The values of a parameter for one model, by tensor, for the tensors that the model is part of."""
        lookups = (
            (t, t.name_in(i), [i.parameters, *self.scopes(t.slice)])
            for t in tensors
            for i in t.slice.inputs
            if i.model == source
        )
        return self.values_by_tensor(parameter, default, lookups, self.names[self.sources.index(source)])

    def values_by_tensor(
        self, parameter: str, default: Scalar, lookups: Iterable[tuple[OutputTensor, str, list[Parameters]]], owner: str
    ) -> dict[str, float]:
        """The values of a parameter by tensor.

        lookups: each tensor, its name where the parameter is looked up, and the scopes.
        owner: of the parameter, for the message.
        """
        found = {}
        for tensor, name, scopes in lookups:
            value = parameter_at(scopes, parameter, name, tensor.t)
            if value is None and is_required(default):
                self.problems.append(f"{parameter}: must be given for {owner}; {tensor.name} has no value")
                return {}
            if value is None:
                value = default
            low, high = BOUNDS.get(parameter, (-math.inf, math.inf))
            found[tensor.name] = min(high, max(low, float(value)))
        if parameter_kind(parameter) == "integer" and any(v != int(v) for v in found.values()):
            self.problems.append(f"{parameter}: a gradient of whole numbers has fractions between them")
        return found

    def filters(self, parameter: str, source: ModelReference | None = None) -> list[str]:
        """The filters of a parameter, those of higher precedence first.  source: with those of this model."""
        scopes = [i.parameters for s in self.slices for i in s.inputs if source is not None and i.model == source]
        scopes += [s.parameters for s in self.slices] + self.file.parameters
        return [e.filter for parameters in scopes for e in parameters.get(parameter, []) if e.filter is not None]

    def recipe_parameters(
        self, tensors: list[OutputTensor]
    ) -> tuple[dict[str, Coefficient], list[dict[str, Coefficient]]]:
        """The knobs of the recipe, and those of each source."""
        knobs, layers = METHODS[self.file.method].knobs, layer_count([t.name for t in tensors])
        shared: dict[str, Coefficient] = {}
        each: list[dict[str, Coefficient]] = [{} for _ in self.sources]
        for parameter, default in self.method.parameters.items():
            for source, into in (
                zip(self.sources, each, strict=True) if parameter in self.method.each else [(None, shared)]
            ):
                if source is None:
                    values = self.values_for_all(parameter, default, tensors)
                else:
                    values = self.values_for_model(parameter, default, tensors, source)
                    if parameter == "weight" and self.file.method == "ties":
                        # At density 0 mergekit keeps no element, evomerge's ties one.
                        density = self.values_for_model("density", 1.0, tensors, source)
                        values = {n: v if density[n] > 0 else 0.0 for n, v in values.items()}
                if not values or parameter not in knobs:
                    if set(values.values()) - {float(default)}:
                        self.problems.append(f"{parameter}: {self.file.method} has no such knob here; leave it out")
                    continue
                found = shortest_coefficient(values, self.filters(parameter, source), layers)
                if parameter == "rescale" and isinstance(found, float):
                    found = "l1" if found else "none"  # mergekit knows only the L1 norm
                if found != knobs[parameter].default:
                    into[parameter] = bool(found) if knobs[parameter].switch and isinstance(found, float) else found
        if "task_vectors" in knobs:
            shared["task_vectors"] = self.has_base
        return shared, each

    def recipe_slices(self, layers: int) -> list[dict[str, dict[str, tuple[int, int]]]]:
        """The recipe's `slices`; none if the file merges whole models of `layers` layers."""
        found = []
        for part in self.slices:
            ranges = {i.model: i.layers or (0, layers) for i in part.inputs}
            named = {n: ranges[m] for n, m in zip(self.names, self.sources, strict=True) if m in ranges}
            if self.has_base and not self.base_is_source and self.file.base in ranges:
                named["base"] = ranges[self.file.base]
            elif self.method.base == "optional":  # a recipe's slice needs the base, although the method does not use it
                first, end = next(iter(ranges.values()))
                named["base"] = (0, end - first)
            found.append({"layers": named})
        whole = len(found) == 1 and set(found[0]["layers"].values()) == {(0, layers)}
        return [] if whole else found

    def recipe_vocabulary(self) -> str | None:
        """The recipe's `vocabulary`: `base`, `union`, a source's name or None."""
        wanted = self.file.tokenizer
        if not isinstance(wanted, ModelReference):
            return wanted
        if wanted in self.sources:
            return self.names[self.sources.index(wanted)]
        if wanted.model == self.base:
            return "base"
        self.problems.append(f"tokenizer: {wanted.model} is not one of the models")
        return None

    def chat_template(self) -> str | None:
        """The text of the chat template that the file asks for; None for the one of the output's tokenizer."""
        if self.file.chat_template is None:
            return self.made[self.config_model.model].chat_template if self.config_model.merged else None
        models = dict.fromkeys([self.base, *(m.model for m in self.sources if not m.merged)])
        try:
            with before_download(models) as headers:
                return template_text(self.file.chat_template, [locate(headers.stand_in(m)) for m in models])
        except EvomergeError as error:
            self.problems.append(str(error))
            return None

    def notes(self) -> list[str]:
        """Notes on what mergekit ignores in the file."""
        method, notes = self.method, list(self.file.notes)
        scopes = [s.parameters for s in self.slices] + self.file.parameters
        own = [i.parameters for s in self.slices for i in s.inputs if not (self.has_base and i.model == self.file.base)]
        base = [i.parameters for s in self.slices for i in s.inputs if self.has_base and i.model == self.file.base]
        for parameter in sorted({p for parameters in scopes + own + base for p in parameters}):
            if parameter not in method.parameters:
                notes.append(f"{parameter}: has no effect in {self.file.method}; ignored, as in mergekit")
            elif parameter not in method.each and any(parameter in parameters for parameters in own + base):
                notes.append(
                    f"{parameter}: has one value for the whole merge; ignored at single models, as in mergekit"
                )
        if any(parameter in method.each for parameters in base for parameter in parameters):
            notes.append("parameters of the base model: ignored, as in mergekit")
        return notes


def source_names(models: list[ModelReference]) -> list[str]:
    """A name for each source: the last part of its path, with a number if that name is taken."""
    names: list[str] = []
    for model in models:
        stem = Path((model.lora or model.model).split("@")[0]).name or "source"
        name, number = stem, 2
        while name in (*names, "base"):
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def stored_dtype(path: str) -> str:
    """The floating-point type of most numbers in a model."""
    sizes: Counter[str] = Counter()
    for info in stored_tensors(path).values():
        if info.dtype.is_floating_point:
            sizes[str(info.dtype).removeprefix("torch.")] += info.bytes // info.dtype.itemsize
    most = sizes.most_common(1)[0][0] if sizes else "float32"
    return most if most in TORCH_DTYPES else "float32"
