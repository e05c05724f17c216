"""What models answered to the holdout items, kept in the run folder for the report.

answers/items.json      of every item its prompt and its gold answer
answers/DIGEST.json     what the model of the recipe with this digest answered

A model's file is written before its scores are stored.  So where the scores are in the study, the answers are there
too, unless an earlier version scored the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict

from evomerge.errors import EvomergeError
from evomerge.files.read import read_model
from evomerge.files.write import write_text

if TYPE_CHECKING:  # evaluating needs libraries whose import takes seconds
    from evomerge.evaluate.answers import Answer

Content = TypeVar("Content", bound=BaseModel)

LONGEST = 2000  # characters of a text that are kept; of a prompt the last ones, where the question is


class Asked(BaseModel):
    """One item.  prompt: as the models see it.  gold: the answer that the metric compares with."""

    prompt: str
    gold: str


class Said(BaseModel):
    """A model's answer.  text: as it was written or chosen.  taken: what the task's filter took of it."""

    text: str
    taken: str


class AskedItems(BaseModel):
    """The content of items.json.  tasks: task -> item id -> the item."""

    model_config = ConfigDict(extra="forbid")
    tasks: dict[str, dict[str, Asked]] = {}


class SaidByModel(BaseModel):
    """The content of a model's file.  name: of the model.  tasks: task -> item id -> its answer."""

    model_config = ConfigDict(extra="forbid")
    name: str = ""
    tasks: dict[str, dict[str, Said]] = {}


def read_items(folder: Path) -> AskedItems:
    """The items of a run.  folder: that of the answers.  EvomergeError if the file is damaged."""
    return read(folder / "items.json", AskedItems)


def read_answers(folder: Path, digest: str) -> SaidByModel:
    """A model's answers; without tasks if they were not kept.  EvomergeError if the file is damaged."""
    return read(folder / f"{digest}.json", SaidByModel)


def keep_answers(
    folder: Path,
    digest: str,
    name: str,
    ids: Mapping[str, Sequence[str]],
    answers: "Mapping[str, Sequence[Answer]]",
) -> None:
    """Add a model's answers to those that are kept.

    digest: of the recipe.  name: of the model.
    ids: task -> the ids of its items, in the order of its answers.
    """
    if not answers:
        return
    folder.mkdir(exist_ok=True)
    items, said = (
        read_or_begin(folder / "items.json", AskedItems),
        read_or_begin(folder / f"{digest}.json", SaidByModel),
    )
    said.name = name
    known = {task: set(found) for task, found in items.tasks.items()}
    for task, given in answers.items():
        pairs = list(zip(ids[task], given, strict=True))
        items.tasks.setdefault(task, {}).update(
            {i: Asked(prompt=storable(a.prompt[-LONGEST:]), gold=storable(a.gold[:LONGEST])) for i, a in pairs}
        )
        said.tasks.setdefault(task, {}).update(
            {i: Said(text=storable(a.text[:LONGEST]), taken=storable(a.taken[:LONGEST])) for i, a in pairs}
        )
    if known != {task: set(found) for task, found in items.tasks.items()}:
        write_text(folder / "items.json", items.model_dump_json())
    write_text(folder / f"{digest}.json", said.model_dump_json())


def storable(text: str) -> str:
    """The text with a question mark for each lone surrogate, which UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_or_begin(file: Path, kind: type[Content]) -> Content:
    """`read`, or an empty content in place of a damaged one, which is written anew."""
    try:
        return read(file, kind)
    except EvomergeError:
        return kind()


def read(file: Path, kind: type[Content]) -> Content:
    """The content of a file; an empty one if it is not there.  EvomergeError if it is damaged."""
    return read_model(file, kind, strict=True) if file.exists() else kind()
