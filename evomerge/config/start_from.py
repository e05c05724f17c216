"""`start_from`: what a configuration takes from a recipe, a mergekit file or an earlier run."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.files.read import read_yaml

NEEDED = ("base", "sources", "method")
TAKEN = (*NEEDED, "allow_differences", "vocabulary")

Parse = Callable[[Any, Path], SearchConfig]
"""Checks parsed YAML as a configuration; the path is its file."""


def with_start(content: dict[str, Any], parse: Parse) -> dict[str, Any]:
    """The content with the base, the sources and the method of `start_from` where it does not give them itself.

    content: of a configuration file, with absolute paths.  parse: for the configuration of an earlier run.

    EvomergeError if that is no recipe, mergekit file or run folder, or if a search cannot start from it.
    """
    start = content.get("start_from")
    if not isinstance(start, str) or {*NEEDED} <= content.keys():
        return content
    if os.path.isdir(start):
        return of_run(Path(start), parse) | content
    space = content.get("space")
    any_layers = isinstance(space, dict) and bool(space.get("layers"))
    return of_file(Path(start), any_layers) | content


def of_run(folder: Path, parse: Parse) -> dict[str, Any]:
    """The base, the sources and the method of an earlier run, as a configuration has them."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise EvomergeError(f"start_from: {folder} is no run folder (it has no config.yaml)")
    content = read_yaml(file)
    if isinstance(content, dict) and (missing := [key for key in NEEDED if key not in content]):
        # It may itself take them from a folder, even from its own.
        raise EvomergeError(f"start_from: {folder} is no run folder (its config.yaml lacks {', '.join(missing)})")
    earlier = parse(content, file).model_dump(by_alias=True, exclude_none=True)
    return {key: earlier[key] for key in TAKEN if key in earlier}


def of_file(file: Path, any_layers: bool) -> dict[str, Any]:
    """The base, the sources and the method of a recipe or mergekit file, as a configuration has them.

    any_layers: whether the recipe may have slices, because layers are searched.
    """
    from evomerge.merge.mergekit.load_merge import load_merge  # opens models, for which it needs torch

    recipe, _ = load_merge(file)
    if recipe.slices and not any_layers:
        raise EvomergeError(f"{file}: a search cannot start from slices, unless it is one for layers (`space.layers`)")
    sources: list[dict[str, Any]] = []
    for s in recipe.sources:
        origin = {"recipe": s.recipe.model_dump(mode="json")} if s.recipe else {"path": s.path}
        sources.append({"name": re.sub(r"[^A-Za-z0-9_-]", "-", s.name), **origin})
    given = {"base": recipe.base.path, "sources": sources, "method": recipe.method}
    if recipe.vocabulary:
        named = {s.name: own["name"] for s, own in zip(recipe.sources, sources, strict=True)}
        given["vocabulary"] = named.get(recipe.vocabulary, recipe.vocabulary)
    if recipe.allow_differences:
        given["allow_differences"] = recipe.allow_differences
    return given
