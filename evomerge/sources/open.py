"""Open a base and its sources together, checked against each other before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.sources.adapter import Adapter, open_adapter
from evomerge.sources.checkpoint import Checkpoint, open_checkpoint
from evomerge.sources.compatibility import Compatibility, check


@dataclass
class Models:
    """The base model and the sources by name, in the order in which recipes list them."""

    base: Checkpoint
    sources: dict[str, Checkpoint | Adapter]
    compatibility: Compatibility


def open_models(
    base: Path, sources: Mapping[str, Path | Checkpoint], strict: bool = True, any_depth: bool = False
) -> Models:
    """Open folders as base and sources; a source may be open already.

    With `strict`, EvomergeError lists every incompatibility.  any_depth: the number of layers is none of them.
    """
    base_model = open_checkpoint(base)
    opened: dict[str, Checkpoint | Adapter] = {}
    for name, source in sources.items():
        opened[name] = source if isinstance(source, Checkpoint) else open_source(source, base_model)
    found = check(base_model, opened, any_depth)
    if strict and found.problems:
        raise EvomergeError("these models cannot be merged:\n  " + "\n  ".join(found.problems))
    return Models(base_model, opened, found)


def open_source(folder: Path, base: Checkpoint) -> Checkpoint | Adapter:
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    return open_adapter(folder, base) if is_adapter else open_checkpoint(folder)
