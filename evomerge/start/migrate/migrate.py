"""Write a configuration for a search that another program describes: `migrate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.config.config_file import load_config
from evomerge.errors import EvomergeError
from evomerge.files.read import read_yaml
from evomerge.files.write import write_text
from evomerge.start.migrate import mergekit_evolve, mergenetic
from evomerge.start.migrate.draft import Draft


def migrate(old: Path, new: Path, task_folders: Sequence[Path] = ()) -> list[str]:
    """Write a configuration that means what a file of mergekit-evolve or mergenetic means, as nearly as possible.

    old: the file.  new: the configuration to write; it must be new.
    task_folders: where the files of tasks lie that lm-eval does not have itself.

    Returns what was done, for the terminal.

    EvomergeError if `new` exists, a folder does not, or the file is of neither program or wrong; the message lists
    everything that is wrong.
    """
    if new.exists():
        raise EvomergeError(f"{new}: exists already; choose another name with --out")
    for folder in task_folders:
        if not folder.is_dir():
            raise EvomergeError(f"{folder}: no such folder")
    content = read_yaml(old)
    module = program_of(content, old)
    draft = Draft(old, new, module.PROGRAM, task_folders)
    module.write(content, draft)
    write_text(new, draft.text_of_file())
    try:
        load_config(new, files=False)
    except EvomergeError:
        new.unlink()
        raise
    told = draft.count + len(draft.left_out)
    lines = [f"wrote {new}: from a file of {draft.program}, with {told} comments on what differs"]
    try:
        load_config(new)
    except EvomergeError as error:
        return [*lines, f"before the search, mend what is not on this machine yet: {error}"]
    return [*lines, f"next: evomerge check {new}"]


def program_of(content: Any, old: Path) -> Any:
    """The module that understands a file.  EvomergeError if there is none; it says what the file is instead."""
    if not isinstance(content, dict):
        raise EvomergeError(f"{old}: expected a mapping of keys to values, found {type(content).__name__}")
    if "merge_method" in content:
        raise EvomergeError(
            f"{old}: is one merge of mergekit, not a search; make it with `evomerge merge {old} --out FOLDER`, "
            f"or search from there with `start_from: {old}` in a configuration"
        )
    if "sources" in content or "method" in content:
        raise EvomergeError(f"{old}: looks like a configuration or a recipe of evomerge already")
    for module in (mergekit_evolve, mergenetic):
        if content.keys() & module.MARKS:
            return module
    raise EvomergeError(
        f"{old}: is neither a file of mergekit-evolve (it would have `genome`) nor one of mergenetic (`run_id`, "
        "`pop_size`, `n_iter`)"
    )
