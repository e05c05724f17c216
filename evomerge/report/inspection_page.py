"""What `evomerge inspect` found as a page: advice, pictures, tables.  One file, no network, no script."""

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from evomerge.files import write_text
from evomerge.printable import printable
from evomerge.report.inspection import PAIRS, Inspection, Table

STYLE = """
:root{color-scheme:light dark;--ink:#1c2733;--dim:#5d6b78;--line:#d5dce3;--paper:#fff;--good:#2b8a4b;--bad:#b3452c}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ee;--dim:#9aa7b3;--line:#3a4651;--paper:#14191e;--good:#5cc482;
--bad:#f08a70}}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin:2rem 0 .5rem}
.dim{color:var(--dim)} .wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;white-space:normal;padding-left:0;min-width:4rem}
svg{max-width:100%;height:auto} svg text{font-size:12px;fill:var(--dim)} .axis{stroke:var(--line)}
.small{display:inline-block;width:11.5rem;margin:.4rem .8rem .4rem 0;font-size:.85rem;vertical-align:top}
@media(max-width:40rem){th,td{padding:.25rem .35rem;font-size:.8rem} svg text{font-size:22px}}
@media print{body{max-width:none}}
"""
COLOURS = ("#2f7ed8", "#d9822b", "#2e9d6a", "#a2559c", "#c23f3f", "#6d7f8f")
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 44, 24  # of the picture of the layers, pixels
CELL = (180, 80)  # of the picture of a segment


def write_page(file: Path, found: Inspection) -> None:
    """Write the page to a file, over one that is there."""
    write_text(file, printable("\n".join(page(found)) + "\n"))


def page(found: Inspection) -> Iterator[str]:
    """The parts of the page."""
    yield '<!doctype html><html lang="en"><meta charset="utf-8"><title>evomerge inspect</title>'
    yield f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style>'
    yield f"<h1>{escape(found.outcome[0].upper() + found.outcome[1:])}</h1>"
    yield f'<p class="dim">Base: {escape(found.architecture)}, {found.parameters / 1e6:,.1f}M parameters, '
    yield f"{found.layers} layers, {found.tensors} tensors</p>"
    for title, sentences in (("Problems", found.problems), ("Advice", found.advice), ("Notes", found.notes)):
        if sentences:
            yield f"<h2>{title}</h2><ul>{''.join(f'<li>{with_code(s)}</li>' for s in sentences)}</ul>"
    if not found.mergeable:
        return
    yield from layers(found)
    yield from segments(found)
    for table in found.tables():
        yield html_table(table)
    yield from (f'<p class="dim">{escape(remark)}</p>' for remark in found.remarks)


def with_code(sentence: str) -> str:
    """A sentence as HTML, what stands in backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(sentence))


def html_table(table: Table) -> str:
    """A table under its title."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in ("", *table.heads))
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in table.rows.items()
    )
    more = f'<p class="dim">{table.hidden} more pairs are in the JSON.</p>' if table.hidden > 0 else ""
    return f'<h2>{escape(table.title)}</h2><div class="wide"><table><tr>{heads}</tr>{rows}</table></div>{more}'


def layers(found: Inspection) -> Iterator[str]:
    """A picture of how much of each layer a source changes: a curve for each source over the layers."""
    curves = {name: [100 * (x or 0.0) for x in shares] for name, shares in found.differences.by_layer.items()}
    top = max((max(curve, default=0.0) for curve in curves.values()), default=0.0)
    if not top or found.layers < 2:
        return
    yield "<h2>Length of the change of each layer's matrices, % of the base's</h2>"
    yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="change of each layer">'
    yield axes(f"{top:.3g}%", "layer 0", f"layer {found.layers - 1}")
    for (name, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        step = (WIDTH - LEFT - 8) / (found.layers - 1)
        at = [(LEFT + k * step, (HEIGHT - BOTTOM) - (HEIGHT - BOTTOM - 16) * y / top) for k, y in enumerate(curve)]
        yield polyline(at, colour, name)
    yield f"</svg><p>{legend(list(curves))}</p>"


def axes(top: str, first: str, last: str) -> str:
    """Axes with the greatest value and the ends of the horizontal one."""
    ground = HEIGHT - BOTTOM
    return (
        f'<path class="axis" fill="none" d="M{LEFT} 8V{ground}H{WIDTH}"/>'
        f'<text x="{LEFT - 4}" y="20" text-anchor="end">{top}</text>'
        f'<text x="{LEFT - 4}" y="{ground}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{first}</text>'
        f'<text x="{WIDTH - 2}" y="{HEIGHT - 6}" text-anchor="end">{last}</text>'
    )


def polyline(at: Sequence[tuple[float, float]], colour: str, name: str) -> str:
    """A curve with dots; its name is shown over it."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in at)
    return (
        f'<g><title>{escape(name)}</title><polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
        f"{dots}</g>"
    )


def legend(names: Sequence[str]) -> str:
    """The names of curves with their colours."""
    return " &nbsp; ".join(
        f'<span style="color:{colour}">&#9679;</span> {escape(name)}'
        for name, colour in zip(names, COLOURS * len(names), strict=False)
    )


def segments(found: Inspection) -> Iterator[str]:
    """A small picture for each pair of models: the loss on the way from one to the other, all on one scale."""
    if found.paths is None:
        return
    shown = sorted(found.paths.segments, key=lambda s: -s.barrier)[:PAIRS]
    losses = [x for s in shown for x in s.losses if x < float("inf")]
    if not losses:
        return
    low, high = min(losses), max(max(losses), min(losses) + 0.1)
    yield f"<h2>Loss on the way from one model to another, {low:.2f} to {high:.2f} nats a token</h2>"
    width, height = CELL
    for s in shown:
        colour = f"var(--{'bad' if s.is_high else 'good'})"
        at = [
            (8 + k * (width - 16) / 4, height - 8 - (height - 16) * (min(x, high) - low) / (high - low))
            for k, x in enumerate(s.losses)
        ]
        ends = " to ".join(s.ends)
        yield (
            f'<span class="small"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(ends)}">'
            f'<path class="axis" d="M0 {height - 1}H{width}"/>{polyline(at, colour, ends)}</svg>'
            f"{escape(ends)}<br>barrier {s.barrier:.2f}</span>"
        )
