"""The paths in a configuration: made absolute, checked for what is there, pinned to commits of the hub."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import PythonTask, TaskOptions
from evomerge.errors import EvomergeError
from evomerge.merge.recipe.pinned_inputs import pin as pin_recipe
from evomerge.merge.recipe.recipe import load_recipe, models_on_disk, parse_recipe
from evomerge.sources.locate import looks_like_hub_id, pinned


def absolute_paths(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The content of a configuration file with absolute paths; hub ids and names of lm-eval's tasks are unchanged.

    content: parsed YAML, of any types.  folder: to which relative paths are relative.
    """
    content = dict(content)
    if "base" in content:
        content["base"] = model_path(content["base"], folder)
    if isinstance(content.get("sources"), list):
        content["sources"] = [
            source_paths(s, folder, f"sources.{i}") if isinstance(s, dict) else s
            for i, s in enumerate(content["sources"])
        ]
    if isinstance(content.get("baselines"), list):
        content["baselines"] = [absolute(p, folder) if isinstance(p, str) else p for p in content["baselines"]]
    if isinstance(content.get("start_from"), str):
        content["start_from"] = absolute(content["start_from"], folder)
    for key in ("tasks", "guards"):
        if isinstance(content.get(key), list):
            content[key] = [
                {**t, "task": task_path(t["task"], folder)} if isinstance(t, dict) and "task" in t else t
                for t in content[key]
            ]
    return content


def absolute(text: str, folder: Path) -> str:
    """The absolute path for a path that is relative to a folder."""
    try:
        return str((folder / os.path.expanduser(text)).resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle; a zero byte: `path_problems` finds no such file
        return text


def model_path(given: object, folder: Path) -> object:
    """The absolute path of a model's folder; hub ids and what is no text are unchanged."""
    if not isinstance(given, str) or (looks_like_hub_id(given) and not os.path.exists(folder / given)):
        return given
    return absolute(given, folder)


def source_paths(source: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A source with absolute paths.  where: its YAML path.  EvomergeError if its `recipe` is none."""
    source = dict(source)
    if "path" in source:
        source["path"] = model_path(source["path"], folder)
    if isinstance(source.get("statistics"), str):
        source["statistics"] = absolute(source["statistics"], folder)
    if source.get("recipe") is not None:
        source["recipe"] = whole_recipe(source["recipe"], folder, f"{where}.recipe")
    return source


def task_path(given: object, folder: Path) -> object:
    """A task with absolute paths of its files; names of lm-eval's tasks are unchanged."""
    if isinstance(given, dict):
        files = {k: v for k, v in given.items() if k in ("python", "items") and isinstance(v, str)}
        return given | {k: absolute(v, folder) for k, v in files.items()}
    return absolute(given, folder) if isinstance(given, str) and given.endswith((".yaml", ".yml")) else given


def whole_recipe(given: object, folder: Path, where: str) -> dict[str, Any]:
    """The recipe of a source with absolute paths.

    given: the name of a recipe file, or the recipe itself.  folder: to which relative paths are relative.
    where: its key, for the message.

    EvomergeError if it is no recipe.
    """
    try:
        if isinstance(given, str):
            recipe = load_recipe((folder / os.path.expanduser(given)).resolve())
        else:
            recipe = parse_recipe(given, folder / "recipe")
    except EvomergeError as error:
        raise EvomergeError(f"{where}: {error}".replace(f"{folder / 'recipe'}: ", "")) from error
    return recipe.model_dump(mode="json", exclude_defaults=True) | {"dtype": recipe.dtype}


def path_problems(config: SearchConfig) -> list[str]:
    """The problems with paths: models and files that do not exist, and tasks that are listed twice."""
    problems = []
    models = [("base", config.base)]
    for i, s in enumerate(config.sources):
        inner = [(f"sources.{i}.recipe: {name}", m.path) for name, m in models_on_disk(s.recipe)] if s.recipe else []
        models += inner or [(f"sources.{i}.path", s.path)]
    for where, path in models:
        if not os.path.isdir(path) and not looks_like_hub_id(path):
            problems.append(f"{where}: no such folder: {path}")
    for i, source in enumerate(config.sources):
        if source.statistics is not None and not os.path.isfile(source.statistics):
            problems.append(f"sources.{i}.statistics: no such file: {source.statistics}")
    lists: dict[str, Sequence[TaskOptions]] = {"tasks": config.tasks, "guards": config.guards}
    for key, entries in lists.items():
        for i, task in enumerate(entries):
            if task.is_file and not os.path.isfile(str(task.task)):
                problems.append(f"{key}.{i}.task: no such file: {task.task}")
            if isinstance(task.task, PythonTask):
                files = {"python": task.task.file, "items": task.task.items}
                problems += [
                    f"{key}.{i}.task.{k}: no such file: {f}" for k, f in files.items() if not os.path.isfile(f)
                ]
    for i, recipe in enumerate(config.baselines):
        if not os.path.isfile(recipe):
            problems.append(f"baselines.{i}: no such file: {recipe}")
    for key, entries in lists.items():
        names = [task.task for task in entries]
        problems += [f"{key}: {n} is listed twice" for n in sorted({str(n) for n in names if names.count(n) > 1})]
    return problems


def pin(config: SearchConfig, known: Mapping[str, str]) -> SearchConfig:
    """The configuration with a commit for every hub id, and with the table of these commits in `hub`.

    known: the commits with which the search began, if it has begun.

    EvomergeError if the hub does not give a model.
    """
    recipes = [s.recipe for s in config.sources if s.recipe]
    paths = [config.base, *(s.path for s in config.sources if s.path)]
    paths += [model.path for recipe in recipes for _, model in models_on_disk(recipe)]
    hub = dict(known) | {path: found for path in paths if (found := pinned(path, known)) != path}
    sources = [
        s.model_copy(update={"recipe": pin_recipe(s.recipe, hub)} if s.recipe else {"path": hub.get(s.path, s.path)})
        for s in config.sources
    ]
    return config.model_copy(update={"base": hub.get(config.base, config.base), "sources": sources, "hub": hub})
