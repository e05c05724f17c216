"""From what a person writes for a model (a folder, a hub id, a pattern of folders) to folders on this machine."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from evomerge.errors import EvomergeError
from evomerge.files.read import absolute_path
from evomerge.sources.hub import (
    Headers,
    HubModel,
    NoSuchModel,
    Progress,
    download,
    headers,
    hub_model,
    small_files,
    snapshot,
)

HUB_ID = re.compile(r"^(?!.*\.\.)(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?\Z")
WILDCARD_PARTS = 3  # how many parts of a pattern's path may hold wildcards: each lists all folders of the last
MATCHES = 10_000
Found = TypeVar("Found")


def looks_like_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name` or `owner/name@revision`."""
    return HUB_ID.match(text) is not None and not text.startswith(".")


def absolute_model(text: str, folder: Path) -> str:
    """The model that a file in `folder` names, as text that does not depend on the current folder.

    Returns an absolute path, or a hub id unchanged.
    """
    here = folder / text
    if looks_like_hub_id(text) and not os.path.isdir(here) and not is_model_file(here):
        return text
    return absolute_path(text, folder)


def is_model_file(path: Path) -> bool:
    """Whether a path is a file that is a model of its own, without a configuration."""
    return path.suffix == ".safetensors" and os.path.isfile(path)


def locate(text: str, relative_to: Path | None = None) -> Path:
    """The folder of a model, or the only file of one without a configuration.

    text: a path, relative to `relative_to` (by default the current folder); or a hub id `owner/name` or
        `owner/name@revision`, which is downloaded into the Hugging Face cache.

    EvomergeError if it is neither.
    """
    path = (relative_to or Path.cwd()) / os.path.expanduser(text)
    if os.path.isdir(path) or is_model_file(path):
        return path.resolve()
    if os.path.exists(path):
        raise EvomergeError(
            f"{path}: is a file; a model is a folder with config.json or adapter_config.json, or a .safetensors file"
        )
    match = HUB_ID.match(text)
    if not match or text.startswith("."):
        raise EvomergeError(f"{path}: no such folder")
    return asked(snapshot, match, path)


def matching_models(pattern: str, relative_to: Path) -> list[Path]:
    """The model folders that a pattern such as `run/checkpoint-*` matches, in natural order.

    Numbers in a folder's name count as numbers: checkpoint-900 comes before checkpoint-1000.  Several links to
    one folder (`checkpoint-latest`) count once.
    """
    pattern = os.path.expanduser(pattern)
    if sum(map(glob.has_magic, Path(pattern).parts)) > WILDCARD_PARTS:
        raise EvomergeError(f"{pattern}: no more than {WILDCARD_PARTS} parts of a path may hold wildcards")
    found = list(islice(glob.iglob(pattern, root_dir=relative_to), MATCHES + 1))
    if len(found) > MATCHES:
        raise EvomergeError(f"{pattern}: matches more than {MATCHES:,} files; make it more specific")
    matches = [relative_to / match for match in found]
    unique: dict[Path, Path] = {}
    for folder in sorted(matches, key=lambda f: (natural_sort_key(f.name), f)):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            unique.setdefault(folder.resolve(), folder)
    return list(unique.values())


def natural_sort_key(name: str) -> list[str | int]:
    """A name as text, number, text, number, ..."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))]


def pinned(text: str, known: Mapping[str, str]) -> str:
    """The name of a model with the commit that it means now: a hub id as `owner/name@commit`, a folder unchanged.

    known: hub ids and the pinned names that they had when a search began.
    EvomergeError if the hub does not have the model.
    """
    if text in known:
        return known[text]
    if (match := on_hub(text)) is None:
        return text
    return f"{match['repo']}@{asked(small_files, match, Path(text)).name}"


def folder_of_card(text: str) -> Path:
    """The folder that has the card of a model; of one on the hub nothing but its small files is downloaded."""
    return locate(text) if (match := on_hub(text)) is None else asked(small_files, match, Path(text))


def on_hub(text: str) -> re.Match[str] | None:
    """The parts of a hub id; None if the text is none, or there is a folder or a file of that name."""
    return HUB_ID.match(text) if looks_like_hub_id(text) and not os.path.exists(os.path.expanduser(text)) else None


def hub_models(texts: Iterable[str]) -> dict[str, HubModel]:
    """The models of the hub among some models.  EvomergeError if the hub does not have one."""
    return {text: asked(hub_model, match, Path(text)) for text in texts if (match := on_hub(text)) is not None}


def asked(ask: Callable[[str, str | None], Found], match: re.Match[str], path: Path) -> Found:
    """What a function of hub.py gives for a hub id.

    match: the parts of the id.  path: the folder that it could also mean, for the message.
    """
    try:
        return ask(match["repo"], match["revision"])
    except NoSuchModel as error:
        raise EvomergeError(f"{match['repo']}: there is no folder {path.absolute()}, and {error}") from error


def before_download(texts: Iterable[str]) -> AbstractContextManager[Headers]:
    """Within the context, what stands in for the models of the hub whose weights are not here yet (see `headers`)."""
    return headers(hub_models(texts))


def fetch(texts: Iterable[str], progress: Progress | None = None) -> None:
    """Download the models of the hub among some models, see `download`."""
    download(hub_models(texts).values(), progress)
