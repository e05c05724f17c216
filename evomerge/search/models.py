"""The models of a configuration: where their files lie, how they are opened, and whether the files have changed."""

from collections.abc import Mapping
from pathlib import Path

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import models_on_disk
from evomerge.sources.fingerprint import file_stamps
from evomerge.sources.locate import locate
from evomerge.sources.open_models import Models, open_models


def model_folders(config: SearchConfig) -> dict[str, Path]:
    """The folders of the base (`base`) and of each source on this machine, by name.

    The models of a source that is a recipe are called `source/name`.
    """
    found = {"base": locate(config.base)}
    for source in config.sources:
        if source.recipe is None:
            found[source.name] = locate(source.path)
        else:
            found |= {name: locate(m.path) for name, m in models_on_disk(source.recipe, f"{source.name}/")}
    return found


def open_config_models(config: SearchConfig, strict: bool = True) -> Models:
    """Open and check the models of a configuration.

    EvomergeError lists all that does not fit together; it is kept in the result's `compatibility` if not `strict`.
    """
    from evomerge.merge.recipe.open_bank import open_nested

    sources = {
        s.name: open_nested(s.name, s.recipe, "cpu", None) if s.recipe else locate(s.path) for s in config.sources
    }
    return open_models(
        locate(config.base), sources, strict, vocabulary=config.vocabulary, allowed=config.allow_differences
    )


def shapes_of(models: Models) -> list[tuple[int, ...]]:
    """The shapes of the base's tensors."""
    return [t.shape for t in models.base.tensors.values()]


def model_stamps(folders: Mapping[str, Path]) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Stamps of the models' files by model and file name: a file that was changed or replaced has another one."""
    return {name: file_stamps(folder) for name, folder in folders.items()}


def refuse_changed(before: Mapping[str, Mapping[str, object]], now: Mapping[str, Mapping[str, object]]) -> None:
    """EvomergeError if the stamps of the models' files differ from those of before."""
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
