"""From parsed YAML to a mergekit file, checked.  Whatever is wrong with it is said at once."""

import difflib
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.mergekit_file import Entry, Input, MergekitFile, Reference, Settings, Slice
from evomerge.merge.mergekit.mergekit_methods import KNOWN, MERGEKIT, Kind, Scalar, kind
from evomerge.sources.locate import absolute_model, absolute_path

TOP = """models slices modules merge_method base_model dtype out_dtype tokenizer_source tokenizer chat_template
    parameters""".split()


class Reader:
    """Reads parts of the parsed YAML and collects what is wrong.  merges: names of the file's other documents."""

    def __init__(self, folder: Path, merges: Collection[str] = ()) -> None:
        self.folder, self.merges = folder, merges
        self.problems: list[str] = []
        self.notes: list[str] = []

    def problem(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}".removeprefix(": "))

    def mapping(self, where: str, value: Any, allowed: list[str]) -> dict[str, Any]:
        """The allowed keys of a mapping; empty if it is none."""
        if not isinstance(value, dict):
            self.problem(where, f"expected a mapping, found {shown(value)}")
            return {}
        for key in value:
            if key not in allowed:
                self.unknown(f"{where}.{key}".removeprefix("."), str(key), allowed)
        return {k: v for k, v in value.items() if k in allowed}

    def unknown(self, where: str, key: str, known: Collection[str]) -> None:
        """Pass over a key that mergekit passes over, unless it seems to be a known one, misspelt."""
        if near := difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8):
            self.problem(where, f"unknown key; is it meant to be {near[0]}?")
        else:
            self.notes.append(f"{where}: mergekit has no key of that name; passed over, as mergekit does")

    def items(self, where: str, value: Any, read: Callable[[str, Any], Any]) -> list[Any]:
        """A list of at least one item, each read; what cannot be read is left out."""
        if not isinstance(value, list) or not value:
            self.problem(where, f"expected a list, found {shown(value)}")
            return []
        found = [read(f"{where}.{i}", item) for i, item in enumerate(value)]
        return [item for item in found if item is not None]

    def text(self, where: str, value: Any) -> str | None:
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value
        self.problem(where, f"expected text, found {shown(value)}")
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

    def reference(self, where: str, value: Any) -> Reference | None:
        if isinstance(value, dict):
            parts = self.mapping(where, value, ["model", "lora", "override_architecture"])
            if parts.get("override_architecture") is not None:
                self.problem(f"{where}.override_architecture", "a model is read as what its config.json says")
            model, lora = parts.get("model"), parts.get("lora")
        else:
            if (text := self.text(where, value)) is None:
                return None
            model, *adapters = text.split("+")
            if len(adapters) > 1 or not all([model, *adapters]):
                self.problem(where, f"{text!r} is not MODEL or MODEL+LORA")
                return None
            lora = adapters[0] if adapters else None
        name = model.get("path") if isinstance(model, dict) else model
        merged = isinstance(name, str) and name in self.merges
        path = name if merged else self.path(f"{where}.model" if isinstance(value, dict) else where, model)
        adapter = self.path(f"{where}.lora" if isinstance(value, dict) else where, lora) if lora is not None else None
        return Reference(path, adapter, merged) if path else None

    def settings(self, where: str, value: Any) -> Settings:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(where, f"expected a mapping, found {shown(value)}")
            return {}
        found: Settings = {}
        for name, setting in value.items():
            if name not in KNOWN:
                self.unknown(f"{where}.{name}", str(name), KNOWN)
            else:
                found[name] = self.entries(f"{where}.{name}", setting, kind(name))
        return found

    def entries(self, where: str, setting: Any, kind: Kind) -> list[Entry]:
        """A setting: a scalar, a gradient, or one or more of them with filters."""
        if isinstance(setting, dict):
            setting = [setting]
        if isinstance(setting, list) and any(isinstance(item, dict) for item in setting):
            return self.items(where, setting, lambda at, item: self.conditional(at, item, kind))
        values = self.values(where, setting, kind)
        return [Entry(None, values)] if values is not None else []

    def conditional(self, where: str, item: Any, kind: Kind) -> Entry | None:
        parts = self.mapping(where, item, ["filter", "value"])
        values = self.values(f"{where}.value", parts.get("value"), kind)
        name = self.text(f"{where}.filter", parts["filter"]) if parts.get("filter") not in (None, "", "*") else None
        return Entry(name, values) if values is not None else None

    def values(self, where: str, value: Any, kind: Kind) -> tuple[Scalar, ...] | None:
        knots = value if isinstance(value, list) else [value]
        found = [scalar(knot, kind) for knot in knots]
        for knot, one in zip(knots, found, strict=True):
            if one is None:
                self.problem(
                    where, f"expected {'true or false' if kind == 'boolean' else f'a {kind}'}, found {shown(knot)}"
                )
                return None
        return tuple(one for one in found if one is not None)

    def layers(self, where: str, value: Any) -> tuple[int, int] | None:
        if isinstance(value, list) and len(value) == 2:
            ends = [scalar(end, "integer") for end in value]
            if None not in ends and 0 <= ends[0] <= ends[1]:  # type: ignore[operator]
                return int(ends[0]), int(ends[1])  # type: ignore[arg-type]
        self.problem(where, f"expected [FIRST, END] with FIRST not above END, found {shown(value)}")
        return None

    def model(self, where: str, value: Any) -> Input | None:
        """An item of `models`."""
        parts = self.mapping(where, value, ["model", "parameters"])
        reference = self.reference(f"{where}.model", parts.get("model"))
        settings = self.settings(f"{where}.parameters", parts.get("parameters"))
        return Input(reference, None, settings) if reference else None

    def source(self, where: str, value: Any) -> Input | None:
        """An item of a slice's `sources`."""
        parts = self.mapping(where, value, ["model", "layer_range", "parameters"])
        reference = self.reference(f"{where}.model", parts.get("model"))
        layers = self.layers(f"{where}.layer_range", parts.get("layer_range"))
        settings = self.settings(f"{where}.parameters", parts.get("parameters"))
        return Input(reference, layers, settings) if reference and layers else None

    def slice(self, where: str, value: Any) -> Slice | None:
        parts = self.mapping(where, value, ["sources", "base_model", "residual_weight", "parameters"])
        base = self.reference(f"{where}.base_model", parts["base_model"]) if parts.get("base_model") else None
        if parts.get("residual_weight") is not None:
            self.notes.append(f"{where}.residual_weight: passed over, as mergekit does")
        inputs = self.items(f"{where}.sources", parts.get("sources"), self.source)
        ranges = [i.layers for i in inputs if i.layers]
        if len({end - first for first, end in ranges}) > 1:
            self.problem(where, "its sources have layer ranges of different lengths")
        return Slice(inputs, self.settings(f"{where}.parameters", parts.get("parameters")), base) if inputs else None

    def output(self, where: str, value: dict[str, Any]) -> list[Slice]:
        """`models` or `slices` of a file or of its module."""
        prefix = f"{where}." if where else ""
        if value.get("models"):
            if value.get("slices"):
                self.problem(f"{prefix}slices", "give it or models, not both")
            inputs = self.items(f"{prefix}models", value["models"], self.model)
            return [Slice(inputs, {})] if inputs else []
        return self.items(f"{prefix}slices", value.get("slices"), self.slice)

    def tokenizer(self, content: dict[str, Any]) -> str | Reference | None:
        where, value = "tokenizer_source", content.get("tokenizer_source")
        if content.get("tokenizer") is not None:
            if value is not None:
                self.problem("tokenizer", "give it or tokenizer_source, not both")
            parts = self.mapping("tokenizer", content["tokenizer"], ["source", "tokens", "pad_to_multiple_of"])
            where, value = "tokenizer.source", parts.get("source", "union")
            if value is None:
                self.problem(where, "expected union, base or a model, found None")
            if parts.get("tokens"):
                self.problem("tokenizer.tokens", "rules for single tokens cannot be read; a vocabulary is taken whole")
            if parts.get("pad_to_multiple_of") not in (None, 0, 1):
                self.problem("tokenizer.pad_to_multiple_of", "padded vocabularies cannot be made")
        return value if value in (None, "base", "union") else self.reference(where, value)

    def dtype(self, content: dict[str, Any]) -> str | None:
        """The type of the output: `out_dtype`, else `dtype`, which else is that of the arithmetic only."""
        key = "out_dtype" if content.get("out_dtype") else "dtype"
        if not content.get(key):
            return None
        found = str(content[key]).removeprefix("torch.")
        if found not in ("float32", "bfloat16", "float16"):
            self.problem(key, f"{shown(content[key])} is not one of float32, bfloat16, float16")
        return found

    def base(self, content: dict[str, Any], slices: list[Slice]) -> Reference | None:
        """The base model of the merge: the file's, else the one that every slice names."""
        found = self.reference("base_model", content["base_model"]) if content.get("base_model") else None
        if found is None and slices and all(part.base == slices[0].base for part in slices):
            found = slices[0].base
        for number, part in enumerate(slices):
            if part.base not in (None, found):
                self.problem(
                    f"slices.{number}.base_model", "one base model for the whole merge is all that can be read"
                )
        return found


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def scalar(value: Any, kind: Kind) -> Scalar | None:
    """A value as mergekit's types read it (text counts for what it says), None if it is none of that kind."""
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


