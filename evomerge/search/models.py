"""The models of a search: where they lie, opened, and whether their files are still the same."""

from collections.abc import Mapping
from pathlib import Path

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.sources.fingerprint import file_stamps
from evomerge.sources.locate import locate
from evomerge.sources.open_models import Models, open_models


def model_folders(config: SearchConfig) -> dict[str, Path]:
    """Where the base (`base`) and each source lie on this machine, by name."""
    return {"base": locate(config.base)} | {s.name: locate(s.path) for s in config.sources}


def open_config_models(config: SearchConfig) -> Models:
    """The models of a configuration, opened and checked.  EvomergeError lists what does not fit."""
    folders = model_folders(config)
    return open_models(folders.pop("base"), folders, allowed=config.allow_differences)


def shapes_of(models: Models) -> list[tuple[int, ...]]:
    """The shapes of the base's tensors."""
    return [t.shape for t in models.base.tensors.values()]


def stamps(folders: Mapping[str, Path]) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Who the files of models are, by the model's name; in microseconds."""
    return {name: file_stamps(folder) for name, folder in folders.items()}


def refuse_changed(before: Mapping[str, Mapping[str, object]], now: Mapping[str, Mapping[str, object]]) -> None:
    """EvomergeError if files of the models are not what they were."""
    names = [
        f"{m}/{f}"
        for m in before
        for f in sorted(before[m].keys() | now[m].keys())
        if before[m].get(f) != now[m].get(f)
    ]
    if names:
        raise EvomergeError(
            f"{', '.join(names)}: changed while the search runs, so trials would not be comparable. Put the old files "
            "back, or start a new run; `evomerge resume` says what differs"
        )
