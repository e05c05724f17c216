"""Inspect models: layers and components, compatibility, how the sources differ, and what lies between them."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from evomerge.errors import EvomergeError
from evomerge.merge.measure.distances import ALL, EXACT, LARGEST, SAMPLE, Differences, measure, strangers
from evomerge.report.advice import advice_on
from evomerge.report.progress import Screen, Stages, Steps
from evomerge.search.check.paths import Line, Paths, lines_of_file, lines_of_tasks, measure_paths, points
from evomerge.sources.open_models import Models, open_named
from evomerge.sources.tensor_names import layer_count

WIDTH = 80  # characters of the text form
PAIRS = 12  # rows of a table of pairs; the others are in the JSON
NAME = 26  # characters of a name in a table


@dataclass(frozen=True)
class Table:
    """Numbers as text, a row of cells by name.  hidden: how many more rows there are."""

    title: str
    heads: list[str]
    rows: dict[str, list[str]]
    hidden: int = 0


@dataclass(frozen=True, repr=False)
class Inspection:
    """What can be said of models before they are merged; it prints as text.

    architecture, parameters, layers, tensors: the base's: its `model_type`, and how many it has of each.
    notes: what to know, one sentence each.
    problems: why the models cannot be merged, one sentence each.
    differences: how the sources differ from the base and from each other (`merge/measure/distances.py`).
    paths: the losses on the segments between the models; None without a text.
    """

    architecture: str
    parameters: int
    layers: int
    tensors: int
    notes: list[str]
    problems: list[str]
    differences: Differences = field(default_factory=lambda: Differences({}, {}, {}, {}, {}, False))
    paths: Paths | None = None

    @property
    def mergeable(self) -> bool:
        """Whether the models can be merged."""
        return not self.problems

    @property
    def distances(self) -> dict[str, dict[str, float | None]]:
        """Source -> component -> the length of its task vector as a share of the base's; None where the base is 0."""
        return self.differences.distances

    @property
    def cosines(self) -> dict[str, dict[str, float | None]]:
        """Source -> source -> the cosine of the angle between their task vectors; None if a source is the base."""
        return self.differences.cosines

    @property
    def strangers(self) -> list[str]:
        """The sources that are no fine-tunes of the base (`merge/measure/distances.py`)."""
        return strangers(self.distances)

    @property
    def advice(self) -> list[str]:
        """What the numbers mean and what to do, one sentence each."""
        return advice_on(self.differences, self.paths) if self.mergeable else []

    @property
    def outcome(self) -> str:
        """Whether to merge them, in a few words."""
        if not self.mergeable:
            return "these models cannot be merged"
        without = f", but not with {', '.join(self.strangers)}"
        return "these models can be merged" + without * bool(self.strangers)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        found: dict[str, Any] = asdict(self)
        differences = found.pop("differences")
        differences["conflicts"] = {" / ".join(pair): c for pair, c in self.differences.conflicts.items()}
        paths = self.paths and {
            "lines": self.paths.lines,
            "tokens": self.paths.tokens,
            "guess": self.paths.guess,
            "segments": [{**asdict(s), "barrier": s.barrier} for s in self.paths.segments],
        }
        return {**found, **differences, "paths": paths, "strangers": self.strangers, "advice": self.advice}

    def to_json(self) -> str:
        """All of it as text; a loss that is infinite is null."""
        return json.dumps(finite(self.as_dict()), indent=2)

    def __str__(self) -> str:
        text = StringIO()
        # In a notebook rich would show it at once instead of writing it into the file.
        Screen(file=text, width=WIDTH, force_jupyter=False).print(self)
        return text.getvalue().rstrip()

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        millions = self.parameters / 1e6
        yield Text(
            f"base: {self.architecture}, {millions:,.1f}M parameters, {self.layers} layers, {self.tensors} tensors"
        )
        yield from (Text(f"note: {note}") for note in self.notes)
        yield from (Text(f"problem: {problem}") for problem in self.problems)
        if self.mergeable:
            yield from (Text(line, no_wrap=True) for table in self.tables() for line in text_lines(table))
            yield Text("\nadvice")
            yield from (Text(f"- {sentence}") for sentence in self.advice)
            yield from (Text(f"({remark})") for remark in self.remarks)
        yield Text(f"\n{self.outcome}")

    def tables(self) -> Iterator[Table]:
        """All numbers."""
        found, names = self.differences, list(self.distances)
        kinds = list(next(iter(self.distances.values())))
        rows = {n: [number(x, "{:.3g}", 100) for x in shares.values()] for n, shares in self.distances.items()}
        yield Table("Length of each change, % of the base's weights", kinds, rows)
        if len(names) > 1:
            short = [str(k) for k in range(1, 1 + len(names))]
            rows = {
                f"{k} {n}": [number(x, "{:z.2f}") for x in cosines.values()]
                for k, (n, cosines) in zip(short, found.cosines.items(), strict=True)
            }
            yield Table("Cosine between the changes (1: the same, 0: unrelated)", short, rows)
            ranked = sorted(found.conflicts.items(), key=lambda pair: -(pair[1][ALL] or 0))
            rows = {self.pair(" / ", p): [number(x, "{:.0f}", 100) for x in c.values()] for p, c in ranked[:PAIRS]}
            title = "Opposite signs where both change most, % of elements (unrelated: 50)"
            yield Table(title, [*kinds, ALL], rows, len(ranked) - PAIRS)
        rows = {n: [number(x, "{:.0f}", 100) for x in parts.values()] for n, parts in found.redundancy.items()}
        title = "Part of each change that its largest elements carry, % of the squared norm"
        yield Table(title, [f"top {share:.0%}" for share in LARGEST], rows)
        if self.paths is not None:
            segments = sorted(self.paths.segments, key=lambda s: -s.barrier)
            rows = {
                self.pair(" - ", s.ends): [number(x, "{:.3f}") for x in (*s.losses, s.barrier)]
                for s in segments[:PAIRS]
            }
            title = f"Loss from one model to the other, nats a token ({self.paths.tokens} tokens)"
            yield Table(title, ["0", "1/4", "1/2", "3/4", "1", "barrier"], rows, len(segments) - PAIRS)

    def pair(self, between: str, names: tuple[str, str]) -> str:
        """Two models in a table; long names are replaced by the numbers in the table of cosines."""
        if len(between.join(names)) <= NAME or len(self.cosines) < 2:
            return between.join(names)
        return between.join(str(1 + list(self.cosines).index(n)) if n in self.cosines else n for n in names)

    @property
    def remarks(self) -> list[str]:
        """What to know about the numbers."""
        sampled = (
            f"of large tensors {EXACT:,} elements were measured, {SAMPLE:,} for opposite signs and largest elements"
        )
        missing = (
            "not measured: the loss between the models. Give --text FILE with a few lines that they should be good at, "
            "or a search configuration instead of the models"
        )
        return [sampled] * self.differences.sampled + [missing] * (self.paths is None)


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(factor * value)


