"""From what a person writes (a folder or a hub id) to a folder on this machine, and to a model_fingerprint of it."""

import glob
import os
import re
from collections.abc import Mapping
from functools import cache
from itertools import islice
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.files import sha256

HUB_ID = re.compile(r"^(?!.*\.\.)(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?\Z")
WILD_PARTS = 3  # of a pattern's path: each one more lists every folder below the last
MATCHES = 10_000
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "README.md"]


def looks_like_hub_id(text: str) -> bool:
    return HUB_ID.match(text) is not None and not text.startswith(".")


def absolute_model(text: str, folder: Path) -> str:
    """What a file in `folder` calls a model, good from anywhere: an absolute path, or a hub id as it is."""
    if looks_like_hub_id(text) and not os.path.isdir(folder / text):
        return text
    return absolute(text, folder)


def absolute(text: str, folder: Path) -> str:
    """A path that a file in `folder` names, good from anywhere.  EvomergeError if no path can be called so."""
    try:
        return str((folder / os.path.expanduser(text)).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a zero byte
        raise EvomergeError(f"{text!r:.200} is no path ({error})") from error


def locate(text: str, relative_to: Path | None = None) -> Path:
    """The folder of a model: an existing path (relative ones from `relative_to`), or a hub id `owner/name`,
    with `@revision` if wanted, downloaded into the Hugging Face cache.  EvomergeError if it is neither."""
    path = (relative_to or Path.cwd()) / os.path.expanduser(text)
    if os.path.isdir(path):
        return path.resolve()
    if os.path.exists(path):
        raise EvomergeError(f"{path}: is a file; a model is a folder with config.json or adapter_config.json")
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
    if sum(map(glob.has_magic, Path(pattern).parts)) > WILD_PARTS:
        raise EvomergeError(f"{pattern}: no more than {WILD_PARTS} parts of a path may hold wildcards")
    found = list(islice(glob.iglob(pattern, root_dir=relative_to), MATCHES + 1))
    if len(found) > MATCHES:
        raise EvomergeError(f"{pattern}: matches more than {MATCHES:,} files; say more of their names")
    matches = [relative_to / match for match in found]
    unique: dict[Path, Path] = {}
    for folder in sorted(matches, key=lambda f: (natural(f.name), f)):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            unique.setdefault(folder.resolve(), folder)
    return list(unique.values())


def natural(name: str) -> list[str | int]:
    """A sort key: text, number, text, number, ..."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name))]


def pinned(text: str, known: Mapping[str, str]) -> str:
    """A model's name that means the same files tomorrow: a hub id as `owner/name@commit`, a folder as it is.

    known: hub ids -> what they stood for when a search began.  EvomergeError if the hub does not give the model.
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
    """A model's folder in the Hugging Face cache, asked for once: a branch that moves meanwhile is not followed."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))


def download(repository: str, revision: str | None, path: Path) -> Path:
    """Fetch a model from the hub.  EvomergeError if it cannot be had; the message names both readings."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot(repository, revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvomergeError(
            f"{repository}: there is no folder {path}, and the hub did not give a model of that name ({reason})"
        ) from error


def model_files(folder: Path) -> list[Path]:
    """Every file that decides what the model computes: weights, configs, tokenizer, template."""
    return sorted(
        p
        for p in folder.iterdir()
        if (p.is_file() and p.suffix in (".safetensors", ".json", ".jinja", ".model")) or p.name == "merges.txt"
    )


def model_fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of the model's files, by name."""
    return {p.name: sha256(p) for p in model_files(folder)}


def stamp(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and inode of the model's files, by name: another file has another stamp."""
    return {p.name: ((s := p.stat()).st_size, s.st_mtime_ns, s.st_ino) for p in model_files(folder)}
