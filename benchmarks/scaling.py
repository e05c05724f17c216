"""What many workers cost: idle accelerators, results that no distribution learns from, trials that lead less far.

A discrete-event simulation of 1 to 64 workers around the real study (SQLite) and the real CMA-ES.  Trial times are
drawn from a recorded run, scaled to a given median; the driver serves one result after the other, and the time that
proposing and storing really take here passes in the simulation too.  The objective is a rotated quadratic of condition
100 with noise.  Beside it Optuna's own CmaEsSampler under the same trial times, start and first step size.

python benchmarks/scaling.py runs/quickstart [--median 30] [--trials 800] [--dimensions 24] [--seeds 3]
python benchmarks/scaling.py runs/quickstart --real [--trials 200]

The second form searches anew, for real, with one and with two workers of this machine.
"""

import argparse
import heapq
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import TrialState
from storage import space_of

from evomerge.config.config_file import write_config
from evomerge.config.running import SamplerConfig
from evomerge.search.run import Run, open_run
from evomerge.search.samplers.cmaes import GENERATION, CmaEsSampler
from evomerge.search.space.space import Point
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.item_scores import pack
from evomerge.search.storage.study import Begun, SearchStudy, in_full, trial_seconds
from evomerge.search.storage.trial_record import TrialRecord

WORKERS = (1, 2, 4, 8, 16, 64)
Answer = TypeVar("Answer")
STEP = 0.2  # sigma0 of both
RECORD = TrialRecord(items="0" * 16, scores={f"task{k}": {"acc": pack([0.123456789] * 60)} for k in range(4)})


class Driver(Protocol):
    def begin(self) -> tuple[int, Point]: ...
    def finish(self, number: int, value: float) -> None: ...
    def unused(self) -> int: ...


class Ours:
    """The study as a search keeps it."""

    def __init__(self, folder: Path, dimensions: int, workers: int, seed: int) -> None:
        space = space_of(dimensions)
        config = space.config.model_copy(update={"seed": seed, "sampler": SamplerConfig(sigma0=STEP)})
        stored = open_study(sqlite_url(folder / "study.db"), "x", create=True)
        self.study = SearchStudy(stored, replace(space, config=config), workers)
        self.hand: dict[int, Begun] = {}

    def begin(self) -> tuple[int, Point]:
        begun = self.study.begin(None)
        self.hand[begun.number] = begun
        return begun.number, begun.params

    def finish(self, number: int, value: float) -> None:
        self.study.finish(self.hand.pop(number), value, RECORD)

    def unused(self) -> int:
        sampler = self.study.sampler(0)
        assert isinstance(sampler, CmaEsSampler)
        sampler.distribution_mean(self.study.mirror)
        return len(self.study.finished) - sampler.told - len(sampler.group)


class Optunas:
    """Optuna's sampler on a study in memory."""

    def __init__(self, dimensions: int, seed: int) -> None:
        self.axes = space_of(dimensions).distributions
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sigma0 is deprecated and without a successor
            sampler = optuna.samplers.CmaEsSampler(seed=seed, sigma0=STEP)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)

    def begin(self) -> tuple[int, Point]:
        trial = self.study.ask(self.axes)
        return trial.number, trial.params

    def finish(self, number: int, value: float) -> None:
        self.study.tell(number, value)

    def unused(self) -> int:
        """Results beyond the population of a generation that is over, and those drawn before there was one."""
        trials = self.study.get_trials(deepcopy=False)
        size = 4 + int(3 * np.log(len(self.axes)))
        last = max(t.system_attrs.get(GENERATION, 0) for t in trials)
        drawn = Counter(t.system_attrs.get(GENERATION) for t in trials if t.state == TrialState.COMPLETE)
        return sum(n if g is None else max(0, n - size) for g, n in drawn.items() if g is None or g < last)


class Quadratic:
    """A value to maximise; `loss` is the part without noise, 1 in the middle of the cube."""

    def __init__(self, dimensions: int, seed: int) -> None:
        rng = np.random.RandomState(seed)
        self.best = rng.uniform(0.2, 0.8, dimensions)
        self.turn = np.linalg.qr(rng.randn(dimensions, dimensions))[0]
        self.scale = 100 ** np.linspace(0, 1, dimensions)
        self.noise = np.random.RandomState(seed + 1)
        self.unit = 1.0
        self.unit = self.loss(np.full(dimensions, 0.5))

    def loss(self, x: NDArray[np.float64]) -> float:
        return float(np.sum(self.scale * (self.turn @ (x - self.best)) ** 2)) / self.unit

    def value(self, loss: float) -> float:
        return -loss + 0.01 * self.noise.randn()


class Outcome(NamedTuple):
    """utilisation: share of the workers' time spent on trials.  driver: seconds per trial.  unused: share of the
    results.  losses: of all results in their order."""

    utilisation: float
    driver: float
    unused: float
    losses: list[float]


@dataclass
class Clock:
    """The driver's time: it serves one request after the other, and takes as long as it really does."""

    free: float = 0.0
    spent: float = 0.0

    def serve(self, now: float, work: Callable[[], Answer]) -> Answer:
        started = time.perf_counter()
        answer = work()
        seconds = time.perf_counter() - started
        self.free = max(self.free, now) + seconds
        self.spent += seconds
        return answer


