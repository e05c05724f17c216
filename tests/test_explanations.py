"""Every merge method is explained: formula, picture, when it fails; pictures and tables are what the code makes."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.merge.gradient import learnable
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import is_named

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "reference" / "methods.md"
PICTURES = DOCS / "pictures"
every_method = pytest.mark.parametrize("name", METHODS)


def section(name: str) -> str:
    """The text of the page about a method."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n### `{name}`\n")
    assert found, f"{name} has no section"
    return re.split(r"\n##+ ", rest)[0]


def one_line(text: str) -> str:
    return " ".join(text.split())


CHOOSE = DOCS / "explanation" / "choose-a-method.md"
NEVER_SEARCHED = ("eps", "max_iter", "tol")  # they bound an iteration


@every_method
def test_the_formula_of_a_method_is_that_of_its_file(name: str) -> None:
    blocks = re.findall(r"^```\n(.*?)^```$", section(name), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    plan = METHODS[name].plan
    module = inspect.getmodule(getattr(plan, "func", plan))
    assert module is not None
    told = one_line(module.__doc__ or "")
    assert [line for line in blocks[0].splitlines() if one_line(line) not in told] == []


@every_method
def test_a_method_has_a_picture_and_says_when_it_fails(name: str) -> None:
    text = section(name)
    assert f"](../pictures/methods/{name}.svg)" in text
    assert (PICTURES / "methods" / f"{name}.svg").is_file()
    for sentence in ("Use it", "Fails when"):
        assert re.search(rf"^\*\*{sentence}\*\* .*?\.$", text, re.MULTILINE | re.DOTALL), sentence


@pytest.mark.more
def test_the_pictures_of_methods_are_what_the_kernels_draw(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import methods; methods.draw(pathlib.Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, DOCS / "tools", tmp_path], check=True)
    made = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    kept = {file.name: file.read_text(encoding="utf-8") for file in (PICTURES / "methods").iterdir()}
    assert made.keys() == kept.keys()
    stale = [name for name in made if made[name] != kept[name]]
    assert stale == [], "stale; run: python docs/pictures.py methods"


@pytest.mark.more
def test_the_tables_of_memory_and_time_are_what_the_bank_computes() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import memory; memory.draw()"
    made = subprocess.run(
        [sys.executable, "-c", code, DOCS / "tools"], check=True, capture_output=True, text=True
    ).stdout
    rows = [line for line in made.splitlines() if line]
    assert rows
    page = (DOCS / "how-to" / "memory-and-time.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in page] == [], "stale; run: python docs/pictures.py memory"


def test_the_pictures_are_small() -> None:
    assert sum(file.stat().st_size for file in PICTURES.rglob("*.svg")) < 300_000


@every_method
def test_the_decision_table_has_every_method_and_what_can_be_learned_of_it(name: str) -> None:
    rows = [line for line in CHOOSE.read_text(encoding="utf-8").splitlines() if f"`{name}`" in line.split(" | ")[-1]]
    (row,) = [row for row in rows if row.count(" | ") == 1 and row.startswith("| ")]
    method = METHODS[name]
    searched = {n for n, knob in method.knobs.items() if not is_named(knob) and n not in NEVER_SEARCHED}
    learned = searched & learnable(method)
    told = row.split()[1]
    assert told == ("there" if not searched else "none" if not learned else "all" if learned == searched else "some")
    decisions = [line.split(" | ")[1] for line in CHOOSE.read_text().splitlines() if line.count(" | ") == 3]
    assert any(f"`{name}`" in cell for cell in decisions)
