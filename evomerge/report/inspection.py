"""Inspect models: layers and components, compatibility, and how far the sources are from the base."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from evomerge.errors import EvomergeError
from evomerge.merge.measure.gram import gram_matrix
from evomerge.sources.locate import locate
from evomerge.sources.open_models import Models, open_models
from evomerge.sources.tensor_names import layer_count, tensor_role

WIDTH = 120  # characters of the text form


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

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=WIDTH, soft_wrap=True, highlight=False).print(self)
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
            yield self.table()
        yield Text("these models can be merged" if self.mergeable else "these models cannot be merged")

    def table(self) -> Table:
        """Distances and cosines, a row for each source."""
        components = list(next(iter(self.distances.values())))
        table = Table("source", *(f"|d|/|b| {c}" for c in components), *(f"cos {s}" for s in self.cosines))
        for source, shares in self.distances.items():
            lengths = ["-" if share is None else f"{share:.2%}" for share in shares.values()]
            angles = ["-" if cosine is None else f"{cosine:+.2f}" for cosine in self.cosines[source].values()]
            table.add_row(source, *lengths, *angles)
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


Measures = dict[str, dict[str, float | None]]
"""Source -> component or source -> a number."""


def measure(models: Models) -> tuple[Measures, Measures]:
    """The distances and the cosines of an `Inspection`."""
    sources = list(models.sources)
    components = sorted({tensor_role(n).component for n in models.base.tensors})
    squares = {(s, c): 0.0 for s in sources for c in components}
    base_squares = dict.fromkeys(components, 0.0)
    products = np.zeros((len(sources), len(sources)))  # (N, N)
    for name, info in models.base.tensors.items():
        if not info.dtype.is_floating_point:
            continue
        base = models.base.read(name)
        deltas = [models.sources[s].read(name).float() - base.float() for s in sources]
        gram = gram_matrix([base, *deltas])
        component = tensor_role(name).component
        base_squares[component] += gram[0, 0]
        products += gram[1:, 1:]
        for i, s in enumerate(sources):
            squares[s, component] += gram[i + 1, i + 1]
    distances: Measures = {}
    cosines: Measures = {}
    for i, s in enumerate(sources):
        shares = {c: (squares[s, c] / base_squares[c]) ** 0.5 if base_squares[c] else None for c in components}
        lengths = np.sqrt(products[i, i] * products.diagonal())
        distances[s] = {c: None if share is None else float(share) for c, share in shares.items()}
        cosines[s] = {o: float(p / n) if n else None for o, p, n in zip(sources, products[i], lengths, strict=True)}
    return distances, cosines