def finite(value: Any) -> Any:
    """JSON without numbers that JSON does not have: null instead."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_lines(table: Table) -> Iterator[str]:
    """A table as lines of at most WIDTH characters; columns that do not fit stand below the others."""
    yield f"\n{table.title}"
    heads, rows = table.heads, table.rows
    first = max((min(len(name), NAME) for name in rows), default=0)
    widths = [max(len(head), *(len(cells[k]) for cells in rows.values())) + 2 for k, head in enumerate(heads)]
    start = 0
    while start < len(heads):
        end = start + 1
        while end < len(heads) and 2 + first + sum(widths[start : end + 1]) <= WIDTH:
            end += 1
        for name, cells in {"": heads, **rows}.items():
            shown = name if len(name) <= NAME else f"{name[: NAME - 12]}..{name[-10:]}"
            columns = (cell.rjust(width) for cell, width in zip(cells[start:end], widths[start:end], strict=True))
            yield f"  {shown:<{first}}{''.join(columns)}"
        start = end
    if table.hidden > 0:
        yield f"  ({table.hidden} more pairs are in the JSON)"


def inspect(
    base: str | Path,
    sources: str | Path | Sequence[str | Path] = (),
    *,
    text: str | Path | None = None,
    device: str = "auto",
    show: bool = False,
) -> Inspection:
    """Tell whether models can be merged, and what to expect, as `evomerge inspect` does.

    base: the base model, a folder or a hub id; or without sources the configuration of a search (YAML), whose models
        are inspected and whose tasks give the text.
    sources: fine-tunes or LoRA adapters of it, or one of these; each is called by the last part of its path.
    text: a file with a few lines of text, on which losses are measured between the models.
    device: where losses are computed: auto, cpu, cuda, cuda:1, ...
    show: whether to show progress.

    Raises EvomergeError if a model cannot be opened, or two sources have the same name.
    """
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    lines = None if text is None else lines_of_file(Path(text))
    if given:
        named = {Path(s).name: str(s) for s in given}
        if len(named) < len(given):
            raise EvomergeError("two of the sources have the same folder name; give each its own")
        with Stages(show) as stages:
            models = open_named(str(base), named, strict=False, progress=stages.download)
    elif Path(base).suffix in (".yaml", ".yml"):
        from evomerge.config.config_file import load_config
        from evomerge.search.evaluation.task_set import open_task_set
        from evomerge.search.models import open_config_models

        config = load_config(Path(base))
        with Stages(show) as stages:
            models = open_config_models(config, strict=False, progress=stages.download)
        if lines is None and not models.compatibility.problems:
            lines = lines_of_tasks(open_task_set(config)) or None
    else:
        raise EvomergeError("give a base and at least one source, or the configuration of a search")
    compatibility = models.compatibility
    counts = [math.prod(t.shape) for t in models.base.tensors.values()]
    found = Inspection(
        architecture=str(models.base.config.get("model_type")),
        parameters=sum(counts),
        layers=layer_count(list(models.base.tensors)),
        tensors=len(counts),
        notes=list(compatibility.notes),
        problems=list(compatibility.problems),
    )
    return found if found.problems else compared(found, models, lines, device, show)


def compared(found: Inspection, models: Models, lines: Sequence[Line] | None, device: str, show: bool) -> Inspection:
    """The inspection with all that is measured.  lines: of text, None for none."""
    reading, losses = Steps("comparing weights", "MB"), Steps("losses between the models", "models")
    size, count = sum(t.bytes for t in models.base.tensors.values()), points(len(models.sources))
    try:
        differences = measure(models, progress=lambda done: reading.step(done, size) if show else None)
        paths = None
        if lines is not None:
            paths = measure_paths(models, lines, device, lambda done: losses.step(done, count) if show else None)
    finally:
        reading.close()
        losses.close()
    return replace(found, differences=differences, paths=paths)
