"""What the user has agreed to run on this machine, where a run folder names it.

A run folder may come from somebody else, and its configuration may name any command and any code.  Such things run only
if the user has agreed to them here: by starting the search with them, or by an option of `resume`.  An agreement is
kept outside of the run folder, as a hash of what was agreed to and of the folder.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import PythonTask
from evomerge.errors import EvomergeError
from evomerge.files.write import write_text
from evomerge.search.run import Run


def agreements() -> Path:
    """The folder of this user's agreements."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evomerge" / "agreed"


def agreement_file(what: list[str | None], folder: Path) -> Path:
    """The file whose existence says that the user has agreed to something in a run folder."""
    text = json.dumps([*what, str(folder.resolve())])
    return agreements() / hashlib.sha256(text.encode()).hexdigest()


def agreed(what: list[str | None], folder: Path) -> bool:
    """Whether the user has agreed to something in a run folder."""
    return agreement_file(what, folder).exists()


def agree(what: list[str | None], folder: Path) -> None:
    """Keep the user's agreement.  EvomergeError if it cannot be written."""
    file = agreement_file(what, folder)
    with contextlib.suppress(OSError):  # `write_text` says why it cannot write
        file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "")


def task_code(config: SearchConfig) -> list[str | None]:
    """The files whose Python code may run in a search, as something to agree to; empty if there are none.

    They are task files that may run code, and those of Python tasks with the names of their functions.
    """
    every = (*config.tasks, *config.guards)
    files = sorted(str(task.task) for task in every if task.allow_task_code or isinstance(task.task, PythonTask))
    return ["allow_task_code", *files] if files else []


def refuse_task_code(run: Run, config: SearchConfig) -> None:
    """EvomergeError if tasks of a run have Python code that the user has not agreed to on this machine."""
    if (code := task_code(config)) and not agreed(code, run.folder):
        raise EvomergeError(
            f"{run.config_file}: lets Python code of tasks run ({', '.join(map(str, code[1:]))}), and this search was "
            "not started here; read it, and if it may run, `evomerge resume --allow-task-code`"
        )
