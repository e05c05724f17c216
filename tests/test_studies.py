"""The command that lists a database's studies."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from postgres import running_server
from test_storage import space_of

from evomerge.cli import main
from evomerge.config.database_url import has_password
from evomerge.errors import EvomergeError
from evomerge.report.studies import read_studies, url_of
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.study_lease import LEASE, acquire_lease
from evomerge.search.storage.trial_record import TrialRecord


def fill(url: str) -> None:
    """Two studies: one in use with trials of every kind, one empty."""
    study = SearchStudy(open_study(url, "busy", create=True), space_of(sampler="random"))
    told = [
        (0.25, TrialRecord()),
        (0.75, TrialRecord(partial=0.5)),
        (0.5, TrialRecord()),
        (0.9, TrialRecord(broken="x")),
        (None, TrialRecord(reason="y")),
    ]
    for value, record in told:
        study.finish(study.begin(None), value, record)
    study.begin(None)
    acquire_lease(study.stored)
    open_study(url, "empty", create=True)


def shown(place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["evomerge", "studies", "--storage", place])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, 2)
    out = capsys.readouterr()
    assert (end.value.code == 2) == out.err.startswith("error: ")
    return out.out + out.err


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_studies_are_listed(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server() if database == "postgresql" else nullcontext() as server:
        url = server.url if server else sqlite_url(tmp_path / "study.db")
        fill(url)
        busy, empty = read_studies(url)
        assert (empty.name, empty.counts, empty.best, empty.state, empty.last) == ("empty", {}, None, "idle", None)
        assert {state.name: n for state, n in busy.counts.items()} == {"COMPLETE": 4, "FAIL": 1, "RUNNING": 1}
        assert busy.best == 0.5
        assert busy.holder is not None
        assert busy.state == f"running on {busy.holder.host}"
        assert busy.last is not None
        text = shown(url, capsys, monkeypatch)
        assert " ".join(text.replace("│", " ").split()).count(f"busy 5 1 1 0.5000 running on {busy.holder.host}") == 1


def test_a_file_and_a_holder_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    fill(sqlite_url(file))
    study = open_study(sqlite_url(file), "busy", create=False)
    holder = read_studies(str(file))[0].holder
    assert holder is not None
    for other, state in (
        (replace(holder, started=1), f"idle (process {holder.pid} on {holder.host} died)"),
        (replace(holder, machine="far", host="far", clock=holder.clock - 3600), "no news from far for 60 minutes"),
        (replace(holder, machine="far", host="far"), "running on far"),
    ):
        study.set_user_attr(LEASE, json.loads(other.text))
        assert read_studies(str(file))[0].state == state


@pytest.mark.parametrize(
    "place", ["nowhere.db", "sqlite:///nowhere.db", "postgresql+psycopg://me:topsecret@127.0.0.1:1/x", "what://x", "."]
)
def test_a_wrong_place_is_one_message(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = shown(place, capsys, monkeypatch)
    assert text.startswith("error: ")
    assert "topsecret" not in text
    assert text.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_text_of_the_product_shows_a_password_in_a_url() -> None:
    root = Path(__file__).resolve().parent.parent
    files = [root / "README.md", root / "CHANGELOG.md"]
    for folder, pattern in (
        ("evomerge", "*.py"),
        ("docs", "*.md"),
        ("examples", "*"),
        ("configs", "*"),
        ("benchmarks", "*.py"),
    ):
        files += [f for f in (root / folder).rglob(pattern) if f.is_file() and f.suffix != ".pyc"]
    for file in files:
        for url in re.findall(r"[\w+]+://[^\s`'\"]+", file.read_text(encoding="utf-8", errors="replace")):
            assert not has_password(url), f"{file}: {url}"


def test_a_variable_of_the_environment_stands_for_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "a b")
    assert url_of("postgresql://me:${SECRET}@host/db") == "postgresql://me:a%20b@host/db"
    monkeypatch.delenv("SECRET")
    with pytest.raises(EvomergeError, match="'SECRET' is not set"):
        url_of("postgresql://me:${SECRET}@host/db")
