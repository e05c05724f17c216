"""The tutorial's page shows what its commands print, and its notebook runs."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from searches import run_cli

ROOT = Path(__file__).resolve().parent.parent
VARYING = re.compile(
    r"(scoring|searching|trial|judging|task|all tasks|weights in|learning|used|\.\.\.|[┏┡└]"
    r"|warning|  +give|\d+ warnings?$|nothing to warn of"
    r"|Better|No difference|Worse|Too little|The greedy soup|The smallest gain|next:)"
)
"""What begins a line that depends on the speed of the machine, on the last bits of a score, or on the verdict."""


def run_here(command: str, folder: Path) -> str:
    """What a command of the page prints, both streams."""
    program, *words = shlex.split(command.replace("\\\n", " "))
    if program != "evomerge":
        printed: str = tutorial["output_of"](command, folder)
        return printed
    check = ["--check"] * (words[0] == "search")
    # This process may have made the console before it knew the width of the page.
    wide = f"from evomerge.report.progress import console; console.width = {tutorial['COLUMNS']}"
    done = run_cli(*words, *check, prelude=f"import os; os.chdir({str(folder)!r}); os.dup2(1, 2); {wide}")
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


tutorial = runpy.run_path(str(ROOT / "docs" / "run_tutorial.py"))


def told(page: str) -> list[str]:
    """The different lines of the page's output without times, numbers, names of models, and what varies."""
    bodies = [tutorial["without_times"](block["body"]) for block in tutorial["BLOCK"].finditer(page)]
    lines = [line for body in bodies for line in body.splitlines()]
    names = "add|sort|base|uniform|task_arithmetic 0.8|greedy soup|winner|candidate"
    plain = (re.sub(rf"\b({names})\b|[-+]?\d[\d.,]*", "_", line) for line in lines if not VARYING.match(line))
    return sorted({re.sub(r"\s+", " ", line) for line in plain})


@pytest.mark.more  # Numbers and verdict depend on the processor's kernels
def test_the_tutorial_shows_what_its_commands_print(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(tutorial["COLUMNS"]))
    page = tutorial["PAGE"].read_text(encoding="utf-8")
    now = tutorial["written"](page, tiny_family, tmp_path, run_here)
    assert told(page) == told(now), "stale; run: python docs/run_tutorial.py"


@pytest.mark.more
def test_the_notebook_runs(tiny_family: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason='nbclient is missing: pip install "evomerge[docs]"')
    nbclient = pytest.importorskip("nbclient", reason='nbclient is missing: pip install "evomerge[docs]"')
    notebook = nbformat.read(ROOT / "docs" / "tutorial" / "first-merge.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored outputs"
    tutorial["prepare"](tmp_path, tiny_family)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "these models can be merged" in printed
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
