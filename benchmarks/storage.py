"""What it costs to propose and store a trial, beside the floor: one synced write of the same machine.

python benchmarks/storage.py [--dimensions 24] [--trials 100]
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import optuna

from evomerge.config.schema import SearchConfig
from evomerge.search.scores import pack
from evomerge.search.space import Group, Space
from evomerge.search.study import SearchStudy, open_study, sqlite_url


def space_of(dimensions: int) -> Space:
    """A space of that many axes; only its shape matters here."""
    config = SearchConfig.model_validate(
        {
            "name": "x",
            "base": "b",
            "sources": [{"name": "a", "path": "a"}],
            "method": "linear",
            "tasks": [{"task": "t"}],
        }
    )
    groups = tuple(Group("weight", f"s{k}", "default", "model", 0.0, 1.0, (f"w{k}",)) for k in range(dimensions))
    return Space(config, 1, groups)


def synced_write(folder: Path) -> float:
    """Seconds for a write of 4 KB and an fsync."""
    start = time.perf_counter()
    with (folder / "floor").open("ab") as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimensions", type=int, default=24)
    parser.add_argument("--trials", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        study = SearchStudy(
            open_study(sqlite_url(folder / "study.db"), "x", create=True), space_of(arguments.dimensions)
        )
        record = {"items": "0" * 16, "scores": {f"task{k}": {"acc": pack([0.123456789] * 60)} for k in range(4)}}
        proposed, stored, floor = [], [], []
        for number in range(arguments.trials):
            start = time.perf_counter()
            begun = study.begin(None)
            middle = time.perf_counter()
            study.finish(begun, float(number % 7), record)
            proposed.append(middle - start)
            stored.append(time.perf_counter() - middle)
            floor.append(synced_write(folder))
    floor_ms = statistics.median(floor) * 1e3
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, Optuna {optuna.__version__}"
    )
    print(f"{arguments.dimensions} dimensions, {arguments.trials} trials, SQLite, medians")
    for name, values in (
        ("propose and begin", proposed),
        ("store the result", stored),
        ("synced write (floor)", floor),
    ):
        ms = statistics.median(values) * 1e3
        print(f"{name:22s} {ms:8.2f} ms   {ms / floor_ms:6.2f} x floor")


if __name__ == "__main__":
    main()
