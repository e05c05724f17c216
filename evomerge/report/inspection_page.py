"""What `evomerge inspect` found as a page: advice, pictures, tables.  One file, no network, no script."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from evomerge.files.write import write_text
from evomerge.printable import printable
from evomerge.report.inspection import PAIRS, Inspection, Table
from evomerge.report.page.parts import capital, section, table, text, whole_page
from evomerge.report.page.svg import COLOURS, Frame, chart, dotted_line, legend, range_of

SMALL = (168, 140)  # of the picture of a segment, pixels: two fit beside each other on a phone


def write_page(file: Path, found: Inspection) -> None:
    """Write the page to a file, over one that is there."""
    write_text(file, printable(page(found)))


def page(found: Inspection) -> str:
    """The page."""
    made = [(key, title, section(key, title, *content)) for key, title, *content in sections(found)]
    return whole_page("inspect", capital(found.outcome), made)


def sections(found: Inspection) -> Iterator[tuple[str, ...]]:
    """The sections of the page: anchor, title, and pieces of HTML."""
    about = (
        f"Base: {found.architecture}, {found.parameters / 1e6:,.1f}M parameters, {found.layers} layers, "
        f"{found.tensors} tensors."
    )
    yield "models", "Models", text(about)
    for title, sentences in (("Problems", found.problems), ("Advice", found.advice), ("Notes", found.notes)):
        if sentences:
            yield title.lower(), title, f"<ul>{''.join(f'<li>{with_code(s)}</li>' for s in sentences)}</ul>"
    if not found.mergeable:
        return
    if picture := layers(found):
        yield "layers", "Change of each layer", picture
    if pictures := segments(found):
        yield "ways", "Loss on the way from one model to another", pictures
    remarks = "".join(text(remark, "dim") for remark in found.remarks)
    yield ("numbers", "Numbers", *map(html_table, found.tables()), remarks)


def with_code(sentence: str) -> str:
    """A sentence as HTML, what stands in backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(sentence))


def html_table(shown: Table) -> str:
    """A table under its title."""
    rows = [[escape(name), *map(escape, cells)] for name, cells in shown.rows.items()]
    more = text(f"{shown.hidden} more pairs are in the JSON.", "dim") if shown.hidden > 0 else ""
    return f"<h3>{escape(shown.title)}</h3>" + table(["", *map(escape, shown.heads)], rows, "numbers") + more


def layers(found: Inspection) -> str:
    """A curve for each source over the layers; empty if none changes anything, or there is one layer."""
    curves = {name: [100 * (x or 0.0) for x in shares] for name, shares in found.differences.by_layer.items()}
    values = [y for curve in curves.values() for y in curve]
    if not any(values) or found.layers < 2:
        return ""
    kinds = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(curves)}

    def draw(width: int) -> str:
        range_of_layers = (0.0, float(found.layers - 1))
        frame = Frame(width, 260, range_of_layers, (0.0, 1.05 * max(values)), "layer", "% of the base's length", True)
        lines = [
            dotted_line(frame, range(len(curve)), curve, kinds[name], [titled(name, k, y) for k, y in enumerate(curve)])
            for name, curve in curves.items()
        ]
        return frame.draw(*lines, label="How much each source changes the matrices of each layer")

    words = "Length of the change of the layer's matrices, as a share of the base's."
    return text(words) + legend(*((kind, name) for name, kind in kinds.items())) + chart(draw)


def titled(name: str, layer: int, percent: float) -> str:
    return f"{name}, layer {layer}: {percent:.3g}%"


def segments(found: Inspection) -> str:
    """A small picture for each pair of models, all on one scale; empty if no loss was measured."""
    shown = sorted(found.paths.segments, key=lambda s: -s.barrier)[:PAIRS] if found.paths else []
    losses = [x for s in shown for x in s.losses if x < float("inf")]
    if not losses:
        return ""
    scale = range_of([min(losses), max(max(losses), min(losses) + 0.1)])
    words = (
        "Nats a token, from the first model (0) to the second (1). A hill between them is a barrier: what lies there "
        "works worse than either."
    )
    return text(words) + "".join(small(" to ".join(s.ends), s.losses, s.barrier, s.is_high, scale) for s in shown)


def small(title: str, losses: Sequence[float], barrier: float, high: bool, scale: tuple[float, float]) -> str:
    """The picture of one segment.  high: whether its barrier tells against a merge.  scale: the range of y."""
    frame = Frame(*SMALL, (0.0, 1.0), scale)
    shares = [k / (len(losses) - 1) for k in range(len(losses))]
    titles = [f"{share:g}: {loss:.3f}" for share, loss in zip(shares, losses, strict=True)]
    drawn = frame.draw(dotted_line(frame, shares, losses, "e" if high else "d", titles), label=title)
    return f"<figure class=small>{drawn}<figcaption>{escape(title)}<br>barrier {barrier:.2f}</figcaption></figure>"
