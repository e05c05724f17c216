"""The pieces of a page: sections, tables, commands to copy, marks of intervals."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


def whole_page(
    name: str, title: str, sections: Sequence[tuple[str, str, str]], script: bool = False, reload: float | None = None
) -> str:
    """The HTML of a page, which needs no other file.

    name, title: in the browser's tab and on the page.
    sections: (anchor, title, HTML) of each.
    script: whether the page has buttons to copy and filters.
    reload: seconds after which a browser reads the page again; None for never.
    """
    links = "".join(f"<a href='#{key}'>{escape(head)}</a>" for key, head, _ in sections)
    again = "" if reload is None else f"<meta http-equiv=refresh content={reload:g}>"
    active = f"<script>{beside('script.js')}</script>" if script else ""
    return "\n".join([
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>evomerge: {escape(name)}</title>",
        f"<meta name=viewport content='width=device-width, initial-scale=1'>{again}",
        f"<style>{beside('style.css')}</style></head><body>",
        f"<header><h1>{escape(title)}</h1><nav>{links}</nav></header><main>",
        *(content for _, _, content in sections),
        f"</main>{active}</body></html>\n",
    ])  # fmt: skip


def beside(name: str) -> str:
    """The text of a file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def section(name: str, title: str, *content: str) -> str:
    """A section.  name: of its anchor."""
    return f"<section id={name}><h2>{escape(title)}</h2>{''.join(content)}</section>"


def capital(words: str) -> str:
    """A sentence with a capital letter at its beginning."""
    return words[:1].upper() + words[1:]


def text(words: str, kind: str = "") -> str:
    """A paragraph.  kind: its class."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(words)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls within its own box.  head, rows: HTML of the cells."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    whole = (f"<thead><tr>{top}</tr></thead>" if any(head) else "") + f"<tbody>{body}</tbody>"
    return f"<div class='box {kind}'><table class='{kind}'>{whole}</table></div>"


def copied(code: str, title: str = "") -> str:
    """Text with a button that copies it.  title: what it is for."""
    head = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    button = "<button type=button class=copy>Copy</button>"
    kind = "code" if "\n" in code else "code command"
    return f"<figure class='{kind}'>{head}<pre>{escape(code)}</pre>{button}</figure>"


def folded(title: str, content: str) -> str:
    """What is shown when its title is pressed."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def span_mark(value: float, low: float | None, high: float | None, scale: tuple[float, float], kind: str = "") -> str:
    """An estimate with its interval as a bar.

    scale: the values at the ends of the whole bar.  A dash marks zero where zero lies within.
    """
    width = (scale[1] - scale[0]) or 1.0

    def at(x: float) -> str:
        return f"{100 * min(1.0, max(0.0, (x - scale[0]) / width)):.1f}%"

    band = "" if low is None or high is None else f"<i style='left:{at(low)};right:calc(100% - {at(high)})'></i>"
    zero = f"<u style='left:{at(0.0)}'></u>" if scale[0] < 0 < scale[1] else ""
    return f"<div class='span {kind}'>{zero}{band}<b style='left:{at(value)}'></b></div>"


def chip(words: str, kind: str = "") -> str:
    """A short label.  kind: its class."""
    return f"<span class='chip {kind}'>{escape(words)}</span>"
