"""What commands cost on a run with a long study: CPU time and peak memory, beside the same run when it was short.

    python examples/tiny/make.py runs/tiny
    python benchmarks/long_study.py runs/long [--trials 20000]

The run is a real search of the tiny family, 24 coefficients, four tasks with 60 items each by objective and metric.
Then its study is made longer: copies of its sampled trials, with item scores of their own, all of which ended.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial
from results import ROOT

from evomerge.search.run import open_run
from evomerge.search.storage import sql_statements
from evomerge.search.storage.database import storage_of
from evomerge.search.storage.item_scores import pack, unpack
from evomerge.search.storage.optuna_private import key_of_study
from evomerge.search.storage.trial_record import RECORD, TrialRecord, record_of

HIGH = 2.0  # bound of a weight
FIRST = 40  # trials of the real search


def cost(*arguments: str | Path) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of a command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {started.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def make(folder: Path, trials: int) -> None:
    """A finished search."""
    config = yaml.safe_load((ROOT / "benchmarks" / "tiny24.yaml").read_text(encoding="utf-8"))
    named = [(s, "path") for s in config["sources"]] + [(t, "task") for t in config["tasks"]]
    for entry, key in [(config, "base"), *named]:
        entry[key] = str((ROOT / "benchmarks" / entry[key]).resolve())
    for task in config["tasks"]:
        del task["objective"]  # as searches usually are: by the metric too
    config |= {"splits": {"search": 60, "selection": 20, "holdout": 20}, "budget": {"trials": trials}}
    config |= {"sampler": {"name": "cma-es"}, "name": "long"}
    file = folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    cost("search", file, "--run", folder)


def lengthen(folder: Path, trials: int) -> None:
    """Give a run's study as many trials, in one transaction."""
    rng = np.random.default_rng(0)
    study = open_run(folder).study()
    there = study.get_trials(deepcopy=False)
    models = [t for t in there if "baseline" not in t.user_attrs and t.state == TrialState.COMPLETE]
    with storage_of(study).engine.begin() as connection:
        for number in range(len(there), trials):
            trial, record, value = another(models[number % len(models)], number, rng)
            key = sql_statements.begin_trial(connection, key_of_study(study), trial, again=False)
            sql_statements.finish_trial(connection, key, value, {RECORD: record.to_json()}, again=False)


def another(like: FrozenTrial, number: int, rng: np.random.Generator) -> tuple[FrozenTrial, TrialRecord, float]:
    """A trial near another one, its record and its value, which is a little worse."""
    params = {name: float(np.clip(x + rng.normal(0, 0.05), 0.0, HIGH)) for name, x in like.params.items()}
    trial = create_trial(
        state=TrialState.RUNNING, params=params, distributions=like.distributions, system_attrs=like.system_attrs
    )
    trial.number = number
    record = record_of(like)
    scores = {
        task: {
            metric: pack(unpack(text) if i else unpack(text) - abs(rng.normal(0, 0.3, len(unpack(text)))))
            for i, (metric, text) in enumerate(metrics.items())
        }
        for task, metrics in record.scores.items()
    }
    return trial, replace(record, scores=scores, order=number), float(like.value or 0.0) - abs(rng.normal(0, 0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs; made if it is not there")
    parser.add_argument("--trials", type=int, default=20_000)
    arguments = parser.parse_args()
    short, long = arguments.folder / "short", arguments.folder / f"long-{arguments.trials}"
    if not short.exists():
        make(short, FIRST)
    if not long.exists():
        shutil.copytree(short, long)
        lengthen(long, arguments.trials)
    print("| trials | | CPU s | MB |\n|---|---|---|---|")
    for kept, trials in ((short, FIRST), (long, arguments.trials)):
        run = arguments.folder / "used"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(kept, run)
        for name, *options in (("status",), ("report",), ("resume", "--trials", str(trials + 2))):
            seconds, memory = cost(name, run, *options)
            print(f"| {trials} | {name} | {seconds:.1f} | {memory:.0f} |", flush=True)
    print(json.dumps({"bytes": (long / "study.db").stat().st_size}))


if __name__ == "__main__":
    main()
