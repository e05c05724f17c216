"""The model card: what was merged, how, and how to make it again."""

from evomerge import __version__
from evomerge.merge.recipe import Recipe, dump_recipe, model_folders
from evomerge.sources.compatibility import front_matter


def model_card(recipe: Recipe, results: str = "") -> str:
    """Markdown with front matter for an exported model.  results: a section with scores, if there are any."""
    base, sources = model_folders(recipe)
    licences = {"base": licence(front_matter(base))}
    licences |= {name: licence(front_matter(folder)) for name, folder in sources.items()}
    known = sorted({text for text in licences.values() if text != "not stated"})
    head = ["---", "library_name: transformers", "tags: [merge, evomerge]"]
    head += (
        [f"license: {known[0]}"] if len(known) == 1 and "not stated" not in licences.values() else ["license: other"]
    )
    rows = [f"| base | {recipe.base.path} | {licences['base']} |"]
    rows += [f"| {s.name} | {s.path} | {licences[s.name]} |" for s in recipe.sources]
    slim = recipe.model_copy(deep=True)
    slim.outputs, slim.base.sha256 = {}, {}
    for source in slim.sources:
        source.sha256, source.statistics_sha256 = {}, None
    return "\n".join([
        *head, "---", "",
        f"# A merge of {len(recipe.sources)} models by `{recipe.method}`", "",
        f"Made with evomerge {__version__}.", "",
        "| model | where | licence |", "|---|---|---|", *rows, "",
        *([results.rstrip(), ""] if results else []),
        "## Make it again", "",
        "`recipe.yaml` in this folder is complete and holds the SHA-256 of every input and output:", "",
        "    evomerge reproduce recipe.yaml --out again --check .", "",
        "```yaml", dump_recipe(slim).rstrip(), "```", "",
    ])  # fmt: skip


def licence(card: dict[str, object]) -> str:
    value = card.get("license") or card.get("license_name")
    return str(value) if value else "not stated"
