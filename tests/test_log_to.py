"""`log_to`: trials arrive in other programs, a resume continues the same run there, and nothing there ends a search."""

import importlib.util
import json
import os
import socket
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from searches import run_cli, trials_of, write_config

from evomerge.config.config_file import load_config
from evomerge.search.monitor import trackers
from evomerge.search.monitor.snapshot import Coefficients
from evomerge.search.monitor.trackers import Trackers
from evomerge.search.run import Run

pytestmark = pytest.mark.more


def needs(package: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


def prelude(**variables: str) -> str:
    return f"import os\nos.environ.update({variables!r})\n"


def search_and_resume(folder: Path, family: Path, name: str, variables: dict[str, str]) -> Path:
    sampler = {"name": "auto", "steps": 6}
    config = write_config(folder, family, budget={"trials": 10}, log_to=name, sampler=sampler)
    run = folder / "run"
    for command in (("search", config, "--run", run), ("resume", run, "--trials", "12")):
        done = run_cli(*command, prelude=prelude(**variables))
        assert done.returncode == 0, done.stderr
    log = (run / "log.txt").read_text()
    assert "log_to" not in log, log
    return run


@needs("mlflow")
def test_mlflow_has_every_trial_once_and_one_run(tiny_family: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = search_and_resume(tmp_path, tiny_family, "mlflow", {"MLFLOW_TRACKING_URI": store})
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    found = client.get_experiment_by_name("small")
    assert found is not None
    (external,) = client.search_runs([found.experiment_id])
    assert external.info.run_id == json.loads((run / "log_to.json").read_text())["mlflow"]
    assert external.info.status == "FINISHED"
    assert external.data.params["sources"] == "rev, add"
    trials = trials_of(run)
    values = {m.step: m.value for m in client.get_metric_history(external.info.run_id, "value")}
    numbers = {m.step: int(m.value) for m in client.get_metric_history(external.info.run_id, "trial")}
    assert sorted(numbers.values()) == [number for number, *_ in trials]
    assert len(values) >= 4
    for step, value in values.items():
        assert value == pytest.approx(trials[numbers[step]][3])
    best = [m.value for m in client.get_metric_history(external.info.run_id, "best")]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(max(values.values()))
    assert len(client.get_metric_history(external.info.run_id, "gradient/value")) >= 1
    names = set(external.data.metrics)
    assert {"task/tiny_rev/gold_logprob", "coefficient/weight/rev", "coefficient/weight/add", "seconds"} <= names


@needs("trackio")
def test_trackio_has_every_trial_once_and_one_run(tiny_family: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trackio"
    run = search_and_resume(tmp_path, tiny_family, "trackio", {"TRACKIO_DIR": str(folder)})
    (file,) = folder.glob("small*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, *_ in rows} == {json.loads((run / "log_to.json").read_text())["name"]}
    logged = [json.loads(metrics) for _, _, metrics in rows]
    trials = [values for values in logged if "trial" in values]
    assert sorted(int(values["trial"]) for values in trials) == [number for number, *_ in trials_of(run)]
    assert any("gradient/value" in values for values in logged)
    assert all("coefficient/weight/rev" in values for values in trials)


@needs("wandb")
def test_wandb_offline_takes_every_trial(tiny_family: Path, tmp_path: Path) -> None:
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "wandb")}
    (tmp_path / "wandb").mkdir()
    search_and_resume(tmp_path, tiny_family, "wandb", variables)
    assert len(list((tmp_path / "wandb").rglob("run-*.wandb"))) == 2, "one file a session"


def test_a_program_that_is_not_installed_is_an_error_before_the_search_and_a_line_in_a_resume(
    tiny_family: Path, tmp_path: Path
) -> None:
    gone = "import evomerge.search.monitor.trackers as t\nt.PACKAGES['wandb'] = ('no_such_module', 'wandb')\n"
    config = write_config(tmp_path, tiny_family, budget={"trials": 6}, log_to=["wandb"])
    done = run_cli("search", config, "--run", tmp_path / "run", prelude=gone)
    assert done.returncode == 2
    assert done.stderr == "error: log_to: wandb: it is not installed; pip install wandb, or leave it out of `log_to`\n"
    assert not (tmp_path / "run").exists()
    plain = write_config(tmp_path, tiny_family, budget={"trials": 6})
    assert run_cli("search", plain, "--run", tmp_path / "run").returncode == 0
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text() + "log_to: [wandb]\n")
    (tmp_path / "search.yaml").unlink()
    done = run_cli("resume", tmp_path / "run", "--trials", "7", prelude=gone)
    assert done.returncode == 0, done.stderr
    assert "log_to wandb is off: it is not installed" in (tmp_path / "run" / "log.txt").read_text()


def opened(folder: Path, family: Path, name: str) -> Trackers:
    return Trackers(Run(folder), load_config(write_config(folder, family, log_to=name)))


def send(to: Trackers, count: int) -> None:
    for number in range(count):
        to.trial(number + 1, number, 0.5, 0.5, 1.0, 0.1, {}, [Coefficients("weight", "rev", 1.0, 1.0, 1.0)])


@needs("mlflow")
def test_a_server_that_is_not_there_is_one_line(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    to = opened(tmp_path, tiny_family, "mlflow")
    send(to, 3)
    to.threads[0].thread.join(60)
    send(to, 3)
    to.close(ended=True)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 1
    assert "log_to mlflow is off: " in lines[0]
    assert "secret" not in lines[0]


@needs("mlflow")
def test_a_server_that_hangs_keeps_nothing_waiting(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setattr(trackers, "CLOSING", 0.5)
        monkeypatch.setattr(trackers, "WAITING", 5)
        to = opened(tmp_path, tiny_family, "mlflow")
        began = time.monotonic()
        send(to, 20)
        to.close(ended=True)
        assert time.monotonic() - began < 5
    assert (tmp_path / "log.txt").read_text().count("log_to mlflow is off: it is 5 entries behind") == 1


def test_without_log_to_there_is_no_thread_and_no_file(tiny_family: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    to = Trackers(Run(tmp_path), load_config(write_config(tmp_path, tiny_family)))
    send(to, 2)
    to.close(ended=True)
    assert not to
    assert threading.active_count() == before
    assert os.listdir(tmp_path) == ["search.yaml"]


class Broken:
    """A program that wants to end the process."""

    def open(self, run: trackers.ExternalRun) -> str | None:
        raise SystemExit(7)

    def log(self, values: Any, step: int) -> None: ...

    def close(self, ended: bool) -> None: ...


def test_a_program_that_wants_to_end_the_search_is_one_line_and_a_damaged_file_of_names_is_made_anew(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.BACKENDS, "trackio", Broken)
    monkeypatch.setitem(trackers.PACKAGES, "trackio", ("json", "trackio"))
    (tmp_path / "log_to.json").write_text("{")
    to = opened(tmp_path, tiny_family, "trackio")
    to.threads[0].thread.join(10)
    assert json.loads((tmp_path / "log_to.json").read_text())["name"].startswith(tmp_path.name)
    assert "log_to trackio is off: SystemExit: 7" in (tmp_path / "log.txt").read_text()
