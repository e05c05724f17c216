"""The model card of an exported model (README.md): what was merged, how, and how to reproduce it."""

from evomerge import __version__
from evomerge.merge.recipe.pinned_inputs import without_fingerprints
from evomerge.merge.recipe.recipe import Recipe, dump_recipe, models_on_disk
from evomerge.sources.declared_base import front_matter
from evomerge.sources.locate import locate


def model_card(recipe: Recipe, results: str = "") -> str:
    """The text of a model card: front matter and Markdown.  results: a section with scores, if there are any."""
    models = list(models_on_disk(recipe))
    licences = [licence(front_matter(locate(model.path))) for _, model in models]
    known = set(licences)
    head = ["---", "library_name: transformers", "tags: [merge, evomerge]"]
    head += [f"license: {min(known)}"] if len(known) == 1 and "not stated" not in known else ["license: other"]
    rows = [f"| {name} | {m.path} | {text} |" for (name, m), text in zip(models, licences, strict=True)]
    return "\n".join([
        *head, "---", "",
        f"# A merge of {len(models) - 1} models by `{recipe.method}`", "",
        f"Made with evomerge {__version__}.", "",
        "| model | where | licence |", "|---|---|---|", *rows, "",
        *([results.rstrip(), ""] if results else []),
        "## Make it again", "",
        "`recipe.yaml` in this folder is complete and holds the SHA-256 of every input and output:", "",
        "    evomerge reproduce recipe.yaml --out again --check .", "",
        "```yaml", dump_recipe(without_fingerprints(recipe)).rstrip(), "```", "",
    ])  # fmt: skip


def licence(card: dict[str, object]) -> str:
    """The licence in the front matter of a model card, or `not stated`."""
    value = card.get("license") or card.get("license_name")
    return str(value) if value else "not stated"
