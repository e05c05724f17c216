"""A choice among the finalists after the search, without a new one: by the user's task weights, or the knee.

A search keeps every finalist with its scores on the selection split in finalists.json.  The holdout split judged the
candidate of the verdict alone, so it has not judged a choice that is made later.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from evomerge.errors import EvomergeError, did_you_mean
from evomerge.files.read import first_problem, read_json
from evomerge.files.write import write_text
from evomerge.merge.recipe.recipe import Recipe, parse_recipe
from evomerge.search.run import Run
from evomerge.search.verdict.front import knee


class Means(BaseModel):
    """The means of one task on the selection split.

    metric: of the item scores by the task's metric.
    value: of the item values, see `scale.py`.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    metric: float
    value: float


class Entry(BaseModel):
    """One finalist as finalists.json has it.

    name, kind, trial: as in verdict.json.
    chosen: whether it is the candidate of the verdict.
    breaks: the guards that it breaks on the selection split.
    tasks: its means by task.
    recipe: the content of its recipe.
    """

    name: str
    kind: str
    trial: int | None
    chosen: bool
    breaks: list[str] = []
    tasks: dict[str, Means]
    recipe: dict[str, Any]

    def mean(self, weights: Mapping[str, float]) -> tuple[float, float]:
        """The weighted means of metric and value over the tasks that have a weight."""
        means, shares = [self.tasks[task] for task in weights], list(weights.values())
        metric = float(np.average([m.metric for m in means], weights=shares))
        return metric, float(np.average([m.value for m in means], weights=shares))


class Finalists(BaseModel):
    """The content of finalists.json.  finalists: the best on the selection split first."""

    finalists: list[Entry]


@dataclass(frozen=True)
class Choice:
    """A chosen finalist.

    sentence: how it was chosen, and what it scores on the selection split.
    """

    entry: Entry
    recipe: Recipe
    sentence: str


def write_finalists(file: Path, entries: Iterable[Entry]) -> None:
    """Write finalists.json."""
    content = {"finalists": [entry.model_dump(mode="json") for entry in entries]}
    write_text(file, json.dumps(content, indent=1) + "\n")


def read_finalists(run: Run) -> list[Entry]:
    """The finalists of a run, the best on the selection split first.  EvomergeError if there are none (yet)."""
    hint = f"write it with `evomerge resume {run.folder}`"
    if not run.finalists_file.exists():
        raise EvomergeError(f"{run.finalists_file}: is not there; {hint}")
    try:
        entries = Finalists.model_validate(read_json(run.finalists_file)).finalists
    except ValidationError as error:
        raise EvomergeError(f"{run.finalists_file}: {first_problem(error)}; {hint} again") from error
    if not entries or not entries[0].tasks or any(e.tasks.keys() != entries[0].tasks.keys() for e in entries):
        raise EvomergeError(f"{run.finalists_file}: its finalists do not have the same tasks; {hint} again")
    return entries


def prefer(run: Run, weights: Mapping[str, float]) -> Choice:
    """The finalist with the highest mean metric by task weights; of equal ones the one with the highest mean value.

    weights: of some of the tasks, above 0; the others do not count.

    EvomergeError if a weight is wrong, or if the run has no finalists.
    """
    entries = keeping_guards(read_finalists(run))
    check_weights(weights, list(entries[0].tasks))
    best = max(entries, key=lambda entry: entry.mean(weights))
    total = sum(weights.values())
    shown = ", ".join(f"{task} {weight / total:.2f}" for task, weight in weights.items())
    return choice(run, best, f"by the task weights {shown}", len(entries), f"weighted mean {best.mean(weights)[0]:.3f}")


def choose_knee(run: Run) -> Choice:
    """The finalist at the knee: see `front.py`; gains begin at the base.  EvomergeError if the run has no finalists."""
    entries = read_finalists(run)
    base = next((metrics(e) for e in entries if e.kind == "base"), None)
    entries = keeping_guards(entries)
    points = np.array([metrics(entry) for entry in entries])  # (N, T)
    best = entries[knee(points, points.min(axis=0) if base is None else np.array(base))]
    return choice(run, best, "as the knee, with the largest gain over the base in its worst task", len(entries))


def metrics(entry: Entry) -> list[float]:
    """The mean metric of each task."""
    return [means.metric for means in entry.tasks.values()]


def keeping_guards(entries: list[Entry]) -> list[Entry]:
    """The finalists that break no guard; all if each one does."""
    return [entry for entry in entries if not entry.breaks] or entries


def choice(run: Run, entry: Entry, how: str, count: int, score: str = "") -> Choice:
    """A choice in words.  count: how many finalists there were.  score: what decided, if that is one number."""
    means = ", ".join(f"{task} {m.metric:.3f}" for task, m in entry.tasks.items())
    scores = f"{score} ({means})" if score else means
    judged = (
        "It is also the candidate of the verdict, which the holdout items have judged."
        if entry.chosen
        else "The holdout items have not judged this choice: the scores that it was made by are likely too high."
    )
    sentence = f"{entry.name}, chosen among {count} models on the selection items {how}: {scores}. {judged}"
    if entry.breaks:
        sentence += f" It breaks {' and '.join(entry.breaks)} on the selection items, as all finalists do."
    return Choice(entry, parse_recipe(entry.recipe, run.finalists_file), sentence)


def check_weights(weights: Mapping[str, float], tasks: list[str]) -> None:
    """EvomergeError if there are no weights, one is not above 0, or one is of a task that there is not."""
    if not weights:
        raise EvomergeError(f"prefer: give a weight to one task or more of {', '.join(tasks)}")
    for task, weight in weights.items():
        if task not in tasks:
            raise EvomergeError(
                f"prefer: there is no task {task!r}; the tasks are {', '.join(tasks)}{did_you_mean(task, tasks)}"
            )
        if not 0 < weight < math.inf:
            raise EvomergeError(f"prefer: the weight of {task} must be above 0, not {weight:g}")


def parse_weights(text: str) -> dict[str, float]:
    """`math=0.7,chat=0.3` as weights by task.  EvomergeError if the text is something else."""
    found: dict[str, float] = {}
    for part in text.split(","):
        task, _, number = (piece.strip() for piece in part.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not task or math.isnan(weight):
            raise EvomergeError(f"--prefer: {part.strip()!r} is not TASK=WEIGHT; give for instance math=0.7,chat=0.3")
        if task in found:
            raise EvomergeError(f"--prefer: {task} has two weights")
        found[task] = weight
    return found
