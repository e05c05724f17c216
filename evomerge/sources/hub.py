"""Models of the Hugging Face hub: their commits, their headers before their weights, the download into the cache.

A repository is read in three steps.  `small_files` fetches configuration, tokenizer and card, which gives the commit.
`headers` makes a folder that has the headers of the weight files and a hole instead of their data, so that models can
be opened and compared before any weight is downloaded.  `download` fetches the weights.
"""

import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evomerge.errors import EvomergeError, first_line
from evomerge.files.write import disk_errors
from evomerge.parse import parse_json
from evomerge.sources.quantised import INTEGERS
from evomerge.sources.safetensors_files import HEADER_BYTES, weight_files
from evomerge.sources.tensor_names import is_computed_buffer

SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "README.md"]
REFUSED = ("*.bin", "*.pt", "*.pth", "*.gguf")  # never fetched; that they are there makes the message clearer
BELOW = ["*/*"]  # files in folders of the repository
FIRST_BYTES = 100_000  # the header of nearly every file, with its length (huggingface_hub takes as many)
INTEGER_TENSORS, INTEGER_BYTES = 200, 64 << 20  # they are compared before the download, unless there are more of them
SPARE_BYTES = 1 << 30  # of the disk, left free
Progress = Callable[[int, int], None]


class NoSuchModel(EvomergeError):
    """The hub does not have a model, or does not show it."""


@dataclass(frozen=True)
class HubModel:
    """A commit of a repository.

    folder: of the commit in the cache of huggingface_hub; it has the small files.
    sizes: file -> bytes, of those at the top of the repository; empty if the hub cannot be reached.
    """

    repository: str
    folder: Path
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        """`owner/name@commit`."""
        return f"{self.repository}@{self.folder.name}"

    @cached_property
    def weights(self) -> list[str]:
        """The weight files that a merge reads; all safetensors files if that cannot be told."""
        found = [name for name in self.sizes if name.endswith(".safetensors")]
        with TemporaryDirectory() as empty:  # where only names count
            for name in found:
                Path(empty, name).touch()
            for index in self.folder.glob("*.safetensors.index.json"):
                shutil.copyfile(index, Path(empty, index.name))
            try:
                return [file.name for file in weight_files(Path(empty))[0]]
            except EvomergeError:
                return found

    @property
    def missing(self) -> dict[str, int]:
        """The weight files that are not in the cache yet, with their sizes."""
        return {name: self.sizes[name] for name in self.weights if not (self.folder / name).is_file()}


@cache
def small_files(repository: str, revision: str | None) -> Path:
    """The folder of a commit in the cache, with all files at the top of the repository that are no weights.

    The hub is asked once in a process, so a branch that moves while it runs is not followed.  If it cannot be reached,
    the cache answers.
    """
    from huggingface_hub import snapshot_download

    with hub_errors("the hub did not give a model of that name", revision, NoSuchModel), bars(False):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=SMALL_FILES, ignore_patterns=BELOW))


@cache
def hub_model(repository: str, revision: str | None) -> HubModel:
    """A commit of a repository with the sizes of its files.  EvomergeError if there is no such model."""
    from huggingface_hub import HfApi

    folder = small_files(repository, revision)
    try:
        info = HfApi().model_info(repository, revision=folder.name, files_metadata=True)
    except Exception as error:  # the HTTP client, and with it its errors, differs between versions
        if not any(folder.glob("*.safetensors")):
            raise EvomergeError(
                f"{repository}@{folder.name}: its weights are not in the cache, and the hub does not answer "
                f"({first_line(error)})"
            ) from error
        return HubModel(repository, folder, {})
    return HubModel(
        repository, folder, {f.rfilename: f.size or 0 for f in info.siblings or () if "/" not in f.rfilename}
    )


@cache
def snapshot(repository: str, revision: str | None) -> Path:
    """The folder of a model in the cache, downloaded if it is not there.  EvomergeError if it cannot be had."""
    model = hub_model(repository, revision)
    download([model])
    return model.folder