def parse(content: Any, origin: Path, merges: Collection[str] = ()) -> MergekitFile:
    """Check parsed YAML as a mergekit file.  EvomergeError lists everything that is wrong with it.

    origin: the file, named in the error; relative paths count from its folder.  merges: what may stand where a model
    does besides, the names of the file's other documents.
    """
    read = Reader(origin.parent, merges)
    top = read.mapping("", content, TOP)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in MERGEKIT:
        read.problem("merge_method", f"{shown(method)} is not one of {', '.join(MERGEKIT)}")
    outputs = [key for key in ("models", "slices", "modules") if top.get(key)]
    slices: list[Slice] = []
    settings = [read.settings("parameters", top.get("parameters"))]
    if len(outputs) != 1:
        read.problem("models", f"exactly one of models, slices and modules must be given, here are {len(outputs)}")
    elif outputs == ["modules"]:
        modules = top["modules"]
        if not isinstance(modules, dict) or list(modules) != ["default"]:
            read.problem("modules", "only the one module `default` can be read; this model would have several")
        else:
            module = read.mapping("modules.default", modules["default"], ["models", "slices", "parameters"])
            slices = read.output("modules.default", module)
            settings.insert(0, read.settings("modules.default.parameters", module.get("parameters")))
    else:
        slices = read.output("", top)
    base, tokenizer, dtype = read.base(top, slices), read.tokenizer(top), read.dtype(top)
    template = read.text("chat_template", top["chat_template"]) if top.get("chat_template") else None
    if read.problems:
        raise EvomergeError(f"{origin}: {len(read.problems)} problem(s):\n  " + "\n  ".join(read.problems))
    return MergekitFile(str(method), base, slices, settings, dtype, tokenizer, template, read.notes)
