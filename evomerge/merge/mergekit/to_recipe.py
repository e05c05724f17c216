"""A mergekit file in a recipe's words: sources, knobs, slices, vocabulary."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.chat_template import template_text
from evomerge.merge.mergekit.coefficient_from_values import coefficient
from evomerge.merge.mergekit.filters_and_gradients import Tensor, setting_at
from evomerge.merge.mergekit.mergekit_file import Input, MergekitFile, Reference, Settings, Slice
from evomerge.merge.mergekit.mergekit_methods import BOUNDS, MERGEKIT, Scalar, is_required, kind
from evomerge.merge.methods import METHODS
from evomerge.merge.recipe.coefficients import Coefficient
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.locate import locate
from evomerge.sources.tensor_names import layer_count

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Reading:
    """One file on its way to a recipe; collects what is wrong with it.  made: the recipes of its other documents."""

    def __init__(self, file: MergekitFile, made: Mapping[str, Recipe]) -> None:
        self.file, self.made = file, made
        self.theirs = MERGEKIT[file.method]
        self.problems: list[str] = []
        self.slices = [Slice(list(s.inputs), s.settings) for s in file.slices]
        whole = [s for s in self.slices if all(i.layers is None for i in s.inputs)]
        if whole and file.base and all(i.model != file.base for i in whole[0].inputs):
            whole[0].inputs.append(Input(file.base, None, {}))  # mergekit adds the base to `models`
        self.has_base = self.theirs.base != "input" and file.base is not None
        inputs = list(dict.fromkeys(i.model for s in self.slices for i in s.inputs))
        self.donor = file.base or inputs[0]  # of configuration and tokenizer
        self.base = made[self.donor.model].base.path if self.donor.merged else self.donor.model
        others = [m for m in inputs if not (self.has_base and m == file.base)]
        # A recipe's base is a checkpoint.  An arc has two ends, so there any other model can be the first source.
        self.base_is_source = self.has_base and file.method == "slerp" and self.is_made(self.donor)
        self.sources = [self.donor, *others] if self.base_is_source else others
        self.names = source_names(self.sources)
        self.check()

    def check(self) -> None:
        """Bases and counts, slice by slice."""
        file, (least, most) = self.file, self.theirs.models
        if not self.sources:
            self.problems.append("models: there is none besides the base")
        if self.theirs.base == "required" and file.base is None:
            self.problems.append(f"base_model: {file.method} needs it")
        if self.has_base and self.is_made(self.donor) and not self.base_is_source:
            what = "an adapter" if self.donor.lora else f"the merge {self.donor.model!r}"
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
            self.problems.append("models: an adapter on a merge of this file cannot be read; merge in two steps")

    def is_made(self, model: Reference) -> bool:
        """Whether a model lies nowhere, but is made: another document's merge, or an adapter on a checkpoint."""
        return model.merged or model.lora is not None

    def source(self, name: str, model: Reference, parameters: dict[str, Coefficient]) -> RecipeSource:
        """A model as a source.  An adapter on another model than the base is merged into it first, as in mergekit."""
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

    def dtype(self) -> str:
        """The output's type: the file's, else the one that holds the numbers of all models that take part."""
        if self.file.dtype:
            return self.file.dtype
        found = [
            TORCH_DTYPES[self.made[m.model].dtype if m.merged else stored_dtype(m.model)]
            for m in {i.model for part in self.slices for i in part.inputs}
        ]
        return NAMES[reduce(torch.promote_types, found)]

    def scopes(self, part: Slice) -> list[Settings]:
        return [part.settings, *self.file.settings]

    def shared(self, parameter: str, default: Scalar, tensors: list[Tensor]) -> dict[str, float]:
        """The values of a parameter that all models share, by tensor."""
        return self.values(parameter, default, ((t, t.name, self.scopes(t.slice)) for t in tensors), "the merge")

    def each(self, parameter: str, default: Scalar, tensors: list[Tensor], source: Reference) -> dict[str, float]:
        """The values of a parameter for one model, by tensor, where it takes part."""
        places = (
            (t, t.name_in(i), [i.settings, *self.scopes(t.slice)])
            for t in tensors
            for i in t.slice.inputs
            if i.model == source
        )
        return self.values(parameter, default, places, self.names[self.sources.index(source)])

    def values(
        self, parameter: str, default: Scalar, places: Iterable[tuple[Tensor, str, list[Settings]]], owner: str
    ) -> dict[str, float]:
        found = {}
        for tensor, name, scopes in places:
            value = setting_at(scopes, parameter, name, tensor.t)
            if value is None and is_required(default):
                self.problems.append(f"{parameter}: must be given for {owner}; {tensor.name} has no value")
                return {}
            if value is None:
                value = default
            low, high = BOUNDS.get(parameter, (-math.inf, math.inf))
            found[tensor.name] = min(high, max(low, float(value)))
        if kind(parameter) == "integer" and any(v != int(v) for v in found.values()):
            self.problems.append(f"{parameter}: a gradient of whole numbers has other ones between them")
        return found

    def filters(self, parameter: str, source: Reference | None = None) -> list[str]:
        """The filters that may decide a parameter, those of higher precedence first."""
        scopes = [i.settings for s in self.slices for i in s.inputs if source is not None and i.model == source]
        scopes += [s.settings for s in self.slices] + self.file.settings
        return [e.filter for settings in scopes for e in settings.get(parameter, []) if e.filter is not None]

    def parameters(self, tensors: list[Tensor]) -> tuple[dict[str, Coefficient], list[dict[str, Coefficient]]]:
        """The knobs of the recipe, and those of each source."""
        knobs, layers = METHODS[self.file.method].knobs, layer_count([t.name for t in tensors])
        shared: dict[str, Coefficient] = {}
        each: list[dict[str, Coefficient]] = [{} for _ in self.sources]
        for parameter, default in self.theirs.parameters.items():
            for source, into in (
                zip(self.sources, each, strict=True) if parameter in self.theirs.each else [(None, shared)]
            ):
                if source is None:
                    values = self.shared(parameter, default, tensors)
                else:
                    values = self.each(parameter, default, tensors, source)
                    if parameter == "weight" and self.file.method == "ties":  # which keeps one element, mergekit none
                        kept = self.each("density", 1.0, tensors, source)
                        values = {n: v if kept[n] > 0 else 0.0 for n, v in values.items()}
                if not values or parameter not in knobs:
                    if set(values.values()) - {float(default)}:
                        self.problems.append(f"{parameter}: {self.file.method} has no such knob here; leave it out")
                    continue
                found = coefficient(values, self.filters(parameter, source), layers)
                if parameter == "rescale" and isinstance(found, float):
                    found = "l1" if found else "none"  # mergekit knows only the L1 norm
                if found != knobs[parameter].default:
                    into[parameter] = bool(found) if knobs[parameter].switch and isinstance(found, float) else found
        if "task_vectors" in knobs:
            shared["task_vectors"] = self.has_base
        return shared, each

    def layout(self, layers: int) -> list[dict[str, dict[str, tuple[int, int]]]]:
        """The recipe's `slices`; none if the file has whole models of this many layers, one upon the other."""
        found = []
        for part in self.slices:
            ranges = {i.model: i.layers or (0, layers) for i in part.inputs}
            named = {n: ranges[m] for n, m in zip(self.names, self.sources, strict=True) if m in ranges}
            if self.has_base and not self.base_is_source and self.file.base in ranges:
                named["base"] = ranges[self.file.base]
            elif self.theirs.base == "optional":  # there must be one, although the method does not look at it
                first, end = next(iter(ranges.values()))
                named["base"] = (0, end - first)
            found.append({"layers": named})
        whole = len(found) == 1 and set(found[0]["layers"].values()) == {(0, layers)}
        return [] if whole else found

    def vocabulary(self) -> str | None:
        """Whose tokenizer the output has, in the recipe's words."""
        wanted = self.file.tokenizer
        if not isinstance(wanted, Reference):
            return wanted
        if wanted in self.sources:
            return self.names[self.sources.index(wanted)]
        if wanted.model == self.base:
            return "base"
        self.problems.append(f"tokenizer: {wanted.model} is not one of the models")
        return None

    def template(self) -> str | None:
        """The chat template that the file asks for; without one, that of the model whose tokenizer it takes."""
        if self.file.chat_template is None:
            return self.made[self.donor.model].chat_template if self.donor.merged else None
        models = dict.fromkeys([self.base, *(m.model for m in self.sources if not m.merged)])
        try:
            return template_text(self.file.chat_template, map(locate, models))
        except EvomergeError as error:
            self.problems.append(str(error))
            return None

    def unused(self) -> list[str]:
        """Notes on parameters that mergekit passes over."""
        theirs, notes = self.theirs, list(self.file.notes)
        scopes = [s.settings for s in self.slices] + self.file.settings
        own = [i.settings for s in self.slices for i in s.inputs if not (self.has_base and i.model == self.file.base)]
        base = [i.settings for s in self.slices for i in s.inputs if self.has_base and i.model == self.file.base]
        for parameter in sorted({p for settings in scopes + own + base for p in settings}):
            if parameter not in theirs.parameters:
                notes.append(f"{parameter}: means nothing to {self.file.method}; passed over, as mergekit does")
            elif parameter not in theirs.each and any(parameter in settings for settings in own + base):
                notes.append(f"{parameter}: is one for the whole merge; passed over at single models, as mergekit does")
        if any(parameter in theirs.each for settings in base for parameter in settings):
            notes.append("parameters of the base model: passed over, as mergekit does")
        return notes


def source_names(models: list[Reference]) -> list[str]:
    """A name for each source: the last part of its path, with a number where that is taken."""
    names: list[str] = []
    for model in models:
        stem = Path((model.lora or model.model).split("@")[0]).name or "source"
        name, number = stem, 2
        while name in (*names, "base"):
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def stored_dtype(path: str) -> str:
    """The floating type that most of a model's numbers have."""
    sizes: Counter[str] = Counter()
    for info in open_checkpoint(locate(path)).tensors.values():
        if info.dtype.is_floating_point:
            sizes[str(info.dtype).removeprefix("torch.")] += info.bytes // info.dtype.itemsize
    most = sizes.most_common(1)[0][0] if sizes else "float32"
    return most if most in TORCH_DTYPES else "float32"