@dataclass(frozen=True)
class Headers:
    """Folders in which models of the hub can be opened and compared without their weights.

    folders: name of a model -> its folder; only of models whose weights are not in the cache yet.
    names: folder -> `owner/name@commit`.
    """

    folders: dict[str, str]
    names: dict[str, str]

    def stand_in(self, model: str) -> str:
        """The folder to open instead of a model; the model itself if there is none."""
        return self.folders.get(model, model)

    def named(self, text: str) -> str:
        """A message with the names of the models instead of the folders."""
        for folder, name in self.names.items():
            text = text.replace(folder, name)
        return text


@contextmanager
def headers(models: Mapping[str, HubModel]) -> Iterator[Headers]:
    """Within the context, folders that have the headers of the models whose weights are not in the cache yet.

    models: by the name that they are asked for.

    An EvomergeError in the context names the models instead of the folders.
    """
    with TemporaryDirectory(prefix="evomerge-headers-", ignore_cleanup_errors=True) as top:
        found = Headers({}, {})
        for text, model in models.items():
            if model.missing or (model.sizes and not model.weights):  # without weights, opening tells what is wrong
                folder = Path(top).resolve() / model.folder.relative_to(model.folder.parents[2])
                if str(folder) not in found.names:
                    write_headers(model, folder)
                found.folders[text], found.names[str(folder)] = str(folder), model.name
        try:
            yield found
        except EvomergeError as error:
            raise EvomergeError(found.named(str(error))) from error


def write_headers(model: HubModel, folder: Path) -> None:
    """Fill a folder with the small files of a model, and with its weight files, which have holes for data."""
    folder.mkdir(parents=True)
    for file in model.folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    for name in model.sizes:
        if any(fnmatch(name, pattern) for pattern in REFUSED):
            (folder / name).touch()
    for name in model.weights:
        if not (folder / name).exists():
            write_header(model, name, folder / name)


def write_header(model: HubModel, name: str, path: Path) -> None:
    """Write one weight file: its header and its tensors of integers, which must be equal in all models of a merge."""
    size = model.sizes[name]
    begin = content(model, name, 0, min(FIRST_BYTES, size))
    end = 8 + int.from_bytes(begin[:8], "little")
    if len(begin) < end <= min(size, HEADER_BYTES):
        begin += content(model, name, len(begin), end)
    with disk_errors(path), path.open("wb") as file:
        file.write(begin[:size])
        file.truncate(size)
        for first, last in integer_parts(begin[8:end]):
            if len(begin) < end + last <= size:
                file.seek(end + first)
                file.write(content(model, name, end + first, end + last))


def integer_parts(header: bytes) -> list[tuple[int, int]]:
    """Where tensors of integers begin and end behind a header; none if it is malformed, which is said at opening."""
    found = []
    try:
        entries = parse_json(header.decode(), "header")
        for name, entry in entries.items():
            if name != "__metadata__" and entry["dtype"] in INTEGERS and not is_computed_buffer(name):
                first, last = map(int, entry["data_offsets"])
                found.append((first, last))
    except (EvomergeError, AttributeError, KeyError, TypeError, ValueError):
        return []
    parts = [(first, last) for first, last in found if 0 <= first < last]
    few = len(parts) <= INTEGER_TENSORS and sum(last - first for first, last in parts) <= INTEGER_BYTES
    return parts if few else []


def content(model: HubModel, name: str, first: int, last: int) -> bytes:
    """The bytes of a file from `first` up to and without `last`."""
    from huggingface_hub import hf_hub_url

    if first >= last:
        return b""
    url = hf_hub_url(model.repository, name, revision=model.folder.name)
    with hub_errors(f"{model.name}: the hub did not give the header of {name}"):
        asked = client().build_hf_headers() | {"range": f"bytes={first}-{last - 1}"}
        answer = client().get_session().get(url, headers=asked, timeout=30)
        client().hf_raise_for_status(answer)
    body: bytes = answer.content
    return body[first:last] if answer.status_code != 206 else body  # else the whole file came


