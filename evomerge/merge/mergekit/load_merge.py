"""From a mergekit file, of one document or several, to the recipe that means the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evomerge.errors import EvomergeError
from evomerge.files import read_yaml_documents
from evomerge.merge.mergekit.filters_and_gradients import output_tensors
from evomerge.merge.mergekit.mergekit_file import MergekitFile, Reference
from evomerge.merge.mergekit.parse_mergekit import parse
from evomerge.merge.mergekit.to_recipe import Reading
from evomerge.merge.recipe.recipe import Model, Recipe, load_recipe
from evomerge.sources.checkpoint import open_checkpoint
from evomerge.sources.locate import locate
from evomerge.sources.tensor_names import layer_count


def load_merge(path: Path) -> tuple[Recipe, list[str]]:
    """The recipe of a file, evomerge's own or mergekit's, and notes on what was passed over in it.

    EvomergeError lists everything that is wrong with it.
    """
    documents = read_yaml_documents(path)
    if len(documents) > 1:
        return several_merges(documents, path)
    if not is_mergekit(documents[0]):
        return load_recipe(path), []
    return to_recipe(parse(documents[0], path), path)


def is_mergekit(content: Any) -> bool:
    return isinstance(content, dict) and "merge_method" in content and not content.keys() & {"recipe", "method"}


def several_merges(documents: list[Any], path: Path) -> tuple[Recipe, list[str]]:
    """The recipe of a file for `mergekit-multi`: documents with a `name`, which stands for a model in the others.

    What it makes is the merge without a name, else the only one that no other needs; the merges that it is made of
    become recipes in it.  EvomergeError if there is no such one, or a merge needs itself.
    """
    named: dict[str | None, Any] = {}
    for number, document in enumerate(documents, 1):
        if not is_mergekit(document):
            raise EvomergeError(f"{path}: document {number} is no configuration of mergekit (it has no merge_method)")
        name = document.get("name")
        if name is not None and not (isinstance(name, str) and name):
            raise EvomergeError(f"{path}: document {number}: name: expected text, found {name!r:.60}")
        if name in named:
            raise EvomergeError(f"{path}: two documents have {f'the name {name!r}' if name else 'no name'}")
        named[name] = {k: v for k, v in document.items() if k != "name"}
    names = {name for name in named if name is not None}
    files = {name: parse(document, path, names) for name, document in named.items()}
    needed = {name: {m.model for m in references(file) if m.merged} for name, file in files.items()}
    ends = [None] if None in files else [n for n in files if not any(n in needed[other] for other in files)]
    if len(ends) != 1:
        raise EvomergeError(
            f"{path}: which merge is the last? One document must have no `name`, or be the only one that no other needs"
        )
    made: dict[str, Recipe] = {}
    notes: list[str] = []

    def make(name: str | None, above: tuple[str | None, ...]) -> Recipe:
        if name in above:
            raise EvomergeError(f"{path}: the merge {name!r} needs itself")
        for inner in sorted(needed[name] - made.keys()):
            made[inner] = make(inner, (*above, name))
        recipe, new = to_recipe(files[name], path, made)
        notes.extend(f"{name}: {note}" if name else note for note in new)
        return recipe

    recipe = make(ends[0], ())
    if idle := sorted(names - made.keys() - {ends[0]}):
        notes.append(f"{', '.join(idle)}: not needed for the last merge, so not made")
    return recipe, notes


def references(file: MergekitFile) -> list[Reference]:
    """Every model that a file names."""
    found = [i.model for part in file.slices for i in part.inputs]
    return found + [m for m in (file.base, file.tokenizer) if isinstance(m, Reference)]


def to_recipe(file: MergekitFile, path: Path, made: Mapping[str, Recipe] | None = None) -> tuple[Recipe, list[str]]:
    """The recipe that makes what mergekit makes of a file, and notes on what was passed over.

    Gradients are written out layer by layer, so the base model must be at hand.  EvomergeError lists what a recipe
    cannot say.  path: the file, named in errors.  made: what the names of its other documents stand for.
    """
    reading = Reading(file, made or {})
    base = open_checkpoint(locate(reading.base))
    tensors = list(output_tensors(reading.slices, list(base.tensors)))
    shared, each = reading.parameters(tensors)
    vocabulary, template = reading.vocabulary(), reading.template()
    if reading.problems:
        raise EvomergeError(f"{path}: {len(reading.problems)} problem(s):\n  " + "\n  ".join(reading.problems))
    try:
        content: dict[str, Any] = {
            "method": file.method,
            "dtype": reading.dtype(),
            "base": Model(path=reading.base),
            "sources": list(map(reading.source, reading.names, reading.sources, each)),
            "parameters": shared,
            "vocabulary": vocabulary,
            "chat_template": template,
            "slices": reading.layout(layer_count(list(base.tensors))),
        }
        return Recipe(**content), reading.unused()
    except ValidationError as error:
        lines = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
        raise EvomergeError(f"{path}: evomerge cannot make this merge:\n  " + "\n  ".join(lines)) from error