def simulate(
    driver: Driver, workers: int, trials: int, times: NDArray[np.float64], problem: Quadratic, seed: int
) -> Outcome:
    """Until that many results have come.  times: (n,) seconds to draw a trial's time from."""
    rng = np.random.RandomState(seed + 2)
    clock = Clock()
    hand: list[tuple[float, int, float, float]] = []  # end, number, start, loss
    losses: list[float] = []
    busy = now = 0.0
    while True:
        while len(hand) < workers:
            number, point = clock.serve(now, driver.begin)
            loss = problem.loss(np.array([*point.values()]))
            heapq.heappush(hand, (clock.free + rng.choice(times), number, clock.free, loss))
        now, number, start, loss = heapq.heappop(hand)
        busy += now - start
        losses.append(loss)
        clock.serve(now, partial(driver.finish, number, problem.value(loss)))
        if len(losses) == trials:
            busy += sum(max(0.0, now - start) for _, _, start, _ in hand)
            return Outcome(busy / (workers * now), clock.spent / trials, driver.unused() / trials, losses)


def level(outcomes: list[Outcome]) -> NDArray[np.float64]:
    """The loss of the best trial so far, after each trial: the geometric mean over the seeds."""
    best: NDArray[np.float64] = np.minimum.accumulate([o.losses for o in outcomes], axis=1)
    return np.exp(np.mean(np.log(best), axis=0))


def efficiency(outcomes: list[Outcome], one: list[Outcome]) -> float:
    """How many trials one worker needs for what these reached, as a share of theirs; 1 if it did not get further."""
    there, reference = level(outcomes)[-1], level(one)
    return 1.0 if there <= reference[-1] else int(np.argmax(reference <= there) + 1) / len(reference)


def tail(outcomes: list[Outcome]) -> float:
    """The mean loss of the last tenth of the trials: where the distribution has come to."""
    return statistics.median(float(np.mean(o.losses[-len(o.losses) // 10 :])) for o in outcomes)


def search_for_real(run: Run, workers: int, trials: int, folder: Path) -> tuple[float, float]:
    """The search of a run anew; sampled trials a minute, from the first one's start to the last one's end, and the
    best value."""
    config = run.config().model_copy(update={"storage": None})
    write_config(folder / "search.yaml", config)
    command = [sys.executable, "-m", "evomerge", "search", folder / "search.yaml", "--run", folder / "run"]
    subprocess.run(
        [*command, "--workers", str(workers), "--trials", str(trials)], check=True, stdout=subprocess.DEVNULL
    )
    study = open_run(folder / "run").study()
    sampled = [t for t in study.get_trials(deepcopy=False) if "baseline" not in t.user_attrs]
    first = min(t.datetime_start for t in sampled if t.datetime_start)
    last = max(t.datetime_complete for t in sampled if t.datetime_complete)
    best = max(t.value for t in sampled if t.value is not None and in_full(t))
    return 60 * len(sampled) / (last - first).total_seconds(), best


def real(run: Run, trials: int) -> None:
    print(f"{trials} trials, baselines included; {os.cpu_count()} cores")
    print("| workers | sampled trials a minute | x one worker | best value |\n|---|---|---|---|")
    one = 0.0
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            rate, best = search_for_real(run, workers, trials, Path(folder))
        one = one or rate
        print(f"| {workers} | {rate:.0f} | {rate / one:.2f} | {best:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run whose trial times are drawn from")
    parser.add_argument("--median", type=float, default=30.0, help="seconds")
    parser.add_argument("--trials", type=int, default=800)
    parser.add_argument("--dimensions", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="search for real with one and two workers")
    arguments = parser.parse_args()
    if arguments.real:
        real(open_run(arguments.run), arguments.trials)
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run = open_run(arguments.run)
    times = np.array([t for t in map(trial_seconds, run.study().get_trials(deepcopy=False)) if t > 0])
    times *= arguments.median / np.median(times)
    low, high = np.percentile(times, (5, 95))
    print(f"{len(times)} recorded trials scaled to a median of {arguments.median:g} s (5% {low:.0f}, 95% {high:.0f})")
    print(f"{arguments.dimensions} dimensions, {arguments.trials} trials, {arguments.seeds} seeds")
    print("| workers | busy | driver, ms a trial | unused | best loss | efficiency | last tenth | ", end="")
    print("Optuna: unused | best loss | efficiency | last tenth |\n" + "|---" * 11 + "|")
    one: list[Outcome] = []
    for workers in WORKERS:
        ours, optunas = [], []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory(dir=".") as folder:
                driver = Ours(Path(folder), arguments.dimensions, workers, seed)
                problem = Quadratic(arguments.dimensions, seed)
                ours.append(simulate(driver, workers, arguments.trials, times, problem, seed))
            problem = Quadratic(arguments.dimensions, seed)
            other = Optunas(arguments.dimensions, seed)
            optunas.append(simulate(other, workers, arguments.trials, times, problem, seed))
        one = one or ours
        busy = statistics.median(o.utilisation for o in ours)
        driver_ms = statistics.median(o.driver for o in ours) * 1e3
        cells = [str(workers), f"{busy:.1%}", f"{driver_ms:.1f}"]
        for found in (ours, optunas):
            cells.append(f"{statistics.median(o.unused for o in found):.1%}")
            cells += [f"{level(found)[-1]:.4f}", f"{efficiency(found, one):.2f}", f"{tail(found):.4f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
