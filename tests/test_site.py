"""The site of the documentation: built, complete, and right in a browser without a network."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
DOCS, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
FIRST = ("index.html", "tutorial/first-merge.html", "reference/configuration.html")


@pytest.fixture(scope="module")
def site() -> Path:
    pytest.importorskip("zensical", reason='zensical is missing: pip install "evomerge[docs]"')
    done = subprocess.run([sys.executable, ROOT / "docs" / "build_site.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return SITE


def test_every_page_has_the_lists_tables_and_code_of_its_source(site: Path) -> None:
    """Zensical's Markdown is not GitHub's: a list without an empty line before it is a paragraph there."""
    pages = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
    written = {page: text for page, text in pages.items() if not text.startswith("---")}  # the others are code
    assert len(written) > 20
    for page, text in written.items():
        name = page.relative_to(DOCS).with_suffix(".html")
        html = (site / (name.with_name("index.html") if page.stem == "README" else name)).read_text(encoding="utf-8")
        article = re.search(r"<article.*</article>", html, re.DOTALL)
        assert article, name
        wanted = MarkdownIt().enable("table").render(text)
        for tag in ("li", "tr", "pre", "h2", "p", "img"):
            count = [len(re.findall(rf"<{tag}[ >]", html)) for html in (wanted, article[0])]
            assert count[0] == count[1], f"{name}: {count[0]} <{tag}> in the source, {count[1]} on the page"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_screen_and_load_nothing_from_a_network(
    site: Path, browser: Any, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if re.match("https?:", request.url) else None)
    every = [
        site / page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md") if "project" not in page.parts
    ]
    files = every if (width, scheme) == (390, "light") else [site / name for name in FIRST]
    for file in files:
        page.goto(file.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{file}: {wide} pixels wide"
        shown = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", shown)[:3])) < 128) == (scheme == "dark"), f"{file}: {shown}"
    assert faults == []
    context.close()


def test_the_search_finds_a_page_that_was_opened_from_disk(site: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("mergekit-evolve")
    page.get_by_text(re.compile(r"^\d+ results?$")).wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("from-mergekit-evolve.html"))
    page.close()
