"""The models of a configuration: where their files lie, how they are opened, and whether the files have changed."""

from collections.abc import Callable, Mapping
from pathlib import Path

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.recipe import models_on_disk
from evomerge.sources.fingerprint import file_stamps
from evomerge.sources.hub import Headers, Progress
from evomerge.sources.locate import before_download, fetch, locate
from evomerge.sources.open_models import Models, open_models


def model_names(config: SearchConfig) -> dict[str, str]:
    """The base (`base`) and each source, folders or hub ids, by name.

    The models of a source that is a recipe are called `source/name`.
    """
    found = {"base": config.base}
    for source in config.sources:
        if source.recipe is None:
            found[source.name] = source.path
        else:
            found |= {name: m.path for name, m in models_on_disk(source.recipe, f"{source.name}/")}
    return found


def model_folders(config: SearchConfig) -> dict[str, Path]:
    """The folders of all models of a configuration on this machine, see `model_names`."""
    return {name: locate(path) for name, path in model_names(config).items()}


def open_config_models(
    config: SearchConfig,
    strict: bool = True,
    progress: Progress | None = None,
    check: Callable[[Models], object] = lambda models: None,
) -> Models:
    """Open and check the models of a configuration; those of the hub before their weights are downloaded.

    progress: of the download.
    check: called before it, with models of which only the headers are there.

    EvomergeError lists all that does not fit together; it is kept in the result's `compatibility` if not `strict`, and
    then nothing is downloaded.
    """
    names = model_names(config)
    with before_download(names.values()) as headers:
        if headers.folders:
            found = open_located(with_stand_ins(config, headers), strict)
            if problems := found.compatibility.problems:
                problems[:] = map(headers.named, problems)
                return found
            check(found)
    fetch(names.values(), progress)
    return open_located(config, strict)


def with_stand_ins(config: SearchConfig, headers: Headers) -> SearchConfig:
    """The configuration with folders of headers instead of the models that are not downloaded yet."""
    from evomerge.merge.recipe.open_bank import with_stand_ins as recipe_with_stand_ins

    sources = [
        s.model_copy(update={"recipe": recipe_with_stand_ins(s.recipe, headers)})
        if s.recipe
        else s.model_copy(update={"path": headers.stand_in(s.path)})
        for s in config.sources
    ]
    return config.model_copy(update={"base": headers.stand_in(config.base), "sources": sources})


def open_located(config: SearchConfig, strict: bool) -> Models:
    """Open and check the models of a configuration, see `open_config_models`."""
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
