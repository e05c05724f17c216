"""A search over a Ray cluster of two nodes, one of which dies; `make test-ray` installs Ray and runs this."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from searches import trials_of, verdict_of, write_config

ray = pytest.importorskip("ray", reason='Ray is not installed; `make test-ray` does it: pip install "evomerge[ray]"')
pytestmark = pytest.mark.slow

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray then keeps to 127.0.0.1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each, as processes of this machine."""
    for name, value in LOOPBACK.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


def search(cluster: Any, folder: Path, family: Path, trials: int) -> tuple[subprocess.Popen[str], Path]:
    config = write_config(folder, family, budget={"trials": trials})
    command = [sys.executable, "-m", "evomerge", "search", config, "--run", folder / "run"]
    command += ["--ray", cluster.address, "--workers", "2"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **LOOPBACK}, **streams), folder / "run"


def wait_for(text: str, run: Path, process: subprocess.Popen[str]) -> None:
    while not (run / "log.txt").exists() or text not in (run / "log.txt").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_a_search_uses_both_nodes_and_every_trial_can_be_repeated_alone(
    cluster: Any, tiny_family: Path, tmp_path: Path
) -> None:
    from searches import run_cli

    cluster.add_node(num_cpus=1)
    process, run = search(cluster, tmp_path, tiny_family, 24)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    trials = trials_of(run)
    assert [t[0] for t in trials] == list(range(24))
    assert {t[1] for t in trials} == {"COMPLETE"}
    assert verdict_of(run)["sentence"] in output
    for number in (3, 12, 23):
        again = run_cli("repeat", run, "--trial", str(number))
        assert again.returncode == 0, again.stdout + again.stderr


def test_the_search_goes_on_when_a_node_dies(cluster: Any, tiny_family: Path, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    process, run = search(cluster, tmp_path, tiny_family, 200)
    wait_for("trial 30 begins", run, process)
    cluster.remove_node(node, allow_graceful=False)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    assert [t[0] for t in trials_of(run)] == list(range(200))
    assert "worker" in (run / "log.txt").read_text()
    assert (run / "verdict.json").exists()


def test_a_cluster_made_for_the_search_listens_on_loopback_alone(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"trials": 5000})
    command = [sys.executable, "-m", "evomerge", "search", config, "--run", tmp_path / "run", "--ray", "local"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for("trial 10 begins", tmp_path / "run", process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    sockets = [s for p in family for s in p.net_connections("inet") if s.status == psutil.CONN_LISTEN]
    process.terminate()
    assert process.communicate(timeout=100)[0]
    assert process.returncode == 143
    assert sockets
    assert {s.laddr.ip.removeprefix("::ffff:") for s in sockets} == {"127.0.0.1"}


def test_an_address_without_a_cluster_is_one_error(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    command = [sys.executable, "-m", "evomerge", "search", config, "--run", tmp_path / "run", "--ray", "127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "--ray 127.0.0.1:9: no cluster can be reached there" in done.stderr
    assert "Traceback" not in done.stderr
