"""What a run was made of: recorded when its folder is laid out, compared before it goes on."""

import hashlib
import importlib.metadata
import json
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge import __version__
from evomerge.config.config_file import load_config, write_config
from evomerge.config.differences import config_differences
from evomerge.config.paths import pin
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.files.read import sha256
from evomerge.files.write import disk_errors, write_text
from evomerge.merge.recipe.recipe import Recipe, models_on_disk
from evomerge.search.agreements import refuse_task_code
from evomerge.search.evaluation.task_set import TaskSet, open_task_set
from evomerge.search.models import model_folders
from evomerge.search.run import Run, refuse_existing
from evomerge.sources.fingerprint import model_fingerprint

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


PATHS = re.compile(r"(?:base|sources\.\d+\.(?:path|statistics)): ")


def input_fingerprints(config: SearchConfig) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of the base (`base`) and of each source, by name; statistics files by their path.

    For a source that is a recipe these are the files of its models, and the recipe.
    """
    prints: dict[str, dict[str, str]] = {}
    for name, folder in model_folders(config).items():
        source_name, _, inner = name.partition("/")
        files = model_fingerprint(folder)
        prints.setdefault(source_name, {}).update({f"{inner}/{f}" if inner else f: d for f, d in files.items()})
    for source in config.sources:
        if source.recipe is not None:
            text = json.dumps(without_paths(source.recipe), sort_keys=True)
            prints[source.name]["recipe"] = hashlib.sha256(text.encode()).hexdigest()
        if source.statistics is not None:
            prints[source.name][source.statistics] = sha256(Path(source.statistics))
    return prints


def without_paths(recipe: Recipe) -> dict[str, Any]:
    """The content of a recipe without the paths of its models."""
    copy = recipe.model_copy(deep=True)
    for _, model in models_on_disk(copy):
        model.path, model.asked, model.sha256 = "", None, {}
    return copy.model_dump(mode="json")


def item_fingerprints(task_set: TaskSet) -> dict[str, dict[str, str]]:
    """Task -> split -> a hash of its items: of their documents, whatever file they came from.

    A task with few-shot examples has their hash as `few-shot`, a Python task that of its file as `code`.
    """
    found: dict[str, dict[str, str]] = {}
    for task in task_set.tasks:
        ids = {str(split): "".join(sorted(i.id for i in items)) for split, items in task_set.items[task.name].items()}
        if task.lm.config.num_fewshot:
            ids["few-shot"] = json.dumps(list(task.lm.fewshot_docs()), sort_keys=True, default=str)
        hashes = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in ids.items()}
        found[task.name] = hashes | ({"code": task.lm.sha256} if task.is_python else {})
    return found


def study_key(config: SearchConfig, inputs: Mapping[str, Any], items: Mapping[str, Any]) -> str:
    """A hash of everything that a study's results depend on; the paths of files do not count.

    inputs: of `input_fingerprints`.
    items: of `item_fingerprints`.
    """
    free = {"name", "budget", "simplify", "price", "workers", "storage", "hub", "on_finish", "log_to"}
    content = config.model_dump(mode="json", exclude=free)
    content |= {"base": "", "baselines": len(config.baselines), "start_from": config.start_from is not None}
    if content.pop("methods"):  # the search chooses among them, so its choice does not count
        content["method"] = config.methods
    for part, key in (("sources", "path"), ("sources", "statistics"), ("tasks", "task"), ("guards", "task")):
        for entry in content[part]:
            given = entry.get(key)
            entry[key] = without_files(given) if isinstance(given, dict) else ""
    for entry, source in zip(content["sources"], config.sources, strict=True):
        if source.recipe is not None:
            entry["recipe"] = without_paths(source.recipe)
    known = {name: sorted(prints.values()) for name, prints in inputs.items()}
    return hashlib.sha256(json.dumps([content, known, items], sort_keys=True).encode()).hexdigest()


def without_files(task: dict[str, Any]) -> dict[str, Any]:
    """A Python task without the paths of its files, whose content counts; the name of the function stays."""
    return task | {"python": task["python"].rpartition(":")[2], "items": ""}


def create_run(config: SearchConfig, task_set: TaskSet, origin: Path, folder: Path) -> Run:
    """Make a new run folder with run.json and config.yaml.

    config: with the versions of its models pinned.
    task_set: its tasks and items.
    origin: the file that the configuration was read from.
    folder: the new run folder.

    Raises EvomergeError if the folder is a run already or cannot be written.
    """
    refuse_existing(folder)
    run = Run(folder)
    run.storage_url(config)  # raises if an environment variable in it is not set
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
    """The run's configuration, after a comparison with the file it came from and the inputs that the run began with.

    accept: take over the file's present content where something has changed.

    Raises EvomergeError with the differences if the file, a model or an item has changed, unless `accept`.  That the
    same models lie elsewhere now is no difference; the file must say where.
    """
    config, manifest = run.config(), run.manifest()
    refuse_task_code(run, config)
    origin = Path(str(manifest.get("origin", "")))
    lines: list[str] = []
    current = pin(load_config(origin if origin.is_file() else run.config_file), config.hub)
    lines += config_differences(pin(config, config.hub), current.model_copy(update={"name": config.name}))
    refuse_task_code(run, current)
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
            f"task {task}: its " + ("Python file is another one now" if s == "code" else f"{s} items are others now")
            for s in items[task]
            if items[task][s] != known[task].get(s)
        ]
    changed = lines
    if prints == recorded:  # the same files lie elsewhere now
        changed = [line for line in lines if not PATHS.match(line)]
    if not lines:
        return config
    if changed and not accept:
        raise EvomergeError(
            f"{run.folder}: this run was started with other inputs; its trials would not be comparable:\n  "
            + "\n  ".join(changed)
            + "\nUndo the change, start a new run, or go on all the same with --accept-changes"
        )
    run.log(("changes accepted: " if changed else "the same models are elsewhere now: ") + "; ".join(lines))
    current = current.model_copy(update={"budget": config.budget, "simplify": config.simplify, "name": config.name})
    keys = [*manifest.get("keys", []), study_key(current, prints, items)]
    content = {**manifest, "inputs": prints, "items": items, "keys": keys}
    write_text(run.manifest_file, json.dumps(content, indent=2) + "\n")
    write_config(run.config_file, current)
    return current
