"""Upload what a merge has written to the Hugging Face hub, as one commit of a new repository."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from evomerge import __version__
from evomerge.errors import EvomergeError, some
from evomerge.files.new_folder import refuse_full
from evomerge.files.read import read_json, read_text
from evomerge.merge.recipe.recipe import Recipe, dump_recipe, load_recipe, models_on_disk
from evomerge.printable import say

THIS_FOLDER = "path/to/this/folder"  # how a card calls the model
OWN_FILES = {".gitattributes"}  # the hub puts it into every new repository


@dataclass(frozen=True)
class Push:
    """Where a model is uploaded to.

    repository: `owner/name`.
    private: whether only its owner sees it; of a repository that exists this is not changed.
    dry_run: write the files and tell what would be uploaded; the hub is not asked anything.
    """

    repository: str
    private: bool = False
    dry_run: bool = False


def push_of(repository: str | None, private: bool, dry_run: bool) -> Push | None:
    """The upload that is asked for, None if none is.  EvomergeError if the options do not make sense."""
    if repository is not None:
        return Push(repository, private, dry_run)
    if private or dry_run:
        raise EvomergeError(f"{'--private' if private else '--dry-run'}: say where to upload with --push OWNER/NAME")
    return None


@contextmanager
def pushed(push: Push | None, recipe: Recipe, out: str | Path | None, near: Path, show: bool) -> Iterator[Path | None]:
    """Within the context, write a model or an adapter, which is then uploaded.

    push: None uploads nothing.
    recipe: what will be merged.
    out: the folder to write; without it a temporary folder in `near` is used and removed.

    Yields the folder to write; None if neither `push` nor `out` is given.
    EvomergeError before that if the upload would be refused.
    """
    folder = None if out is None else Path(out)
    if push is None:
        yield folder
        return
    if folder is not None:
        refuse_full(folder)
    prepare(push, recipe, show)
    if folder is not None:
        yield folder
        finish(push, folder, show)
        return
    with TemporaryDirectory(prefix="push-", dir=near) as temporary:
        yield (folder := Path(temporary) / push.repository.rpartition("/")[2])
        finish(push, folder, show)


def prepare(push: Push, recipe: Recipe, show: bool) -> None:
    """Make the repository, and warn of licences that forbid or restrict the publication.

    EvomergeError if its name is none, no token is stored, or it has files already.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    from evomerge.merge.output.licences import licence, licence_warnings
    from evomerge.sources.declared_base import front_matter
    from evomerge.sources.hub import client, hub_errors
    from evomerge.sources.locate import folder_of_card

    try:
        client().validate_repo_id(push.repository)
    except HFValidationError as error:
        raise EvomergeError(f"--push: {push.repository!r} is no name of a repository ({error})") from error
    if push.repository.count("/") != 1:
        raise EvomergeError(f"--push: {push.repository!r} is no name of a repository; give OWNER/NAME")
    if not push.dry_run:
        if get_token() is None:
            raise EvomergeError("--push: no token of the Hugging Face hub is stored; log in with `hf auth login`")
        api = HfApi()
        with hub_errors(f"{push.repository}: the hub does not take an upload"):
            api.create_repo(push.repository, private=push.private or None, exist_ok=True)
            files = sorted(set(api.list_repo_files(push.repository)) - OWN_FILES)
        if files:
            raise EvomergeError(
                f"{push.repository}: has files on the hub already ({some(files)}); choose another name, or delete the "
                "repository there"
            )
    licences = {name: licence(front_matter(folder_of_card(model.path))) for name, model in models_on_disk(recipe)}
    for line in licence_warnings(licences) if show else ():
        say(f"note: licences: {line}", error=True)


def finish(push: Push, folder: Path, show: bool) -> None:
    """Upload the files of a folder, or in a dry run print their names and sizes."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from evomerge.sources.hub import bars, hub_errors

    files = sorted(file for file in folder.iterdir() if file.is_file())
    contents = {file.name: public_content(file, push.repository) for file in files}
    if push.dry_run:
        for name, content in contents.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            if show:
                say(f"{size:>15,} bytes  {name}")
        if show:
            say(f"a dry run: nothing was sent; this would be {push.repository}")
        return
    if show:
        say(f"uploading {sum(file.stat().st_size for file in files) / 1e6:,.0f} MB to {push.repository} ...")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    failed = f"{push.repository}: the upload failed; run the command again, what has arrived is not sent twice"
    with hub_errors(failed), bars(show and sys.stderr.isatty()):
        HfApi().create_commit(push.repository, operations, commit_message=f"A merge made with evomerge {__version__}")
    if show:
        say(f"uploaded to {HfApi().endpoint}/{push.repository}")


def public_content(file: Path, repository: str) -> Path | bytes:
    """What is uploaded for a file: no path of this machine, and in the card the name of the repository."""
    from evomerge.merge.output.model_card import shown, without_paths

    if file.name == "recipe.yaml":
        return dump_recipe(without_paths(load_recipe(file))).encode()
    if file.name == "adapter_config.json":
        config = read_json(file)
        config["base_model_name_or_path"] = shown(config["base_model_name_or_path"])
        return (json.dumps(config, indent=2) + "\n").encode()
    if file.name == "README.md":
        return read_text(file).replace(THIS_FOLDER, repository).encode()
    return file
