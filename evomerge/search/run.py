"""The run folder: the configuration, who the inputs are, the study, and what came out."""

import fcntl
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from evomerge import __version__
from evomerge.config.config_file import config_differences, load_config, pin, write_config
from evomerge.config.database_url import expanded
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.files import disk_errors, read_json, sha256, write_text
from evomerge.search.evaluation.model_files import model_folders
from evomerge.search.evaluation.task_set import TaskSet, open_task_set
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.verdict.verdict import what_is_wrong
from evomerge.sources.locate import model_fingerprint

KEY = "evomerge:key"  # study attribute: what its results depend on, see `study_key`
PACKAGES = (
    "torch",
    "transformers",
    "lm_eval",
    "optuna",
    "cmaes",
    "safetensors",
    "numpy",
    "tokenizers",
    "datasets",
)


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


def input_fingerprints(config: SearchConfig) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of the base (`base`) and of each source, by name; statistics files by their path."""
    prints = {name: model_fingerprint(folder) for name, folder in model_folders(config).items()}
    for source in config.sources:
        if source.statistics is not None:
            prints[source.name][source.statistics] = sha256(Path(source.statistics))
    return prints


def item_fingerprints(task_set: TaskSet) -> dict[str, dict[str, str]]:
    """A hash of the items in each split of each task: their documents, whatever file they came from."""
    found: dict[str, dict[str, str]] = {}
    for task in task_set.tasks:
        ids = {str(split): "".join(sorted(i.id for i in items)) for split, items in task_set.items[task.name].items()}
        if task.lm.config.num_fewshot:
            ids["few-shot"] = json.dumps(list(task.lm.fewshot_docs()), sort_keys=True, default=str)
        found[task.name] = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in ids.items()}
    return found


def study_key(config: SearchConfig, inputs: Mapping[str, Any], items: Mapping[str, Any]) -> str:
    """A hash of all that decides a study's results, wherever its files lie."""
    content = config.model_dump(mode="json", exclude={"name", "budget", "price", "workers", "storage", "hub"})
    content |= {"base": "", "baselines": len(config.baselines), "start_from": config.start_from is not None}
    for part, key in (("sources", "path"), ("sources", "statistics"), ("tasks", "task")):
        for entry in content[part]:
            entry[key] = ""
    known = {name: sorted(prints.values()) for name, prints in inputs.items()}
    return hashlib.sha256(json.dumps([content, known, items], sort_keys=True).encode()).hexdigest()


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


def create_run(config: SearchConfig, task_set: TaskSet, origin: Path, folder: Path) -> Run:
    """Lay out a new run folder.  EvomergeError if there is one already or it cannot be written."""
    refuse_existing(folder)
    run = Run(folder)
    run.storage_url(config)  # says which variable it lacks
    inputs, items = input_fingerprints(config), item_fingerprints(task_set)
    manifest = {
        "evomerge": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "origin": str(origin.resolve()),
        "seed": config.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "inputs": inputs,
        "items": items,
        "keys": [study_key(config, inputs, items)],
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(run.manifest_file, json.dumps(manifest, indent=2) + "\n")
    write_config(run.config_file, config)
    return run


def check_unchanged(run: Run, accept: bool) -> SearchConfig:
    """The run's configuration, compared with the file it came from and the inputs it was made with.

    EvomergeError with the differences if the file or a model changed, unless `accept`; then the file's present
    content becomes the run's.
    """
    config, manifest = run.config(), run.manifest()
    origin = Path(str(manifest.get("origin", "")))
    lines: list[str] = []
    current = config
    if origin.is_file():
        current = pin(load_config(origin), config.hub)
        lines += config_differences(pin(config, config.hub), current.model_copy(update={"name": config.name}))
    prints = input_fingerprints(current)
    recorded: dict[str, dict[str, str]] = manifest.get("inputs", {})
    for name in sorted(prints.keys() & recorded.keys()):
        files = prints[name].keys() | recorded[name].keys()
        lines += [
            f"{name}: {f} is another file now" for f in sorted(files) if prints[name].get(f) != recorded[name].get(f)
        ]
    items = item_fingerprints(open_task_set(current))
    known: dict[str, dict[str, str]] = manifest.get("items", {})
    for task in sorted(items.keys() & known.keys()):
        lines += [
            f"task {task}: its {s} items are others now" for s in items[task] if items[task][s] != known[task].get(s)
        ]
    if not lines:
        return config
    if not accept:
        raise EvomergeError(
            f"{run.folder}: this run was started with other inputs; its trials would not be comparable:\n  "
            + "\n  ".join(lines)
            + "\nUndo the change, start a new run, or go on all the same with --accept-changes"
        )
    run.log("changes accepted: " + "; ".join(lines))
    current = current.model_copy(update={"budget": config.budget, "name": config.name})
    keys = [*manifest.get("keys", []), study_key(current, prints, items)]
    content = {**manifest, "inputs": prints, "items": items, "keys": keys}
    write_text(run.manifest_file, json.dumps(content, indent=2) + "\n")
    write_config(run.config_file, current)
    return current


@contextmanager
def only_driver(run: Run) -> Iterator[None]:
    """Hold the run for this process; the lock dies with it.  EvomergeError if another process holds it."""
    with disk_errors(run.folder), (run.folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EvomergeError(f"{run.folder}: another evomerge process is working on this run") from None
        yield
