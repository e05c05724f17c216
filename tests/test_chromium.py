"""The look at a page sees what a reader would see: each problem is found where it is made on purpose."""

from pathlib import Path

import pytest
from chromium import View, look

NARROW = [View(390, "light")]
WHOLE = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"


def problems(tmp_path: Path, body: str) -> list[str]:
    page = tmp_path / "page.html"
    page.write_text(WHOLE + body, encoding="utf-8")
    return look(page.as_uri(), views=NARROW)


def test_a_sound_page_has_no_problem_and_is_pictured(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    scrolls = "<div style='overflow-x:auto'><div style='width:900px'>wide</div></div>"
    page.write_text(f"{WHOLE}<p>text</p>{scrolls}<svg width=200 height=50><text x=5 y=20>a</text></svg>")
    assert look(page.as_uri(), pictures=tmp_path) == []
    assert {p.name for p in tmp_path.glob("*.png")} == {f"{w}-{s}.png" for w in (1280, 390) for s in ("light", "dark")}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<p style='width:500px'>wide</p>", "the page is"),
        ("<p style='width:500px'>wide</p>", "reaches over the edge: <p> wide"),
        ("<p style='width:40px;overflow:hidden;white-space:nowrap'>cut off here</p>", "is cut off: <p> cut off here"),
        ("<script>console.error('oh')</script>", "console: oh"),
        ("<script>nothing()</script>", "error: nothing is not defined"),
        ("<img alt='' src='http://127.0.0.1:9/x.png'>", "asks the network: http://127.0.0.1:9/x.png"),
        ("<svg width=100 height=50><text x=90 y=20>leaves</text></svg>", "leaves its picture: <text> leaves"),
        (
            "<svg width=100 height=50><text x=5 y=20>one</text><text x=8 y=20>two</text></svg>",
            "texts overlap: <text> one and <text> two",
        ),
    ],
)
def test_a_problem_is_found(tmp_path: Path, body: str, problem: str) -> None:
    assert any(line.startswith(f"390 light: {problem}") for line in problems(tmp_path, body))
