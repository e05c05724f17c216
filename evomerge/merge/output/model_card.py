"""The model card of an exported model (README.md): how to use it, what was merged, how, and how to reproduce it.

A card is made to be published, so it names models by their hub ids or by their folders' names, never by paths of this
machine.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge import __version__
from evomerge.merge.output.how_to_load import how_to_load
from evomerge.merge.output.licences import licence, licence_of_merge, licence_warnings
from evomerge.merge.recipe.pinned_inputs import without_fingerprints
from evomerge.merge.recipe.recipe import Recipe, RecipeSource, dump_recipe, models_on_disk
from evomerge.printable import fenced, in_code, in_markdown
from evomerge.sources.declared_base import front_matter
from evomerge.sources.locate import HUB_ID, locate, looks_like_hub_id

CAUSAL = {"architectures": ["ForCausalLM"]}
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")  # a folder in the cache of huggingface_hub


def model_card(
    recipe: Recipe,
    results: str = "",
    copy_of: str | None = None,
    config: Mapping[str, Any] = CAUSAL,
    weights: str = "model",
) -> str:
    """The text of a model card: front matter and Markdown.

    results: a section with scores, if there are any.
    copy_of: the name of the only model that the recipe takes anything from; None if it merges several.
    config, weights: of the folder, see `how_to_load`.
    """
    models = list(models_on_disk(recipe))
    licences = {name: licence(front_matter(locate(model.path))) for name, model in models}
    ids = [found for _, model in models if (found := hub_id(model.path)) is not None]
    library, use = how_to_load(config, weights)
    head = (
        library
        | {
            "tags": ["mergekit", "merge", "evomerge"],
            "license": licence_of_merge(licences),
        }
        | ({"base_model": list(dict.fromkeys(ids))} if ids else {})
    )
    rows = [
        f"| {in_markdown(name)} | {in_markdown(shown(model.path))} | {in_markdown(licences[name])} |"
        for name, model in models
    ]
    title = f"A copy of {in_code(copy_of)}" if copy_of else f"A merge of {len(models) - 1} models by `{recipe.method}`"
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "",
        f"# {title}", "",
        f"Made with evomerge {__version__}.", "",
        *([f"Not merged, but the base's: {', '.join(recipe.keep)}.", ""] if recipe.keep else []),
        "## Use", "", use, "",
        *([results.rstrip(), ""] if results else []),
        "## Models", "",
        "| model | where | licence |", "|---|---|---|", *rows, "",
        *(f"> **Licences:** {in_markdown(line)}\n" for line in licence_warnings(licences)),
        "## Make it again", "",
        "`recipe.yaml` in this folder is complete and holds the SHA-256 of every input and output:", "",
        "    evomerge reproduce recipe.yaml --out again --check .", "",
        fenced(dump_recipe(without_paths(without_fingerprints(recipe))), "yaml"), "",
    ])  # fmt: skip


def hub_id(path: str) -> str | None:
    """The hub id of a model, without its commit; None for a model of this machine alone."""
    if (cached := CACHED.search(Path(path).as_posix())) is not None:
        return f"{cached[1]}/{cached[2]}"
    if looks_like_hub_id(path) and not Path(path).is_dir() and (found := HUB_ID.match(path)) is not None:
        return found["repo"]
    return None


def shown(path: str) -> str:
    """A model's hub id, with the commit if it is known, or the name of its folder."""
    return path if looks_like_hub_id(path) and not Path(path).is_dir() else hub_id(path) or Path(path).name


def without_paths(recipe: Recipe) -> Recipe:
    """The recipe with models as a card shows them."""
    copy = recipe.model_copy(deep=True)
    for _, model in models_on_disk(copy):
        model.path = shown(model.path)
        if isinstance(model, RecipeSource) and model.statistics is not None:
            model.statistics = Path(model.statistics).name
    return copy
