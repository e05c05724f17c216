"""Whole searches on the device: one that is repeated, one whose worker is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from gpu_steps.bench import Bench

TASKS = Path(__file__).resolve().parents[2] / "evals" / "tiny"


def write_config(bench: Bench, name: str, sizes: dict[str, int]) -> Path:
    """A search of the tiny family."""
    family = bench.wait_for_family()
    skills = ["rev", "add"] if bench.small else ["rev", "sort", "count", "add"]
    config = {
        "name": name,
        "base": str(family / "base"),
        "sources": [{"name": s, "path": str(family / s)} for s in skills],
        "method": "ties",
        "space": {"weight": [0.0, 2.0], "density": 0.6},
        "tasks": [{"task": str(TASKS / f"{s}.yaml"), "objective": "gold_logprob"} for s in skills],
        "splits": sizes,
        "device": str(bench.device),
        "dtype": "float32",
    }
    file = bench.work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def searched(bench: Bench) -> None:
    """The tiny family's search, and two of its trials once more."""
    from evomerge.cli import main
    from evomerge.search.models import open_config_models
    from evomerge.search.repeat import repeat
    from evomerge.search.run import open_run
    from evomerge.search.space.space import build_space
    from evomerge.search.storage.study import SearchStudy

    count = 8 if bench.small else 160
    file = write_config(bench, "search", dict.fromkeys(("search", "selection", "holdout"), count))
    folder = bench.work / "search"
    trials = 8 if bench.small else 60
    sys.argv = ["evomerge", "search", str(file), "--trials", str(trials), "--run", str(folder)]
    started = time.perf_counter()
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"evomerge search ended with {end.code}") from end
    bench.report(f"search of {trials} trials", time.perf_counter() - started, "s", ok=True)
    run = open_run(folder)
    config = run.config()
    study = SearchStudy(run.study(), build_space(config, open_config_models(config)))
    sampled = [t.number for t in study.finished if "baseline" not in t.user_attrs and t.value is not None]
    for number in (sampled[0], sampled[-1]):
        found = repeat(run, number)
        same = found.differing == 0 and found.values[0] == found.values[1]
        bench.report(
            f"trial {number} repeated: item scores that differ", f"{found.differing} of {found.items}", ok=same
        )


def killed(bench: Bench) -> None:
    """Two workers on one device; one is killed in the midst of the search, which ends all the same."""
    count = 8 if bench.small else 150
    file = write_config(bench, "workers", dict.fromkeys(("search", "selection", "holdout"), count))
    folder = bench.work / "workers"
    trials = 6 if bench.small else 60
    command = [sys.executable, "-m", "evomerge", "search", str(file), "--workers", "2", "--trials", str(trials)]
    started = time.perf_counter()
    with subprocess.Popen([*command, "--run", str(folder)]) as driver:
        try:
            victim = a_worker(driver)
            log = folder / "log.txt"
            while driver.poll() is None and "trial" not in (log.read_text() if log.exists() else ""):
                time.sleep(0.1)
            os.kill(victim, signal.SIGKILL)
            code = driver.wait()
        finally:
            if driver.poll() is None:
                driver.kill()
    bench.report(f"search of {trials} trials by two workers", time.perf_counter() - started, "s", ok=code == 0)
    died = "SIGKILL" in log.read_text()
    bench.report("the killed worker was replaced", died, ok=died)


def a_worker(driver: "subprocess.Popen[bytes]") -> int:
    """The process id of one of a driver's workers, as soon as there are two."""
    while driver.poll() is None:
        found = []
        for child in Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split():
            if b"evomerge.search.workers.process_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        if len(found) > 1:
            return found[0]
        time.sleep(0.1)
    raise RuntimeError(f"the search ended with {driver.returncode} before it had two workers")
