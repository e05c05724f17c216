"""What transformers knows of a model without its weights: its configuration with all defaults, its layers, their names.

A layer has several names: one in the files of a checkpoint, and others in memory that change with transformers'
version (`language_model.model.layers`, `model.language_model.layers`; experts one by one, or stacked in one tensor).
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

WRAPPERS = frozenset({"base_model", "language_model", "model", "transformer"})  # modules that only hold others
NUMBER = re.compile(r"\d+")
Place = tuple[str, str | None, tuple[int, ...]]
"""A tensor's name in memory without wrappers; the rule that puts it there together with others, and its numbers."""


def known_config(config: Mapping[str, Any]) -> Any | None:
    """A configuration as transformers reads it, with all defaults; None if it does not know the architecture."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:  # reading a file, transformers also decodes what JSON cannot say
        Path(folder, "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception:  # a configuration may be wrong in any way, and each architecture checks its own
            return None


def empty_model(config: Mapping[str, Any]) -> Any | None:
    """The model that a configuration describes, without memory for its weights (on torch's `meta` device).

    None if transformers does not know the architecture, or lacks a package that it needs.
    """
    return build(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def build(text: str) -> Any | None:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = json.loads(text)
    known = known_config(config)
    for kind in () if known is None else classes(config, known):
        try:
            with torch.device("meta"):
                return kind(known)
        except Exception:
            continue
    return None


def classes(config: Mapping[str, Any], known: Any) -> Iterator[Any]:
    """What may build the model of a configuration: the class that it names, then those for its model type."""
    import transformers

    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(known):
            yield kind
    for task in ("CausalLM", "ImageTextToText", "Seq2SeqLM"):
        yield getattr(transformers, f"AutoModelFor{task}").from_config
    yield transformers.AutoModel.from_config


@dataclass(frozen=True)
class Part:
    """A checkpoint's tensor as it lies in a parameter of the model in memory: parameter[expert, rows].

    expert: None unless the parameter stacks experts.  rows: None if all are this tensor's.
    """

    tensor: str
    expert: int | None = None
    rows: slice | None = None


class Names:
    """The names of a model in memory, in any version of transformers, and the tensors of a checkpoint they are."""

    def __init__(self, model: Any | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """model: of `empty_model`.  shapes: of the checkpoint's tensors by name."""
        self.model = model
        self.shapes = shapes
        self.modules = {} if model is None else {bare(n): m for n, m in model.named_modules(remove_duplicate=False)}
        self.parameters = {} if model is None else dict(model.state_dict(keep_vars=True))
        self.renamings, self.converters = conversions(model)
        self.stored: dict[Place, str | None] = {}
        self.stacked: dict[str, dict[str, list[tuple[tuple[int, ...], str]]]] = {}  # -> rule -> numbers, tensor
        for name in shapes:
            where = memory, rule, numbers = self.place(name)
            self.stored[where] = None if where in self.stored else name  # None: two tensors would be meant
            if rule is not None:
                self.stacked.setdefault(memory, {}).setdefault(rule, []).append((numbers, name))

    def place(self, name: str) -> Place:
        """Where transformers puts the tensor of a name, whichever version wrote that."""
        if self.model is None:
            return bare(name), None, ()
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        memory, rule = rename_source_key(name, self.renamings, self.converters, prefix, self.parameters)
        return bare(memory), rule, tuple(map(int, NUMBER.findall(name))) if rule else ()

    def module_of(self, name: str) -> Any | None:
        """The module that holds the parameter of a name; None if it is not known."""
        return self.modules.get(self.place(name)[0].rpartition(".")[0])

    def find(self, name: str) -> list[Part] | None:
        """The tensors of the checkpoint that a parameter consists of; None if there are none.

        ValueError says in what form they are stored if it is not that of the parameter.
        """
        if name in self.shapes:
            return [Part(name)]
        where = memory, rule, _ = self.place(name)
        if found := self.stored.get(where):
            return [Part(found)]
        return self.parts(self.stacked[memory]) if rule is None and memory in self.stacked else None

    def parts(self, by_rule: Mapping[str, list[tuple[tuple[int, ...], str]]]) -> list[Part]:
        """The tensors of a stacked parameter: experts along its first axis, projections along its rows."""
        converter = next(c for c in self.converters if next(iter(by_rule)) in c.source_patterns)
        steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        stacks, joins = steps[:1] == [("MergeModulelist", 0)], len(converter.source_patterns) > 1
        wanted = [("MergeModulelist", 0)] * stacks + [("Concatenate", int(stacks))] * joins
        if steps != wanted or len(converter.target_patterns) > 1:
            raise ValueError(" and ".join(step for step, _ in steps))
        found, row = [], 0
        for rule in converter.source_patterns:
            tensors = [name for _, name in sorted(by_rule.get(rule, []))]
            height = self.shapes[tensors[0]][0] if tensors else 0
            rows = slice(row, row + height) if joins else None
            found += [Part(name, at if stacks else None, rows) for at, name in enumerate(tensors)]
            row += height
        return found


def bare(name: str) -> str:
    """A name without the modules that only hold others, which differ between versions and classes."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def conversions(model: Any | None) -> tuple[list[Any], list[Any]]:
    """transformers' rules from the names in files to those in memory: renamings, and converters of several tensors."""
    if model is None:
        return [], []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules: Iterable[Any] = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return [rule for rule in rules if not isinstance(rule, WeightConverter)], converters


def head_of(model: Any | None) -> str:
    """The name of the head's matrix in memory, which every version loads."""
    if model is None or (head := model.get_output_embeddings()) is None:
        return "lm_head.weight"
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)
