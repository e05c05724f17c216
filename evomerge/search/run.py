"""The run folder: where a search keeps everything.  File by file, in the order in which they are written:

run.json            what the run was made of: versions, seed, SHA-256 of every input file and of the items
config.yaml         the configuration with absolute paths; written last, so a folder that has it is a run
lock                held by the process that works on the run
log_to.json         the names and ids of the runs in the programs of `log_to`
log.txt             one line for everything that happens, with its time
state.json          the progress of the running search, for `evomerge status --watch`
study.db            the study: trials with their item scores, and all other evaluations (SQLite); it is not there
                    if the configuration's `storage` names another database
cache/              what a resume need not make again:
  items/            token ids of every task and split, one JSON line an item
  batch-tokens-*    the batch size that was found to fit on an accelerator
  *.safetensors     measurements of the sources (histograms, Gram matrices), by a hash of the inputs
  derived/          matrices that tsv, iso_c and regmean make of the sources
workers/N.txt       what worker N prints, if workers are processes of their own
answers/            what models answered to the holdout items (storage/answers.py)
winner.yaml         the recipe of the chosen candidate, whether or not it wins
recommended.yaml    the recipe that the verdict recommends
finalists.json      every model of the selection split: its recipe, its scores by task (verdict/choices.py)
verdict.json        the verdict (verdict/verdict_file.py); written last of the results
conflicts.json      where the sources pull against each other (verdict/conflicts.py)
landscape.json      scores between the candidate and its parents, if asked for (verdict/landscape.py)
report.html         the report; also written now and then during the search
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from evomerge.config.config_file import load_config
from evomerge.config.database_url import expanded
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.files.read import opened, read_json
from evomerge.files.write import appending, disk_errors
from evomerge.printable import printable
from evomerge.search.monitor.snapshot import read_snapshot
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.verdict.verdict_file import present_outcome, what_is_wrong
from evomerge.system import lock

KEY = "evomerge:key"  # study attribute: a hash of what its results depend on, see inputs.py


@dataclass(frozen=True)
class Run:
    """A run folder and the files in it."""

    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def manifest_file(self) -> Path:
        return self.folder / "run.json"

    @property
    def verdict_file(self) -> Path:
        return self.folder / "verdict.json"

    @property
    def recommended_file(self) -> Path:
        return self.folder / "recommended.yaml"

    @property
    def winner_file(self) -> Path:
        return self.folder / "winner.yaml"

    @property
    def finalists_file(self) -> Path:
        return self.folder / "finalists.json"

    @property
    def report_file(self) -> Path:
        return self.folder / "report.html"

    @property
    def answers_folder(self) -> Path:
        return self.folder / "answers"

    @property
    def conflicts_file(self) -> Path:
        return self.folder / "conflicts.json"

    @property
    def landscape_file(self) -> Path:
        return self.folder / "landscape.json"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.txt"

    def storage_url(self, config: SearchConfig) -> str:
        """The URL of the study's database, with its password.  It is not to be shown or logged (`masked` is)."""
        return expanded(config.storage) if config.storage else sqlite_url(self.folder / "study.db")

    def has_begun(self) -> bool:
        """Whether the run's files say that it had trials, whatever its database holds."""
        if self.verdict_file.exists():
            return True
        if (snapshot := read_snapshot(self.folder)) is not None and snapshot.trials > 0:
            return True
        if not self.log_file.exists():
            return False
        with opened(self.log_file) as file:
            return any(b" trial 0 begins" in line for line in file)

    def study(self) -> optuna.Study:
        """The study, for reading.  Raises EvomergeError if there is none or it cannot be read."""
        config = self.config()
        return open_study(self.storage_url(config), config.name, create=False)

    def config(self) -> SearchConfig:
        """The run's configuration; the models and files that it names may be gone."""
        return load_config(self.config_file, files=False)

    def manifest(self) -> dict[str, Any]:
        """The content of run.json.  Raises EvomergeError if it cannot be read."""
        try:
            content = read_json(self.manifest_file)
        except EvomergeError as error:
            raise EvomergeError(f"{error}; this run cannot be resumed") from error
        for key in ("inputs", "items"):
            found = content.get(key, {})
            if not isinstance(found, dict) or not all(isinstance(x, dict) for x in found.values()):
                raise EvomergeError(f"{self.manifest_file}: {key} is no table; this run cannot be resumed")
        return content

    def verdict(self) -> dict[str, Any] | None:
        """The content of verdict.json; None if there is none yet.  Raises EvomergeError if it cannot be read."""
        if not self.verdict_file.exists():
            return None
        verdict = read_json(self.verdict_file)
        if problem := what_is_wrong(verdict):
            raise EvomergeError(f"{self.verdict_file}: {problem}; write it again with `evomerge resume {self.folder}`")
        return verdict | {"outcome": present_outcome(verdict["outcome"])}

    def log(self, text: str) -> None:
        """Write a line with the time to log.txt."""
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {printable(text).rstrip()}\n"
        with disk_errors(self.log_file), appending(self.log_file) as file:
            file.write(line.encode())


def open_run(folder: Path) -> Run:
    """An existing run.  Raises EvomergeError if the folder is not one."""
    run = Run(folder)
    if not run.config_file.is_file():
        raise EvomergeError(f"{folder}: not a run folder (it has no config.yaml); start one with `evomerge search`")
    return run


def claim(study: optuna.Study, run: Run) -> None:
    """Mark the study as this run's.  Raises EvomergeError if it belongs to other models, items or settings."""
    keys, found = run.manifest().get("keys"), study.user_attrs.get(KEY)
    if found is not None and keys and found not in keys:
        raise EvomergeError(
            f"the storage holds a study {study.study_name!r} of other models, items or settings; choose another `name`"
        )
    if keys and found != keys[-1]:
        study.set_user_attr(KEY, keys[-1])


def refuse_existing(folder: Path) -> None:
    """Raise EvomergeError if the folder is a run already, or a model."""
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise EvomergeError(f"{folder}: holds a model; choose another --run folder")
    if Run(folder).config_file.exists():
        raise EvomergeError(
            f"{folder}: this run exists already; go on with `evomerge resume {folder}`, or choose another --run folder"
        )


def refuse_links_and_pipes(folder: Path) -> None:
    """Raise EvomergeError if evomerge would write through a symbolic link in a run folder, to any file whatever.

    And if there is a pipe or a device among what it reads, where it would wait.
    """
    own = [
        folder / name for name in ("lock", "log.txt", "study.db", "study.db-wal", "study.db-shm", "cache", "workers")
    ]
    for path in (*own, *(folder / "cache").rglob("*"), *(folder / "workers").rglob("*")):
        if path.is_symlink():
            raise EvomergeError(f"{path}: is a symbolic link; put the file or folder itself there, or delete the link")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise EvomergeError(f"{path}: cannot be read or written (not an ordinary file)")


@contextmanager
def only_driver(run: Run) -> Iterator[None]:
    """Hold the run's lock, which ends with the process.

    Raises EvomergeError if another process holds it, or if evomerge would write through a link or wait at a pipe.
    """
    refuse_links_and_pipes(run.folder)
    with disk_errors(run.folder), appending(run.folder / "lock") as file:
        try:
            lock(file, wait=False)
        except OSError:
            raise EvomergeError(f"{run.folder}: another evomerge process is working on this run") from None
        yield
