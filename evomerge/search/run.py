"""The run folder: the configuration, who the inputs are, the study, and what came out."""

import fcntl
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
from evomerge.files import disk_errors, read_json
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.verdict.verdict import what_is_wrong

KEY = "evomerge:key"  # study attribute: what its results depend on, see inputs.py


@dataclass(frozen=True)
class Run:
    """A run folder.  config.yaml is written last, so a folder that has it is a run."""

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
    def report_file(self) -> Path:
        return self.folder / "report.html"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.txt"

    def storage_url(self, config: SearchConfig) -> str:
        """The database with its password, for those who open it and nobody else (`masked` shows one)."""
        return expanded(config.storage) if config.storage else sqlite_url(self.folder / "study.db")

    def study(self) -> optuna.Study:
        """The study, to be looked at.  EvomergeError if there is none or it cannot be read."""
        config = self.config()
        return open_study(self.storage_url(config), config.name, create=False)

    def config(self) -> SearchConfig:
        return load_config(self.config_file)

    def manifest(self) -> dict[str, Any]:
        """What the run was made of.  EvomergeError if that cannot be read."""
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
        """The verdict, None if there is none yet.  EvomergeError if it cannot be read."""
        if not self.verdict_file.exists():
            return None
        verdict = read_json(self.verdict_file)
        if problem := what_is_wrong(verdict):
            raise EvomergeError(f"{self.verdict_file}: {problem}; write it again with `evomerge resume {self.folder}`")
        return verdict

    def log(self, text: str) -> None:
        """A line for whoever asks later what happened when."""
        with disk_errors(self.log_file), self.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text.rstrip()}\n")


def open_run(folder: Path) -> Run:
    """An existing run.  EvomergeError if the folder is not one."""
    run = Run(folder)
    if not run.config_file.is_file():
        raise EvomergeError(f"{folder}: not a run folder (it has no config.yaml); start one with `evomerge search`")
    return run


def claim(study: optuna.Study, run: Run) -> None:
    """Make the study this run's.  EvomergeError if a study of other models, items or settings has its name."""
    keys, found = run.manifest().get("keys"), study.user_attrs.get(KEY)
    if found is not None and keys and found not in keys:
        raise EvomergeError(
            f"the storage holds a study {study.study_name!r} of other models, items or settings; choose another `name`"
        )
    if keys and found != keys[-1]:
        study.set_user_attr(KEY, keys[-1])


def refuse_existing(folder: Path) -> None:
    """EvomergeError if the folder is a run already."""
    if Run(folder).config_file.exists():
        raise EvomergeError(
            f"{folder}: this run exists already; go on with `evomerge resume {folder}`, or choose another --run folder"
        )


@contextmanager
def only_driver(run: Run) -> Iterator[None]:
    """Hold the run for this process; the lock dies with it.  EvomergeError if another process holds it."""
    with disk_errors(run.folder), (run.folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvomergeError(f"{run.folder}: another evomerge process is working on this run") from None
        yield
