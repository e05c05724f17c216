"""Pages in a real Chromium: what is wrong with them on a wide and a narrow screen, in light and dark colours.

    assert look("file:///tmp/report.html", pictures=tmp_path) == []

`look` skips the test, with the reason, where playwright or Chromium is not there.  Playwright runs an event loop for as
long as it is open, so it is opened and closed within each call.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

Scheme = Literal["light", "dark"]


class View(NamedTuple):
    """A screen.  width: in CSS pixels."""

    width: int
    scheme: Scheme


VIEWS = (View(1280, "light"), View(1280, "dark"), View(390, "light"), View(390, "dark"))
HEIGHT = 900

# What a reader would see as wrong.  Elements within a box that scrolls or cuts by intention are no problem, nor are
# those that nobody sees.
PROBLEMS = """() => {
    const found = [], width = document.documentElement.clientWidth;
    const name = e => `<${e.tagName.toLowerCase()}> ${(e.textContent || '').trim().slice(0, 40)}`;
    const seen = e => e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
    const boxed = e => {
        for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
            if (getComputedStyle(p).overflowX !== 'visible') return true;
        return false;
    };
    if (document.documentElement.scrollWidth > width)
        found.push(`the page is ${document.documentElement.scrollWidth} pixels wide on ${width}`);
    for (const e of document.body.querySelectorAll('*')) {
        const box = e.getBoundingClientRect(), style = getComputedStyle(e);
        if (!box.width || !box.height || !seen(e)) continue;
        if (!e.closest('svg *') && (box.right > width + 1 || box.left < -1) && !boxed(e))
            found.push(`reaches over the edge: ${name(e)}`);
        const cuts = style.overflowX === 'hidden' && style.textOverflow !== 'ellipsis' && style.position !== 'absolute';
        if (cuts && e.childElementCount === 0 && e.scrollWidth > e.clientWidth + 1)
            found.push(`is cut off: ${name(e)}`);
    }
    for (const svg of document.querySelectorAll('svg')) {
        if (!seen(svg)) continue;
        const frame = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll('text')].filter(t => seen(t) && t.textContent.trim());
        const boxes = texts.map(t => t.getBoundingClientRect());
        boxes.forEach((b, i) => {
            const over = Math.max(
                frame.left - b.left, b.right - frame.right, frame.top - b.top, b.bottom - frame.bottom);
            if (over > 1)
                found.push(`leaves its picture: ${name(texts[i])}`);
            for (let k = i + 1; k < boxes.length; k++) {
                const c = boxes[k];
                if (b.left < c.right - 1 && c.left < b.right - 1 && b.top < c.bottom - 2 && c.top < b.bottom - 2)
                    found.push(`texts overlap: ${name(texts[i])} and ${name(texts[k])}`);
            }
        });
    }
    return found;
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: evomerge[browser]")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as api:
        program = program or api.chromium.executable_path
        if not os.path.exists(program):
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        browser = api.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def look(
    address: str,
    *,
    views: Sequence[View] = VIEWS,
    pictures: Path | None = None,
    act: Callable[[Any], None] = lambda page: None,
    allowed: Sequence[str] = (),
) -> list[str]:
    """What is wrong with a page: messages of the console, network requests, what is cut off, overlaps or too wide.

    address: a URL, for instance `path.as_uri()`.
    views: the screens that the page is opened on.
    pictures: a folder that gets a picture of the whole page for each screen, WIDTH-SCHEME.png.
    act: called with playwright's page before the look, to press what is to be pressed.
    allowed: beginnings of URLs that the page may ask for, such as `http://127.0.0.1:7860`.

    Each problem is one line that begins with its screen.
    """
    found = []
    with chromium() as browser:
        for view in views:
            size = {"width": view.width, "height": HEIGHT}
            page = browser.new_page(viewport=size, color_scheme=view.scheme)
            said: list[str] = []
            page.on("console", lambda m, said=said: said.append(f"console: {m.text}") if m.type == "error" else None)
            page.on("pageerror", lambda error, said=said: said.append(f"error: {error}"))
            page.on("request", lambda r, said=said: said.append(f"asks the network: {r.url}") if asks(r.url) else None)

            def asks(url: str) -> bool:
                return not url.startswith(("file:", "data:", "blob:", "about:", *allowed))

            page.goto(address)
            page.wait_for_load_state("networkidle")
            act(page)
            said += page.evaluate(PROBLEMS)
            if pictures is not None:
                page.screenshot(path=pictures / f"{view.width}-{view.scheme}.png", full_page=True)
            found += [f"{view.width} {view.scheme}: {line}" for line in dict.fromkeys(said)]
            page.close()
    return found
