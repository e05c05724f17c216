"""The card of an adapter (README.md), and the name of its base."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from evomerge import __version__
from evomerge.merge.output.how_to_load import class_name
from evomerge.merge.output.licences import licence, licence_of_merge, licence_warnings
from evomerge.merge.output.model_card import hub_id, shown, without_paths
from evomerge.merge.recipe.pinned_inputs import without_fingerprints
from evomerge.merge.recipe.recipe import Recipe, dump_recipe, models_on_disk
from evomerge.printable import fenced, in_markdown
from evomerge.sources.declared_base import front_matter
from evomerge.sources.locate import HUB_ID, locate

USE = """```python
from peft import PeftModel
from transformers import {name}

base = {name}.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""


def base_and_revision(recipe: Recipe) -> tuple[str, str | None]:
    """The base as PEFT loads it: a hub id and its commit if it is known, or the folder and None."""
    found = HUB_ID.match(shown(recipe.base.path))
    return (found["repo"], found["revision"]) if found else (recipe.base.path, None)


def adapter_card(recipe: Recipe, rank: str, config: Mapping[str, Any], content: Sequence[str]) -> str:
    """The text of an adapter's card: front matter and Markdown.

    rank: as `--lora` takes it.
    config: of the base.
    content: what the adapter holds and loses, a sentence each.
    """
    models = list(models_on_disk(recipe))
    licences = {name: licence(front_matter(locate(model.path))) for name, model in models}
    base = hub_id(recipe.base.path)
    head = {
        "library_name": "peft",
        "tags": ["lora", "merge", "evomerge"],
        "license": licence_of_merge(licences),
    } | ({"base_model": base} if base else {})
    rows = [
        f"| {in_markdown(name)} | {in_markdown(shown(model.path))} | {in_markdown(licences[name])} |"
        for name, model in models
    ]
    loaded, revision = base_and_revision(recipe)
    place = f'"{loaded}", revision="{revision}"' if revision else f'"{shown(loaded)}"'
    use = USE.format(name=class_name(config) or "AutoModel", base=place)
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "",
        f"# An adapter that merges {len(models) - 1} models by `{recipe.method}`", "",
        f"Made with evomerge {__version__}.", "",
        "## Use", "", use, "",
        "## What it holds", "", *(f"- {in_markdown(line)}" for line in content), "",
        "## Models", "",
        "| model | where | licence |", "|---|---|---|", *rows, "",
        *(f"> **Licences:** {in_markdown(line)}\n" for line in licence_warnings(licences)),
        "## Make it again", "",
        f"    evomerge merge recipe.yaml --lora {rank} --out again", "",
        fenced(dump_recipe(without_paths(without_fingerprints(recipe))), "yaml"), "",
    ])  # fmt: skip
