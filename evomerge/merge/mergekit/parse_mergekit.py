"""From parsed YAML to a `MergekitFile`, checked.  One error lists everything that is wrong."""

import difflib
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.files.read import absolute_path
from evomerge.merge.mergekit.mergekit_file import (
    ConditionalParameter,
    InputModel,
    MergekitFile,
    ModelReference,
    OutputSlice,
    Parameters,
)
from evomerge.merge.mergekit.mergekit_methods import KNOWN_PARAMETERS, MERGEKIT, ParameterKind, Scalar, parameter_kind
from evomerge.sources.locate import absolute_model

TOP_KEYS = """models slices modules merge_method base_model dtype out_dtype tokenizer_source tokenizer chat_template
    parameters""".split()


class YamlReader:
    """Reads parts of the parsed YAML and collects what is wrong with them.

    folder: of the file; relative paths start from it.
    merges: the names of the file's other documents.
    problems, notes: what was found, a line each.

    The methods take `where`, the key of the value, for the message, and `value`.  They return None, or something
    empty, after a problem.
    """

    def __init__(self, folder: Path, merges: Collection[str] = ()) -> None:
        self.folder, self.merges = folder, merges
        self.problems: list[str] = []
        self.notes: list[str] = []

    def add_problem(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}".removeprefix(": "))

    def mapping(self, where: str, value: Any, allowed: list[str]) -> dict[str, Any]:
        """The entries of a mapping with allowed keys."""
        if not isinstance(value, dict):
            self.add_problem(where, f"expected a mapping, found {short_repr(value)}")
            return {}
        for key in value:
            if key not in allowed:
                self.handle_unknown_key(f"{where}.{key}".removeprefix("."), str(key), allowed)
        return {k: v for k, v in value.items() if k in allowed}

    def handle_unknown_key(self, where: str, key: str, known: Collection[str]) -> None:
        """Add a note that a key is ignored, as in mergekit; or a problem if it looks like a known key, misspelt."""
        if near := difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8):
            self.add_problem(where, f"unknown key; is it meant to be {near[0]}?")
        else:
            self.notes.append(f"{where}: mergekit has no key of that name; ignored, as in mergekit")

    def read_list(self, where: str, value: Any, read: Callable[[str, Any], Any]) -> list[Any]:
        """A list of at least one item, each read by `read`, without the items that cannot be read."""
        if not isinstance(value, list) or not value:
            self.add_problem(where, f"expected a list, found {short_repr(value)}")
            return []
        found = [read(f"{where}.{i}", item) for i, item in enumerate(value)]
        return [item for item in found if item is not None]

    def text(self, where: str, value: Any) -> str | None:
        """A text that is not empty."""
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value
        self.add_problem(where, f"expected text, found {short_repr(value)}")
        return None

    def path(self, where: str, value: Any) -> str | None:
        """A model's path or hub id, written as text or as `{path, revision}`."""
        if isinstance(value, dict):
            parts = self.mapping(where, value, ["path", "revision"])
            path = self.text(f"{where}.path", parts.get("path"))
            revision = self.text(f"{where}.revision", parts["revision"]) if parts.get("revision") is not None else None
        else:
            path, _, revision = (self.text(where, value) or "").partition("@")
        if path and revision and not os.path.isdir(absolute_path(path, self.folder)):
            return absolute_model(f"{path}@{revision}", self.folder)
        return path and absolute_model(path, self.folder)  # a folder has no revisions

    def reference(self, where: str, value: Any) -> ModelReference | None:
        """A model, with or without an adapter: `MODEL`, `MODEL+LORA`, or a mapping."""
        if isinstance(value, dict):
            parts = self.mapping(where, value, ["model", "lora", "override_architecture"])
            if parts.get("override_architecture") is not None:
                self.add_problem(
                    f"{where}.override_architecture",
                    "not supported; a model has the architecture that its config.json names",
                )
            model, lora = parts.get("model"), parts.get("lora")
        else:
            if (text := self.text(where, value)) is None:
                return None
            model, *adapters = text.split("+")
            if len(adapters) > 1 or not all([model, *adapters]):
                self.add_problem(where, f"{text!r} is not MODEL or MODEL+LORA")
                return None
            lora = adapters[0] if adapters else None
        name = model.get("path") if isinstance(model, dict) else model
        merged = isinstance(name, str) and name in self.merges
        path = name if merged else self.path(f"{where}.model" if isinstance(value, dict) else where, model)
        adapter = self.path(f"{where}.lora" if isinstance(value, dict) else where, lora) if lora is not None else None
        return ModelReference(path, adapter, merged) if path else None

    def parameters(self, where: str, value: Any) -> Parameters:
        """The parameters of one scope."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.add_problem(where, f"expected a mapping, found {short_repr(value)}")
            return {}
        found: Parameters = {}
        for name, given in value.items():
            if name not in KNOWN_PARAMETERS:
                self.handle_unknown_key(f"{where}.{name}", str(name), KNOWN_PARAMETERS)
            else:
                found[name] = self.entries(f"{where}.{name}", given, parameter_kind(name))
        return found

    def entries(self, where: str, value: Any, kind: ParameterKind) -> list[ConditionalParameter]:
        """The entries of a parameter: a scalar, a gradient, or one or several of them with filters."""
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return self.read_list(where, value, lambda at, item: self.conditional(at, item, kind))
        values = self.values(where, value, kind)
        return [ConditionalParameter(None, values)] if values is not None else []

    def conditional(self, where: str, item: Any, kind: ParameterKind) -> ConditionalParameter | None:
        """A value with a filter: `{filter, value}`."""
        parts = self.mapping(where, item, ["filter", "value"])
        values = self.values(f"{where}.value", parts.get("value"), kind)
        name = self.text(f"{where}.filter", parts["filter"]) if parts.get("filter") not in (None, "", "*") else None
        return ConditionalParameter(name, values) if values is not None else None

    def values(self, where: str, value: Any, kind: ParameterKind) -> tuple[Scalar, ...] | None:
        """A scalar, or the values of a gradient."""
        given = value if isinstance(value, list) else [value]
        found = [read_scalar(one, kind) for one in given]
        for one, number in zip(given, found, strict=True):
            if number is None:
                self.add_problem(
                    where, f"expected {'true or false' if kind == 'boolean' else f'a {kind}'}, found {short_repr(one)}"
                )
                return None
        return tuple(one for one in found if one is not None)

    def layers(self, where: str, value: Any) -> tuple[int, int] | None:
        """A range of layers, [start, end)."""
        if isinstance(value, list) and len(value) == 2:
            ends = [read_scalar(end, "integer") for end in value]
            if None not in ends and 0 <= ends[0] <= ends[1]:  # type: ignore[operator]
                return int(ends[0]), int(ends[1])  # type: ignore[arg-type]
        self.add_problem(where, f"expected [FIRST, END] with FIRST not above END, found {short_repr(value)}")
        return None

    def model(self, where: str, value: Any) -> InputModel | None:
        """An item of `models`."""
        parts = self.mapping(where, value, ["model", "parameters"])
        reference = self.reference(f"{where}.model", parts.get("model"))
        parameters = self.parameters(f"{where}.parameters", parts.get("parameters"))
        return InputModel(reference, None, parameters) if reference else None

    def source(self, where: str, value: Any) -> InputModel | None:
        """An item of a slice's `sources`."""
        parts = self.mapping(where, value, ["model", "layer_range", "parameters"])
        reference = self.reference(f"{where}.model", parts.get("model"))
        layers = self.layers(f"{where}.layer_range", parts.get("layer_range"))
        parameters = self.parameters(f"{where}.parameters", parts.get("parameters"))
        return InputModel(reference, layers, parameters) if reference and layers else None

    def slice(self, where: str, value: Any) -> OutputSlice | None:
        """An item of `slices`."""
        parts = self.mapping(where, value, ["sources", "base_model", "residual_weight", "parameters"])
        base = self.reference(f"{where}.base_model", parts["base_model"]) if parts.get("base_model") else None
        if parts.get("residual_weight") is not None:
            self.notes.append(f"{where}.residual_weight: ignored, as in mergekit")
        inputs = self.read_list(f"{where}.sources", parts.get("sources"), self.source)
        ranges = [i.layers for i in inputs if i.layers]
        if len({end - first for first, end in ranges}) > 1:
            self.add_problem(where, "its sources have layer ranges of different lengths")
        return (
            OutputSlice(inputs, self.parameters(f"{where}.parameters", parts.get("parameters")), base)
            if inputs
            else None
        )

    def slices(self, where: str, value: dict[str, Any]) -> list[OutputSlice]:
        """The slices of a file or of its module: its `slices`, or one slice with its `models`."""
        prefix = f"{where}." if where else ""
        if value.get("models"):
            if value.get("slices"):
                self.add_problem(f"{prefix}slices", "give it or models, not both")
            inputs = self.read_list(f"{prefix}models", value["models"], self.model)
            return [OutputSlice(inputs, {})] if inputs else []
        return self.read_list(f"{prefix}slices", value.get("slices"), self.slice)

    def tokenizer(self, content: dict[str, Any]) -> str | ModelReference | None:
        """`union`, `base` or a model, by `tokenizer_source` or `tokenizer`; None if the file does not say."""
        where, value = "tokenizer_source", content.get("tokenizer_source")
        if content.get("tokenizer") is not None:
            if value is not None:
                self.add_problem("tokenizer", "give it or tokenizer_source, not both")
            parts = self.mapping("tokenizer", content["tokenizer"], ["source", "tokens", "pad_to_multiple_of"])
            where, value = "tokenizer.source", parts.get("source", "union")
            if value is None:
                self.add_problem(where, "expected union, base or a model, found None")
            if parts.get("tokens"):
                self.add_problem("tokenizer.tokens", "rules for single tokens are not supported")
            if parts.get("pad_to_multiple_of") not in (None, 0, 1):
                self.add_problem("tokenizer.pad_to_multiple_of", "a padded vocabulary is not supported")
        return value if value in (None, "base", "union") else self.reference(where, value)

    def dtype(self, content: dict[str, Any]) -> str | None:
        """The type of the output: `out_dtype`, else `dtype` (which otherwise is only the type of the arithmetic)."""
        key = "out_dtype" if content.get("out_dtype") else "dtype"
        if not content.get(key):
            return None
        found = str(content[key]).removeprefix("torch.")
        if found not in ("float32", "bfloat16", "float16"):
            self.add_problem(key, f"{short_repr(content[key])} is not one of float32, bfloat16, float16")
        return found

    def base_model(self, content: dict[str, Any], slices: list[OutputSlice]) -> ModelReference | None:
        """The base model of the merge: that of the file, else the one that every slice names."""
        found = self.reference("base_model", content["base_model"]) if content.get("base_model") else None
        if found is None and slices and all(part.base == slices[0].base for part in slices):
            found = slices[0].base
        for number, part in enumerate(slices):
            if part.base not in (None, found):
                self.add_problem(f"slices.{number}.base_model", "only one base model for the whole merge is supported")
        return found


