"""The card of an adapter (README.md), and the name of its base."""

from collections.abc import Sequence

import yaml

from evomerge import __version__
from evomerge.merge.output.licences import licence, licence_of_merge, licence_warnings
from evomerge.merge.output.model_card import hub_id, shown, without_paths
from evomerge.merge.recipe.pinned_inputs import without_fingerprints
from evomerge.merge.recipe.recipe import Recipe, dump_recipe, models_on_disk
from evomerge.sources.declared_base import front_matter
from evomerge.sources.locate import locate

USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""


def base_name(recipe: Recipe) -> str:
    """The base as PEFT loads it: a hub id, or the folder."""
    return hub_id(recipe.base.path) or recipe.base.path


def adapter_card(recipe: Recipe, rank: str, content: Sequence[str], results: str = "") -> str:
    """The text of an adapter's card: front matter and Markdown.

    rank: as `--lora` takes it.
    content: what the adapter holds and loses, a sentence each.
    results: a section with scores, if there are any.
    """
    models = list(models_on_disk(recipe))
    licences = {name: licence(front_matter(locate(model.path))) for name, model in models}
    base = hub_id(recipe.base.path)
    head = {
        "library_name": "peft",
        "tags": ["lora", "merge", "evomerge"],
        "license": licence_of_merge(licences),
    } | ({"base_model": base} if base else {})
    rows = [f"| {name} | {shown(model.path)} | {licences[name]} |" for name, model in models]
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "",
        f"# An adapter that merges {len(models) - 1} models by `{recipe.method}`", "",
        f"Made with evomerge {__version__}.", "",
        "## Use", "", USE.format(base=shown(recipe.base.path)), "",
        "## What it holds", "", *(f"- {line}" for line in content), "",
        *([results.rstrip(), ""] if results else []),
        "## Models", "",
        "| model | where | licence |", "|---|---|---|", *rows, "",
        *(f"> **Licences:** {line}\n" for line in licence_warnings(licences)),
        "## Make it again", "",
        f"    evomerge merge recipe.yaml --lora {rank} --out again", "",
        "```yaml", dump_recipe(without_paths(without_fingerprints(recipe))).rstrip(), "```", "",
    ])  # fmt: skip
