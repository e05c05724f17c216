"""`evomerge dashboard`: the study as it is, with the run's notes and files; nothing done there reaches the run."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from searches import ROOT, Started, finished_search, run_cli, start_cli, trials_of, write_config

from evomerge.report.dashboard import MISSING, Dashboard, StudyCopy
from evomerge.search.monitor.snapshot import read_snapshot
from evomerge.search.run import open_run

pytestmark = pytest.mark.more

there = importlib.util.find_spec("optuna_dashboard") is not None
needs_dashboard = pytest.mark.skipif(not there, reason="optuna-dashboard is not installed")


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_search(write_config(tmp_path_factory.mktemp("dashboard"), tiny_family, budget={"trials": 9}))


def address_of(started: Started) -> str:
    """The address that a dashboard prints when it is ready."""
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        started.out.flush()
        text = os.pread(started.out.fileno(), 10_000, 0).decode()
        if found := re.search(r"http://127\.0\.0\.1:\d+", text):
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"no address: {text}")


def ask(address: str, body: Any = None, method: str = "GET", host: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    if host is not None:
        request.add_header("Host", host)
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
    return json.loads(content) if content[:1] in (b"{", b"[") else content


def content_of(run: Path) -> dict[str, str]:
    """File -> a hash of its content; of the database of its rows, because SQLite moves pages when it is opened."""
    files = [p for p in run.iterdir() if p.is_file() and not p.name.startswith("study.db")]
    with sqlite3.connect(run / "study.db") as database:
        rows = "\n".join(database.iterdump())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files} | {"study": rows}


@needs_dashboard
def test_the_study_is_shown_as_it_is_and_stays_so_whatever_is_done_in_the_dashboard(finished: Path) -> None:
    before, trials = content_of(finished), trials_of(finished)
    started = start_cli("dashboard", finished, "--port", "0")
    base = address_of(started)
    (summary,) = ask(f"{base}/api/studies")["study_summaries"]
    assert summary["study_name"] == "small"
    study = ask(f"{base}/api/studies/{summary['study_id']}?after=0")
    shown = [(t["number"], t["state"].upper(), t.get("values")) for t in study["trials"]]
    assert shown == [(number, state, [value]) for number, state, _, value in trials]
    for trial, (_, _, parameters, _) in zip(study["trials"], trials, strict=True):
        assert {p["name"]: p["param_internal_value"] for p in trial["params"]} == parameters
    assert "Best on the search items" in study["note"]["body"]
    assert json.loads((finished / "verdict.json").read_text())["sentence"] in study["note"]["body"]
    names = {a["filename"]: a["artifact_id"] for a in study["artifacts"]}
    assert set(names) == {"report.html", "recommended.yaml", "winner.yaml", "verdict.json"}
    assert ask(f"{base}/artifacts/{summary['study_id']}/{names['report.html']}") == (
        (finished / "report.html").read_bytes()
    )
    (plot,) = [p for p in study["plotly_graph_objects"] if p["id"] == "tasks"]
    figure = json.loads(plot["graph_object"])
    assert [trace["name"] for trace in figure["data"]] == ["tiny_rev", "tiny_add"]
    attributes = {a["key"] for t in study["trials"] for a in t["user_attrs"]}
    assert {"baseline", "seconds", "tiny_rev gold_logprob"} <= attributes
    assert "record" not in attributes

    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(f"{base}/api/studies", host="elsewhere.example")
    assert refused.value.code == 403
    ask(f"{base}/api/studies/{summary['study_id']}", method="DELETE")
    assert ask(f"{base}/api/studies")["study_summaries"] == []

    os.kill(started.pid, signal.SIGINT)
    done = started.wait()
    assert (done.returncode, done.stderr) == (0, "")
    assert content_of(finished) == before
    assert trials_of(finished) == trials
    again = run_cli("resume", finished, "--trials", "10")
    assert again.returncode == 0, again.stderr


@needs_dashboard
def test_a_running_search_is_followed_and_not_disturbed(tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    search = start_cli("search", write_config(tmp_path, tiny_family, budget={"trials": 5000}), "--run", run)
    try:
        give_up = time.monotonic() + 300
        while time.monotonic() < give_up and ((seen := read_snapshot(run)) is None or seen.trials < 3):
            time.sleep(0.1)
        dashboard = Dashboard(open_run(run), tmp_path / "files")
        before = len(dashboard.copy.keys)
        assert before >= 3
        while len(trials_of(run)) < before + 5:
            time.sleep(0.1)
        dashboard.update()
        assert len(dashboard.copy.keys) >= before + 5
    finally:
        os.kill(search.pid, signal.SIGTERM)
        assert search.wait().returncode == 128 + signal.SIGTERM
    dashboard.update()
    copied = [(t.number, t.state.name, dict(t.params), t.value) for t in dashboard.copy.study.get_trials()]
    assert copied == trials_of(run)


def test_trials_that_end_in_another_order_keep_their_numbers(finished: Path) -> None:
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    study = optuna.create_study(direction="maximize")
    config = open_run(finished).config()
    copied = StudyCopy(study, config)
    first, second = (study.ask({"x": FloatDistribution(0, 1)}) for _ in range(2))
    assert copied.follow()
    study.tell(second, 2.0)
    assert copied.follow()
    study.add_trial(create_trial(value=3.0, params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}))
    study.tell(first, state=TrialState.FAIL)
    assert copied.follow()
    assert not copied.follow()
    assert [(t.state, t.value, t.params) for t in copied.study.trials] == [
        (t.state, t.value, t.params) for t in study.trials
    ]


@needs_dashboard
def test_a_taken_port_and_a_run_without_a_study_are_one_sentence(finished: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli("dashboard", finished, "--port", str(port))
    assert done.returncode == 2
    assert done.stderr == f"error: port {port} of 127.0.0.1: Address already in use; give another one with --port\n"
    empty = tmp_path / "run"
    empty.mkdir()
    shutil.copy(finished / "config.yaml", empty)
    done = run_cli("dashboard", empty, "--port", "0")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_without_the_extra_it_is_one_sentence(finished: Path) -> None:
    gone = "import sys\nsys.modules['optuna_dashboard'] = None\n"
    done = run_cli("dashboard", finished, prelude=gone)
    assert done.returncode == 2
    assert done.stderr == f"error: {MISSING}\n"


def test_the_extra_is_declared() -> None:
    assert "dashboard = [" in (ROOT / "pyproject.toml").read_text()