def short_repr(value: Any) -> str:
    """A value as text of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_scalar(value: Any, kind: ParameterKind) -> Scalar | None:
    """A value as mergekit's types read it (text is converted too); None if it is not of that kind."""
    if kind == "boolean":
        if isinstance(value, str):
            value = value.strip().lower()
        if value in (True, "true", "yes", "on", "y", "t", "1"):
            return True
        return False if value in (False, "false", "no", "off", "n", "f", "0") else None
    if not isinstance(value, (bool, int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (kind == "integer" and number != int(number)):
        return None
    return number


def parse_mergekit(content: Any, origin: Path, merges: Collection[str] = ()) -> MergekitFile:
    """Check parsed YAML as one merge of a mergekit file.

    origin: the file, for the message; relative paths start from its folder.
    merges: the names of the file's other documents, which may be given as models.

    EvomergeError lists everything that is wrong with it.
    """
    reader = YamlReader(origin.parent, merges)
    top = reader.mapping("", content, TOP_KEYS)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in MERGEKIT:
        reader.add_problem("merge_method", f"{short_repr(method)} is not one of {', '.join(MERGEKIT)}")
    outputs = [key for key in ("models", "slices", "modules") if top.get(key)]
    slices: list[OutputSlice] = []
    parameters = [reader.parameters("parameters", top.get("parameters"))]
    if len(outputs) != 1:
        reader.add_problem(
            "models", f"exactly one of models, slices and modules must be given, here are {len(outputs)}"
        )
    elif outputs == ["modules"]:
        modules = top["modules"]
        if not isinstance(modules, dict) or list(modules) != ["default"]:
            reader.add_problem("modules", "only the one module `default` is supported")
        else:
            module = reader.mapping("modules.default", modules["default"], ["models", "slices", "parameters"])
            slices = reader.slices("modules.default", module)
            parameters.insert(0, reader.parameters("modules.default.parameters", module.get("parameters")))
    else:
        slices = reader.slices("", top)
    base, tokenizer, dtype = reader.base_model(top, slices), reader.tokenizer(top), reader.dtype(top)
    template = reader.text("chat_template", top["chat_template"]) if top.get("chat_template") else None
    if reader.problems:
        raise EvomergeError(f"{origin}: {len(reader.problems)} problem(s):\n  " + "\n  ".join(reader.problems))
    return MergekitFile(str(method), base, slices, parameters, dtype, tokenizer, template, reader.notes)
