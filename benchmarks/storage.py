"""What a trial costs at the end of a long study: to propose and to store it, and to open the study for a resume, beside
the floor, a synced write on the same disk.

python benchmarks/storage.py [--dimensions 24 --trials 10000] [--storage postgresql+psycopg://...] [--sampler tpe]
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
from cmaes import CMA, SepCMA
from optuna.trial import TrialState, create_trial

from evomerge.config.schema import SearchConfig
from evomerge.evaluate.signs import Signs
from evomerge.search.samplers.cmaes import SEPARABLE
from evomerge.search.space.space import Group, Space
from evomerge.search.storage import sql_statements
from evomerge.search.storage.database import open_study, sqlite_url, storage_of
from evomerge.search.storage.item_scores import pack
from evomerge.search.storage.optuna_private import key_of_study
from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.trial_record import RECORD, Seconds, TrialRecord

TASKS, ITEMS = 4, 60


def space_of(dimensions: int, sampler: str) -> Space:
    """A space of that many axes; only its shape matters here."""
    config = SearchConfig.model_validate(
        {
            "name": "x",
            "base": "b",
            "sources": [{"name": "a", "path": "a"}],
            "method": "linear",
            "tasks": [{"task": "t"}],
            "sampler": {"name": sampler},
        }
    )
    groups = tuple(Group("weight", f"s{k}", "default", "model", 0.0, 1.0, (f"w{k}",)) for k in range(dimensions))
    return Space(config, 1, groups)


def record(rng: np.random.Generator) -> TrialRecord:
    """What a search stores with a trial: item scores without any pattern, the worst case for their packing."""
    scores = {f"task{k}": {"gold_logprob": pack(rng.normal(size=ITEMS))} for k in range(TASKS)}
    seconds = Seconds(*[0.123456789] * len(fields(Seconds)))
    return TrialRecord(items="0" * 16, scores=scores, signs=Signs(1.23456789, 0.123456789), seconds=seconds)


def points(dimensions: int, trials: int) -> Iterator[tuple[list[float], float]]:
    """Points in the unit cube and their values, as CMA-ES goes through them."""
    kind = SepCMA if dimensions > SEPARABLE else CMA
    optimizer = kind(mean=np.full(dimensions, 0.5), sigma=0.2, bounds=np.tile([0.0, 1.0], (dimensions, 1)), seed=0)
    told = 0
    while told < trials:
        generation = [optimizer.ask() for _ in range(optimizer.population_size)]
        values = [float(((x - 0.3) ** 2).sum()) for x in generation]
        optimizer.tell(list(zip(generation, values, strict=True)))
        told += len(generation)
        yield from ((x.tolist(), -value) for x, value in zip(generation, values, strict=True))


def build(study: optuna.Study, space: Space, trials: int) -> None:
    """Fill a study with finished trials, all in one transaction."""
    rng = np.random.default_rng(0)
    axes = space.distributions
    with storage_of(study).engine.begin() as connection:
        for number, (point, value) in zip(range(trials), points(len(axes), trials), strict=False):
            params = dict(zip(axes, point, strict=True))
            trial = create_trial(state=TrialState.RUNNING, params=params, distributions=axes)
            trial.number = number
            key = sql_statements.begin_trial(connection, key_of_study(study), trial, again=False)
            attributes = {RECORD: replace(record(rng), order=number).to_json()}
            sql_statements.finish_trial(connection, key, value, attributes, again=False)


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
    parser.add_argument("--trials", type=int, default=10_000, help="how many there are before the timed ones")
    parser.add_argument("--timed", type=int, default=100)
    parser.add_argument("--sampler", default="cma-es")
    parser.add_argument("--storage", help="a database for a study of its own (default: an SQLite file, deleted again)")
    arguments = parser.parse_args()
    space = space_of(arguments.dimensions, arguments.sampler)
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {"propose": [], "store that it begins": [], "store its result": [], "floor": []}
    busy: list[float] = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        url = arguments.storage or sqlite_url(folder / "study.db")
        build(open_study(url, "benchmark", create=True), space, arguments.trials)
        start, used = time.perf_counter(), time.process_time()
        study = SearchStudy(open_study(url, "benchmark", create=True), space)
        opened, opened_cpu = time.perf_counter() - start, time.process_time() - used
        proposed = study.begin(None)
        replayed, replayed_cpu = time.perf_counter() - start - opened, time.process_time() - used - opened_cpu
        study.finish(proposed, 0.0, record(rng))
        study.storage.begin_trial = timed(study.storage.begin_trial, times["store that it begins"])
        for number in range(arguments.timed):
            content = record(rng)
            start, used = time.perf_counter(), time.process_time()
            begun = study.begin(None)
            middle = time.perf_counter()
            study.finish(begun, float(number % 7), content)
            times["propose"].append(middle - start - times["store that it begins"][-1])
            times["store its result"].append(time.perf_counter() - middle)
            busy.append(time.process_time() - used)
            times["floor"].append(synced_write(folder))
        dialect = study.storage.engine.dialect.name
        if arguments.storage:
            optuna.delete_study(study_name="benchmark", storage=url)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"Optuna {optuna.__version__}, SQLAlchemy {sqlalchemy.__version__}, {dialect}"
    )
    print(f"{arguments.dimensions} dimensions, {arguments.trials} trials before, {TASKS} x {ITEMS} item scores a trial")
    print(f"open to resume {opened:.2f} s, of it computing {opened_cpu:.2f} s")
    print(f"first proposal (it replays the study) {replayed:.2f} s, of it computing {replayed_cpu:.2f} s")
    floor = statistics.median(times["floor"])
    times["all of a trial"] = [sum(t) for t in zip(*(v for k, v in times.items() if k != "floor"), strict=True)]
    for what, values in times.items():
        middle, late = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        print(f"{what:22s} {middle * 1e3:8.2f} ms (95%: {late * 1e3:7.2f} ms)   {middle / floor:6.2f} x floor")
    print(f"{'of it computing':22s} {statistics.median(busy) * 1e3:8.2f} ms")


def timed(work, seconds):  # type: ignore[no-untyped-def]
    """`work`, with the seconds of each call added to a list."""

    def call(*arguments):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        found = work(*arguments)
        seconds.append(time.perf_counter() - start)
        return found

    return call


if __name__ == "__main__":
    main()
