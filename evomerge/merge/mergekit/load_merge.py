"""Open a recipe file of evomerge, or a mergekit file with one merge or several, as a recipe: `load_merge`."""

from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.files.read import read_yaml_documents
from evomerge.merge.mergekit.mergekit_file import MergekitFile, ModelReference
from evomerge.merge.mergekit.parse_mergekit import parse_mergekit
from evomerge.merge.mergekit.to_recipe import to_recipe
from evomerge.merge.recipe.recipe import Recipe, load_recipe


def load_merge(path: Path) -> tuple[Recipe, list[str]]:
    """The recipe that a file describes, and notes on what was ignored in it.

    path: of a recipe file of evomerge, or of a mergekit file.

    EvomergeError lists everything that is wrong with the file.
    """
    documents = read_yaml_documents(path)
    if len(documents) > 1:
        return several_merges(documents, path)
    if not is_mergekit(documents[0]):
        return load_recipe(path), []
    return to_recipe(parse_mergekit(documents[0], path), path)


def is_mergekit(content: Any) -> bool:
    """Whether parsed YAML is a merge of mergekit."""
    return isinstance(content, dict) and "merge_method" in content and not content.keys() & {"recipe", "method"}


def several_merges(documents: list[Any], path: Path) -> tuple[Recipe, list[str]]:
    """The recipe of a file for `mergekit-multi`, and notes.

    Each document is a merge.  Its `name` may be given as a model in the other documents, and that merge then becomes a
    nested recipe.  The result of the file is the merge without a name, or else the only one that no other needs.

    EvomergeError if there is no such merge, or a merge needs itself.
    """
    named: dict[str | None, Any] = {}
    for number, document in enumerate(documents, 1):
        if not is_mergekit(document):
            raise EvomergeError(
                f"{path}: document {number} is not a configuration of mergekit (it has no merge_method)"
            )
        name = document.get("name")
        if name is not None and not (isinstance(name, str) and name):
            raise EvomergeError(f"{path}: document {number}: name: expected text, found {name!r:.60}")
        if name in named:
            raise EvomergeError(f"{path}: two documents have {f'the name {name!r}' if name else 'no name'}")
        named[name] = {k: v for k, v in document.items() if k != "name"}
    names = {name for name in named if name is not None}
    files = {name: parse_mergekit(document, path, names) for name, document in named.items()}
    needed = {name: {m.model for m in references(file) if m.merged} for name, file in files.items()}
    results = [None] if None in files else [n for n in files if not any(n in needed[other] for other in files)]
    if len(results) != 1:
        raise EvomergeError(
            f"{path}: which merge is the result? One document must have no `name`, or be the only one that no other "
            "needs"
        )
    made: dict[str, Recipe] = {}
    notes: list[str] = []

    def make(name: str | None, outer: tuple[str | None, ...]) -> Recipe:
        if name in outer:
            raise EvomergeError(f"{path}: the merge {name!r} needs itself")
        for inner in sorted(needed[name] - made.keys()):
            made[inner] = make(inner, (*outer, name))
        recipe, new = to_recipe(files[name], path, made)
        notes.extend(f"{name}: {note}" if name else note for note in new)
        return recipe

    recipe = make(results[0], ())
    if unused := sorted(names - made.keys() - {results[0]}):
        notes.append(f"{', '.join(unused)}: not needed for the result, so not merged")
    return recipe, notes


def references(file: MergekitFile) -> list[ModelReference]:
    """Every model that a merge names."""
    found = [i.model for part in file.slices for i in part.inputs]
    return found + [m for m in (file.base, file.tokenizer) if isinstance(m, ModelReference)]
