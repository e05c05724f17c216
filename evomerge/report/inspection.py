"""Inspect models: layers and components, compatibility, and how far the sources are from the base."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from evomerge.errors import EvomergeError
from evomerge.merge.measure.distances import Measures, measure, strangers
from evomerge.sources.locate import locate
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import layer_count

WIDTH = 80  # characters of the text form
ALIKE, NEAR, AGAINST = 0.9, 0.2, -0.2  # cosines


@dataclass(frozen=True, repr=False)
class Inspection:
    """What can be said of models before they are merged; it prints as text.

    architecture, parameters, layers, tensors: the base's: its `model_type`, and how many it has of each.
    notes: what to know, one sentence each.
    problems: why the models cannot be merged, one sentence each.
    distances: source -> component -> the length of its task vector as a share of the base's; None where the base is 0.
    cosines: source -> source -> the cosine of the angle between their task vectors (near 0: the skills hardly touch;
        near 1: they are the same change); None if a source is the base.  Both are empty if there are problems.
    """

    architecture: str
    parameters: int
    layers: int
    tensors: int
    notes: list[str]
    problems: list[str]
    distances: dict[str, dict[str, float | None]] = field(default_factory=dict)
    cosines: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def mergeable(self) -> bool:
        """Whether the models can be merged."""
        return not self.problems

    @property
    def strangers(self) -> list[str]:
        """The sources that are no fine-tunes of the base (`merge/measure/distances.py`)."""
        return strangers(self.distances)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return asdict(self) | {"strangers": self.strangers, "advice": list(self.advice())}

    def __str__(self) -> str:
        text = StringIO()
        # In a notebook rich would show it at once instead of writing it into the file.
        Console(file=text, width=WIDTH, soft_wrap=True, highlight=False, force_jupyter=False).print(self)
        return text.getvalue().rstrip()

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        millions = self.parameters / 1e6
        yield Text(
            f"base: {self.architecture}, {millions:.1f}M parameters, {self.layers} layers, {self.tensors} tensors"
        )
        yield from (Text(f"note: {note}") for note in self.notes)
        yield from (Text(f"problem: {problem}") for problem in self.problems)
        if self.mergeable:
            yield number_table("length of the change, % of the base's weights", self.distances, "{:.3g}", 100.0)
            if len(self.cosines) > 1:
                yield number_table("cosine between the changes (1: the same, 0: unrelated)", self.cosines, "{:z.2f}")
            yield from (Text(sentence) for sentence in self.advice())
        yield Text("these models can be merged" if self.mergeable else "these models cannot be merged")

    def advice(self) -> Iterator[str]:
        """What the numbers mean, one sentence each."""
        for source, shares in self.distances.items():
            farthest = max((x for x in shares.values() if x is not None), default=0.0)
            if source in self.strangers:
                yield (
                    f"{source} changes some weights by {farthest:.0%} of their size: that is another model rather than "
                    "a fine-tune of this base, and merging it will most likely destroy both"
                )
            elif farthest == 0.0:
                yield f"{source} is the base itself"
        names = list(self.cosines)
        for one, other in combinations(names, 2):
            cosine = self.cosines[one][other]
            if cosine is not None and cosine > ALIKE:
                yield f"{one} and {other} are nearly the same change (cosine {cosine:.2f}): one of them is enough"
            elif cosine is not None and cosine < AGAINST:
                yield f"{one} and {other} pull against each other (cosine {cosine:.2f}): each will lose a part"
        good = [n for n in names if n not in self.strangers]
        pairs = [self.cosines[a][b] for a, b in combinations(good, 2)]
        if pairs and all(c is not None and AGAINST <= c <= NEAR for c in pairs):
            yield "the sources hardly touch each other: task_arithmetic with a weight for every layer is a good start"
        elif pairs:
            yield "the sources overlap: try `method: [task_arithmetic, ties, dare_ties]`, and let the search choose"


def number_table(title: str, rows: Measures, form: str, factor: float = 1.0) -> Table:
    """A table with a row for each source.  form: of a number times `factor`."""
    table = Table(title=title, title_justify="left")
    for name in ("source", *next(iter(rows.values()))):
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for source, numbers in rows.items():
        table.add_row(source, *("-" if x is None else form.format(factor * x) for x in numbers.values()))
    return table


def inspect(base: str | Path, sources: str | Path | Sequence[str | Path]) -> Inspection:
    """Tell whether models can be merged, and what to expect, as `evomerge inspect` does.

    base: the base model: a folder or a hub id.
    sources: fine-tunes or LoRA adapters of it, or one of these; each is called by the last part of its path.

    Raises EvomergeError if a model cannot be opened, or two sources have the same name.
    """
    given = [sources] if isinstance(sources, (str, Path)) else sources
    folders = {Path(s).name: locate(str(s)) for s in given}
    if len(folders) < len(given):
        raise EvomergeError("two of the sources have the same folder name; give each its own")
    models = open_models(locate(str(base)), folders, strict=False)
    names = list(models.base.tensors)
    compatibility = models.compatibility
    distances, cosines = ({}, {}) if compatibility.problems else measure(models)
    return Inspection(
        architecture=str(models.base.config.get("model_type")),
        parameters=sum(int(np.prod(t.shape)) for t in models.base.tensors.values()),
        layers=layer_count(names),
        tensors=len(names),
        notes=list(compatibility.notes),
        problems=list(compatibility.problems),
        distances=distances,
        cosines=cosines,
    )
