"""A mergekit file, checked: what it says, in its own words.  Whatever is wrong with it is said at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.merge.mergekit.methods import KNOWN, MERGEKIT, Kind, Scalar, kind
from evomerge.sources.locate import absolute_model

TOP = """models slices modules merge_method base_model dtype out_dtype tokenizer_source tokenizer chat_template
    parameters""".split()


@dataclass(frozen=True)
class Reference:
    """A model, and perhaps an adapter on it: `model+lora`.  Paths are absolute, hub ids as they are."""

    model: str
    lora: str | None = None


@dataclass(frozen=True)
class Entry:
    """The value of a parameter for the tensors whose name contains `filter` (None: for all).  values: a gradient's
    knots, or a single one."""

    filter: str | None
    values: tuple[Scalar, ...]


Settings = dict[str, list[Entry]]


@dataclass(frozen=True)
class Input:
    """A model in a slice.  layers: which of its layers [start, end), None for all."""

    model: Reference
    layers: tuple[int, int] | None
    settings: Settings


@dataclass(frozen=True)
class Slice:
    inputs: list[Input]
    settings: Settings


@dataclass
class MergekitFile:
    """settings: for all models and slices, highest precedence first (the module's, the file's)."""

    method: str
    base: Reference | None
    slices: list[Slice]
    settings: list[Settings]
    dtype: str | None = None
    tokenizer: str | Reference | None = None
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


class Reader:
    """Reads parts of the parsed YAML and collects what is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.notes: list[str] = []

    def problem(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}".removeprefix(": "))

    def mapping(self, where: str, value: Any, allowed: list[str]) -> dict[str, Any]:
        """A mapping with no other than the allowed keys; empty if it is none."""
        if not isinstance(value, dict):
            self.problem(where, f"expected a mapping, found {shown(value)}")
            return {}
        for key in value:
            if key not in allowed:
                self.problem(f"{where}.{key}".removeprefix("."), f"unknown key; allowed: {', '.join(allowed)}")
        return {k: v for k, v in value.items() if k in allowed}

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
            return f"{path}@{revision}" if path and revision else path and absolute_model(path, self.folder)
        text = self.text(where, value)
        return text and absolute_model(text, self.folder)

    def reference(self, where: str, value: Any) -> Reference | None:
        if isinstance(value, dict):
            parts = self.mapping(where, value, ["model", "lora"])
            model = self.path(f"{where}.model", parts.get("model"))
            lora = self.path(f"{where}.lora", parts["lora"]) if parts.get("lora") is not None else None
            return Reference(model, lora) if model else None
        if (text := self.text(where, value)) is None:
            return None
        names = text.split("+")
        if len(names) > 2 or not all(names):
            self.problem(where, f"{text!r} is not MODEL or MODEL+LORA")
            return None
        paths = [self.path(where, name) for name in names]
        return Reference(paths[0], *paths[1:]) if all(paths) and paths[0] else None

    def settings(self, where: str, value: Any) -> Settings:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(where, f"expected a mapping, found {shown(value)}")
            return {}
        found: Settings = {}
        for name, setting in value.items():
            if name not in KNOWN:
                self.problem(
                    f"{where}.{name}", f"mergekit has no parameter of that name; it has {', '.join(sorted(KNOWN))}"
                )
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
        return [Entry(None, values)] if values else []

    def conditional(self, where: str, item: Any, kind: Kind) -> Entry | None:
        parts = self.mapping(where, item, ["filter", "value"])
        values = self.values(f"{where}.value", parts.get("value"), kind)
        name = self.text(f"{where}.filter", parts["filter"]) if parts.get("filter") is not None else None
        return Entry(None if name == "*" else name, values) if values else None

    def values(self, where: str, value: Any, kind: Kind) -> tuple[Scalar, ...]:
        knots = value if isinstance(value, list) and value else [value]
        found = [scalar(knot, kind) for knot in knots]
        for knot, one in zip(knots, found, strict=True):
            if one is None:
                self.problem(
                    where, f"expected {'true or false' if kind == 'boolean' else f'a {kind}'}, found {shown(knot)}"
                )
                return ()
        return tuple(one for one in found if one is not None)

    def layers(self, where: str, value: Any) -> tuple[int, int] | None:
        if isinstance(value, list) and len(value) == 2:
            ends = [scalar(end, "integer") for end in value]
            if None not in ends and 0 <= ends[0] < ends[1]:  # type: ignore[operator]
                return int(ends[0]), int(ends[1])  # type: ignore[arg-type]
        self.problem(where, f"expected [FIRST, END] with FIRST below END, found {shown(value)}")
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
        if parts.get("base_model") is not None:
            self.problem(f"{where}.base_model", "one base model for the whole merge is all that can be read")
        if parts.get("residual_weight") is not None:
            self.notes.append(f"{where}.residual_weight: passed over, as mergekit does")
        inputs = self.items(f"{where}.sources", parts.get("sources"), self.source)
        ranges = [i.layers for i in inputs if i.layers]
        if len({end - first for first, end in ranges}) > 1:
            self.problem(where, "its sources have layer ranges of different lengths")
        return Slice(inputs, self.settings(f"{where}.parameters", parts.get("parameters"))) if inputs else None

    def output(self, where: str, value: dict[str, Any]) -> list[Slice]:
        """`models` or `slices` of a file or of its module."""
        prefix = f"{where}." if where else ""
        if value.get("models") is not None:
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
            if parts.get("tokens"):
                self.problem("tokenizer.tokens", "rules for single tokens cannot be read; a vocabulary is taken whole")
            if parts.get("pad_to_multiple_of") is not None:
                self.problem("tokenizer.pad_to_multiple_of", "padded vocabularies cannot be made")
        return value if value in (None, "base", "union") else self.reference(where, value)

    def dtype(self, content: dict[str, Any]) -> str | None:
        """The type of the output: `out_dtype`, else `dtype`, which else is that of the arithmetic only."""
        key = "out_dtype" if content.get("out_dtype") is not None else "dtype"
        if content.get(key) is None:
            return None
        found = str(content[key]).removeprefix("torch.")
        if found not in ("float32", "bfloat16", "float16"):
            self.problem(key, f"{shown(content[key])} is not one of float32, bfloat16, float16")
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


def parse(content: Any, origin: Path) -> MergekitFile:
    """Check parsed YAML as a mergekit file.  EvomergeError lists everything that is wrong with it.

    origin: the file, named in the error; relative paths count from its folder.
    """
    read = Reader(origin.parent)
    top = read.mapping("", content, TOP)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in MERGEKIT:
        read.problem("merge_method", f"{shown(method)} is not one of {', '.join(MERGEKIT)}")
    outputs = [key for key in ("models", "slices", "modules") if top.get(key) is not None]
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
    base = read.reference("base_model", top["base_model"]) if top.get("base_model") is not None else None
    tokenizer, dtype = read.tokenizer(top), read.dtype(top)
    template = read.text("chat_template", top["chat_template"]) if top.get("chat_template") is not None else None
    if read.problems:
        raise EvomergeError(f"{origin}: {len(read.problems)} problem(s):\n  " + "\n  ".join(read.problems))
    return MergekitFile(str(method), base, slices, settings, dtype, tokenizer, template, read.notes)
