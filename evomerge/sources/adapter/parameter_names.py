"""From the name of a parameter in memory to the tensors of the checkpoint that hold it.

An adapter's file uses the parameter names of a model in memory.  These change with the version of transformers
(`language_model.model.layers`, `model.language_model.layers`), and one parameter may hold several tensors of the
checkpoint (experts that are stacked, projections that are joined).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

WRAPPERS = frozenset({"base_model", "language_model", "model", "transformer"})  # modules that only hold others
NUMBER = re.compile(r"\d+")

ParameterKey = tuple[str, str | None, tuple[int, ...]]
"""What identifies a tensor in memory: the parameter's name without wrappers; the rule of transformers that joins it
with other tensors into that parameter, or None; the numbers in the tensor's own name."""


@dataclass(frozen=True)
class ParameterPart:
    """The part of a parameter that one tensor of the checkpoint holds: parameter[expert, rows].

    tensor: its name in the checkpoint.
    expert: the index of the expert; None unless the parameter stacks experts.
    rows: the rows of the parameter; None for all rows.
    """

    tensor: str
    expert: int | None = None
    rows: slice | None = None


class ParameterNames:
    """Finds the tensors of a checkpoint by the name of a parameter, whichever version of transformers wrote that name.

    shapes: of the checkpoint's tensors, by name.
    modules: of the model in memory, by their names without wrappers.
    """

    def __init__(self, model: Any | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """model: of `empty_model`; None if transformers does not know the architecture."""
        self.model = model
        self.shapes = shapes
        named = () if model is None else model.named_modules(remove_duplicate=False)
        self.modules = {without_wrappers(name): module for name, module in named}
        self.parameters = {} if model is None else dict(model.state_dict(keep_vars=True))
        self.renamings, self.converters = conversion_rules(model)
        self.stored: dict[ParameterKey, str | None] = {}
        self.stacked: dict[str, dict[str, list[tuple[tuple[int, ...], str]]]] = {}  # -> rule -> numbers, tensor
        for name in shapes:
            key = parameter, rule, numbers = self.key(name)
            self.stored[key] = None if key in self.stored else name  # None: two tensors would be meant
            if rule is not None:
                self.stacked.setdefault(parameter, {}).setdefault(rule, []).append((numbers, name))

    def key(self, name: str) -> ParameterKey:
        """Where transformers loads a tensor of this name."""
        if self.model is None:
            return without_wrappers(name), None, ()
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        parameter, rule = rename_source_key(name, self.renamings, self.converters, prefix, self.parameters)
        return without_wrappers(parameter), rule, tuple(map(int, NUMBER.findall(name))) if rule else ()

    def module_of(self, name: str) -> Any | None:
        """The module that holds the parameter called `name`; None if it is not known."""
        return self.modules.get(self.key(name)[0].rpartition(".")[0])

    def parts_of(self, name: str) -> list[ParameterPart] | None:
        """The tensors of the checkpoint that hold the parameter called `name`; None if there are none.

        ValueError if they are stored in another form than the parameter; the message names the conversion.
        """
        if name in self.shapes:
            return [ParameterPart(name)]
        key = parameter, rule, _ = self.key(name)
        if found := self.stored.get(key):
            return [ParameterPart(found)]
        return self.stacked_parts(self.stacked[parameter]) if rule is None and parameter in self.stacked else None

    def stacked_parts(self, by_rule: Mapping[str, list[tuple[tuple[int, ...], str]]]) -> list[ParameterPart]:
        """The tensors of a parameter that joins several: experts along its first axis, projections along its rows."""
        converter = next(c for c in self.converters if next(iter(by_rule)) in c.source_patterns)
        steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        stacks, joins = steps[:1] == [("MergeModulelist", 0)], len(converter.source_patterns) > 1
        understood = [("MergeModulelist", 0)] * stacks + [("Concatenate", int(stacks))] * joins
        if steps != understood or len(converter.target_patterns) > 1:
            raise ValueError(" and ".join(step for step, _ in steps))
        found, row = [], 0
        for rule in converter.source_patterns:
            tensors = [name for _, name in sorted(by_rule.get(rule, []))]
            height = self.shapes[tensors[0]][0] if tensors else 0
            rows = slice(row, row + height) if joins else None
            found += [ParameterPart(name, at if stacks else None, rows) for at, name in enumerate(tensors)]
            row += height
        return found


def without_wrappers(name: str) -> str:
    """A name without the modules that only hold others; those differ between versions and classes."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def conversion_rules(model: Any | None) -> tuple[list[Any], list[Any]]:
    """The rules by which transformers turns names in files into names in memory.

    Returns the renamings, and the converters that join several tensors into one parameter.
    """
    if model is None:
        return [], []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules: Iterable[Any] = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return [rule for rule in rules if not isinstance(rule, WeightConverter)], converters