def download(models: Iterable[HubModel], progress: Progress | None = None) -> None:
    """Fetch the weights of models into the cache.

    progress: called about once a second with the bytes that have come and those of all models; None shows the bars of
        huggingface_hub in a terminal.

    EvomergeError if they do not fit on the disk, or the download fails; it goes on where it stopped if it is repeated.
    """
    wanted = list({model.name: model for model in models if model.missing or not model.sizes}.values())
    refuse_small_disk(wanted)
    total, before = sum(sum(model.missing.values()) for model in wanted), 0
    for model in wanted:
        size = sum(model.missing.values())
        if progress is None or not size:
            fetch_weights(model, sys.stderr.isatty())
            continue
        with counted(model.folder.parents[1] / "blobs", partial(tell_sum, progress, before, size, total)):
            fetch_weights(model, False)
        before += size
        progress(before, total)


def tell_sum(progress: Progress, before: int, size: int, total: int, done: int) -> None:
    """Tell how much of all models has come.  before: bytes of earlier models; size, done: of the present one."""
    progress(before + min(done, size), total)


def fetch_weights(model: HubModel, show: bool) -> None:
    """Fetch the weights of one model that are not in the cache.  show: whether to show bars."""
    if not model.sizes:  # the hub cannot be reached: opening the folder tells what is not there
        return
    from huggingface_hub import snapshot_download

    if model.missing:
        with hub_errors(f"{model.name}: the hub did not give its weights; what has come is kept"), bars(show):
            snapshot_download(model.repository, revision=model.folder.name, allow_patterns=model.weights)


@contextmanager
def counted(folder: Path, tell: Callable[[int], None]) -> Iterator[None]:
    """Within the context, tell once a second by how many bytes the files of a folder have grown."""

    def held() -> int:
        return sum(f.stat().st_size for f in folder.iterdir()) if folder.is_dir() else 0

    def watch() -> None:
        while not ended.wait(1.0):
            try:
                tell(max(0, held() - before))
            except OSError:  # a file has been given its last name meanwhile
                continue

    before, ended = held(), threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def refuse_small_disk(models: Iterable[HubModel]) -> None:
    """EvomergeError if what is to be downloaded does not fit on the disk of the cache."""
    from huggingface_hub import constants

    wanted = {model.name: sum(model.missing.values()) for model in models if model.missing}
    if not wanted:
        return
    folder = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if (needed := sum(wanted.values())) + SPARE_BYTES > free:
        raise EvomergeError(
            f"{folder}: {needed / 1e9:.1f} GB are to be downloaded ({', '.join(wanted)}) and 1 GB to be left, but only "
            f"{free / 1e9:.1f} GB are free; make room, or set HF_HOME to a folder on another disk"
        )


@contextmanager
def hub_errors(what: str, revision: str | None = None, kind: type[EvomergeError] = EvomergeError) -> Iterator[None]:
    """Within the context, whatever the client of the hub raises becomes an EvomergeError: what failed, and why."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except Exception as error:  # the HTTP client, and with it its errors, differs between versions
        reason = first_line(error)
        if isinstance(error, GatedRepoError):
            reason = "its owner wants terms to be accepted: do so on its page, then log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "no such repository; if it is a private one, log in with `hf auth login`"
        elif isinstance(error, RevisionNotFoundError):
            reason = f"it has no branch, tag or commit {revision}"
        raise kind(f"{what} ({reason})") from error


def client() -> Any:
    """The functions of huggingface_hub for requests; mypy does not see that they are exported."""
    from huggingface_hub import utils

    return utils


@contextmanager
def bars(show: bool) -> Iterator[None]:
    """Within the context, huggingface_hub shows progress bars or does not; without a terminal they fill a log."""
    change = not show and not client().are_progress_bars_disabled()
    if change:
        client().disable_progress_bars()
    try:
        yield
    finally:
        if change:
            client().enable_progress_bars()
