"""From what a person writes for a model (a folder, a hub id, a pattern of folders) to folders on this machine."""

import glob
import os
import re
from collections.abc import Mapping
from functools import cache
from itertools import islice
from pathlib import Path

from evomerge.errors import EvomergeError

HUB_ID = re.compile(r"^(?!.*\.\.)(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?\Z")
WILDCARD_PARTS = 3  # how many parts of a pattern's path may hold wildcards: each lists all folders of the last
MATCHES = 10_000
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md"]


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


def absolute_path(text: str, folder: Path) -> str:
    """The absolute path for a path that a file in `folder` names.  EvomergeError if it cannot be a path."""
    try:
        return str((folder / os.path.expanduser(text)).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a zero byte
        raise EvomergeError(f"{text!r:.200} is no path ({error})") from error


def locate(text: str, relative_to: Path | None = None) -> Path:
    """The folder of a model, or the only file of one without a configuration.

    text: a path, relative to `relative_to` (by default the current folder); or a hub id `owner/name` or
        `owner/name@revision`, which is downloaded into the Hugging Face cache.

    EvomergeError if it is neither.
    """
    path = (relative_to or Path.cwd()) / os.path.expanduser(text)
    if os.path.isdir(path):
        return path.resolve()
    if is_model_file(path):
        return path.resolve()
    if os.path.exists(path):
        raise EvomergeError(
            f"{path}: is a file; a model is a folder with config.json or adapter_config.json, or a .safetensors file"
        )
    match = HUB_ID.match(text)
    if not match or text.startswith("."):
        raise EvomergeError(f"{path}: no such folder")
    return download(match["repo"], match["revision"], path)


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
    match = HUB_ID.match(text)
    if not match or text.startswith(".") or os.path.exists(os.path.expanduser(text)):
        return text
    folder = locate(text)  # .../models--owner--name/snapshots/<commit>
    return f"{match['repo']}@{folder.name}" if folder.parent.name == "snapshots" else text


@cache
def snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a model in the Hugging Face cache.

    The hub is asked once in a process, so a branch that moves while it runs is not followed.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))


def download(repository: str, revision: str | None, path: Path) -> Path:
    """Fetch a model from the hub and return its folder.

    path: the folder that the text could also mean, for the message.
    EvomergeError if the hub does not have the model, or cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot(repository, revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvomergeError(
            f"{repository}: there is no folder {path}, and the hub did not give a model of that name ({reason})"
        ) from error
