"""What is shown: texts of others as they are, passwords never."""

import ast
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa
import pytest
from badfiles import ACTS, EVIL
from rich.text import Text
from searches import ROOT

from evomerge.config.database_url import has_password, masked, passwords
from evomerge.report.item_table import COLUMNS, without_formulas
from evomerge.report.progress import Screen
from evomerge.search.monitor.snapshot import (
    Snapshot,
    read_snapshot,
)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://us@er:hunter2@host/db",
        "postgresql://u?s:hunter2@host/db",
        "postgresql://u#s:hunter2@host/db",
        "mssql+pyodbc:///?odbc_connect=Driver%3DX%3BUID%3Dme%3BPWD%3Dhunter2%3BServer%3Dh",
        "mssql+pyodbc://me@host/db;password=hunter2",
        "mssql+pyodbc://host/db?x=1;pwd=hunter2;y=2",
    ],
)
def test_no_form_of_a_url_shows_its_password(url: str) -> None:
    assert "hunter2" not in masked(url)
    assert has_password(url)
    assert "hunter2" in passwords(url)


def test_all_that_is_printed_goes_through_one_function() -> None:
    """Rich is used as `Screen` alone, whose texts are no markup."""
    for file in (ROOT / "evomerge").rglob("*.py"):
        calls = {node.func.id for node in ast.walk(ast.parse(file.read_text())) if is_call(node)}
        alone = {"printable.py": {"print"}, "chat_template.py": {"print"}}.get(file.name, set())
        assert calls & {"print", "Console"} <= alone, file
    screen = io.StringIO()
    console = Screen(file=screen, force_terminal=True, width=60)
    console.print(Text(f"a{EVIL}b", "bold"), f"[red]{EVIL}[/]", f":smile:{EVIL}")
    plain = re.sub("\x1b\\[[01]m", "", screen.getvalue())
    assert "[red]" in plain
    assert ":smile:" in plain
    assert not ACTS.search(plain)


def is_call(node: ast.AST) -> TypeGuard[Any]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 3},
        {"left": "soon"},
        {"name": 1, "points": [[1]]},
        {"beat": {}},
        {"pid": 0},
        {"pid": -1},
        {"pid": None},
        {"beat": float("nan")},
        {"trials": 10**400},
        {"limit": -1},
        {"used": {"seconds": "long"}},
        {"price": [1]},
    ],
)
def test_a_state_of_another_shape_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    """`tests/test_fuzz.py` tries many more, and draws those that are read."""
    whole = asdict(Snapshot("n"))
    others: list[Any] = [whole | change, [], None, 3, {}, {k: v for k, v in whole.items() if k != "beat"}]
    for content in others:
        (tmp_path / "state.json").write_text(json.dumps(content))
        assert read_snapshot(tmp_path) is None
    for content in (whole | {"of a later version": 1}, {k: whole[k] for k in ("name", "pid", "host", "beat")}):
        (tmp_path / "state.json").write_text(json.dumps(content))
        assert read_snapshot(tmp_path) == Snapshot("n", beat=whole["beat"])


def test_no_cell_of_a_csv_is_a_formula() -> None:
    names = ["=HYPERLINK(1)", "+1", "-1", "@x", "\ta", "plain-1", None]
    empty = {"trial": None, "recipe": None, "split": "search", "metric": "m", "item": "i", "score": -0.5}
    table = without_formulas(pa.Table.from_pylist([{**empty, "task": n} for n in names], COLUMNS))
    assert table["task"].to_pylist() == ["'=HYPERLINK(1)", "'+1", "'-1", "'@x", "'\ta", "plain-1", None]
    assert table["score"].to_pylist() == [-0.5] * 7
