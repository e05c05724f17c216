"""CMA-ES with and without a covariance, by the number of coefficients: time and memory, and what each finds.

    python benchmarks/wide.py costs       # CPU time of a proposal and of a resume, peak memory; each in its own process
    python benchmarks/wide.py quality     # three quadratics: by how much the best trial is better than the start
    python benchmarks/wide.py mixed       # both for coefficients beside one choice of three values

Quadratics on the unit cube, with the optimum at a random point and the start 0.15 beside it in every coordinate.
`equal`: every coordinate counts alike; `unequal`: up to 100 times; `turned`: the same along random directions.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import optuna
from cmaes import CMA
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from results import interval

from evomerge.search.samplers import cmaes
from evomerge.search.samplers.mixed_cma import MixedCMA
from evomerge.search.storage.optuna_private import MemoryStorage

Vector = NDArray[np.float64]
KINDS = {"full": math.inf, "separable": 0}
DIMENSIONS = (24, 48, 96, 150, 240, 500, 1000, 3000)
BUDGETS = (100, 300, 1000)
RESUMED = 1000  # trials


class Fast(CMA):  # type: ignore[misc]
    """`cmaes.CMA`, which draws the same points, but multiplies its factors once a generation and not once a draw."""

    made_of: Vector | None = None

    def _sample_solution(self) -> Vector:
        basis, scales = self._eigen_decomposition()
        if self.made_of is not basis:
            self.made_of, self.factors = basis, basis * scales
        drawn: Vector = self._mean + self._sigma * self.factors.dot(self._rng.randn(self._n_dim))
        return drawn


def sampler_of(dimensions: int, seed: int = 0) -> cmaes.CmaEsSampler:
    axes = {f"x{k:04d}": FloatDistribution(0.0, 1.0) for k in range(dimensions)}
    return cmaes.CmaEsSampler(axes, seed, 0.2, None)


class Search:
    """A study in memory, searched by a sampler of evomerge."""

    def __init__(self, dimensions: int, seed: int, start: Vector) -> None:
        self.sampler = sampler_of(dimensions, seed)
        self.study = optuna.create_study(storage=MemoryStorage(), direction="maximize", sampler=self.sampler)
        self.study.enqueue_trial(dict(zip(self.sampler.axes, start.tolist(), strict=True)))

    def ask(self) -> tuple[optuna.Trial, Vector]:
        asked = self.study.ask({**self.sampler.axes})
        return asked, np.array([*asked.params.values()])


def costs(dimensions: int, kind: str) -> None:
    """Print a row: a proposal, and telling RESUMED trials again, in CPU milliseconds and seconds; peak memory in MB."""
    rng, before = np.random.default_rng(0), peak()
    search = Search(dimensions, 0, np.full(dimensions, 0.25))
    times: list[float] = []
    population = 4 + math.floor(3 * math.log(dimensions))
    slow = kind == "full" and dimensions > 500
    for _ in range(3 if slow else 3 * population + 1):
        began = time.process_time()
        asked, point = search.ask()
        times.append(time.process_time() - began)
        search.study.tell(asked, -float(((point - 0.3) ** 2).sum()))
    proposal = 1e3 * float(np.median(times[1:]))
    points = rng.uniform(size=(population, dimensions))
    search.sampler.replay(search.study, None)
    optimizer = search.sampler.optimizer
    assert optimizer is not None
    rounds = 1 if kind == "full" and dimensions > 240 else 5
    began = time.process_time()
    for _ in range(rounds):
        optimizer.tell([(point, float(k)) for k, point in enumerate(points)])
        optimizer.should_stop()
    replay = (time.process_time() - began) / rounds * RESUMED / population
    print(f"| {dimensions} | {kind} | {proposal:.1f} | {replay:.2f} | {peak() - before:.0f} |", flush=True)


def peak() -> float:
    """MB of memory that this process had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def quadratic(name: str, dimensions: int, rng: np.random.Generator) -> Callable[[Vector], float]:
    """A loss by the distance from the optimum, (D,); 1 on average over directions at a distance of 1."""
    weights = np.ones(dimensions) if name == "equal" else 100 ** rng.uniform(0, 1, dimensions)
    weights /= weights.mean()
    turn = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0] if name == "turned" else None
    return lambda away: float((weights * (away if turn is None else turn @ away) ** 2).sum())


def found(name: str, kind: str, dimensions: int, seed: int) -> list[float]:
    """The loss of the best trial after each of the BUDGETS, as a share of the start's."""
    rng = np.random.default_rng([seed, dimensions])
    loss, best = quadratic(name, dimensions, rng), rng.uniform(0.25, 0.75, dimensions)
    start = best + 0.15 * rng.choice([-1.0, 1.0], dimensions)
    with patch.object(cmaes, "SEPARABLE", KINDS[kind]), patch("cmaes.CMA", Fast):
        search, values = Search(dimensions, seed, start), [1.0]
        for _ in range(BUDGETS[-1] + 1):
            asked, point = search.ask()
            value = loss(point - best)
            search.study.tell(asked, -value)
            values.append(value / loss(start - best))
    return [min(values[: budget + 2]) for budget in BUDGETS]


def quality(dimensions: list[int], seeds: int, found: Callable[[str, str, int, int], list[float]]) -> None:
    """Print the table.  found: see `found` and `mixed_found`."""
    print("| coefficients | quadratic | |" + "".join(f" {b} trials |" for b in BUDGETS))
    print("|---|---|---|" + "---|" * len(BUDGETS))
    for count in dimensions:
        for name in ("equal", "unequal", "turned"):
            for kind in KINDS:
                rows = np.array([found(name, kind, count, seed) for seed in range(seeds)])
                cells = " | ".join(interval(column.tolist(), 3) for column in rows.T)
                print(f"| {count} | {name} | {kind} | {cells} |", flush=True)


def mixed_costs(dimensions: int, kind: str) -> None:
    """`costs` beside a choice, of the distribution alone."""
    population, before = 4 + math.floor(3 * math.log(dimensions + 1)), peak()
    rng, start = np.random.default_rng(0), np.append(np.full(dimensions, 0.5), 0)
    cma = MixedCMA(start, 0.2, [3], population, separable=kind == "separable")
    points = [np.append(rng.uniform(0.3, 0.7, dimensions), k % 3) for k in range(population)]
    began = time.process_time()
    cma.tell([(point, float(k)) for k, point in enumerate(points)])
    cma.should_stop()
    replay = (time.process_time() - began) * RESUMED / population
    cma.ask()
    began = time.process_time()
    cma.ask()
    proposal = 1e3 * (time.process_time() - began)
    print(f"| {dimensions} | {kind} | {proposal:.1f} | {replay:.2f} | {peak() - before:.0f} |", flush=True)


def mixed_found(name: str, kind: str, dimensions: int, seed: int) -> list[float]:
    """`found` beside a choice, of which two values cost 30% of the start's loss."""
    rng = np.random.default_rng([seed, dimensions])
    loss, best = quadratic(name, dimensions, rng), rng.uniform(0.25, 0.75, dimensions)
    start = best + 0.15 * rng.choice([-1.0, 1.0], dimensions)
    wrong = 0.3 * loss(start - best)
    population = 4 + math.floor(3 * math.log(dimensions + 1))
    cma = MixedCMA(np.append(start, 0), 0.2, [3], population, separable=kind == "separable")
    values, group = [loss(start - best) + wrong], []
    for number in range(BUDGETS[-1]):
        cma.reseed_rng(seed * 100003 + number)
        point = cma.ask()
        values.append(loss(point[:-1] - best) + wrong * (point[-1] != 1))
        group.append((point, values[-1]))
        if len(group) == population:
            cma.tell(group)
            group = []
    return [min(values[: budget + 1]) / values[0] for budget in BUDGETS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("costs", "quality", "mixed"))
    parser.add_argument("--dimensions", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if arguments.what == "quality":
        quality(arguments.dimensions or [100, 240, 500], arguments.seeds, found)
        return
    mixed = arguments.what == "mixed"
    counts = arguments.dimensions or ([1000, 3000] if mixed else list(DIMENSIONS))
    if len(counts) == len(arguments.kinds) == 1:
        if mixed:
            mixed_costs(counts[0], arguments.kinds[0])
            return
        with patch.object(cmaes, "SEPARABLE", KINDS[arguments.kinds[0]]):
            costs(counts[0], arguments.kinds[0])
        return
    print(
        f"| coefficients | | ms a proposal | s to tell {RESUMED} trials again | MB |\n|---|---|---|---|---|", flush=True
    )
    for count, kind in product(counts, arguments.kinds):
        command = [sys.executable, __file__, arguments.what, "--dimensions", str(count), "--kinds", kind]
        subprocess.run(command, check=True)
    if mixed:
        quality(arguments.dimensions or [120, 240], arguments.seeds, mixed_found)


if __name__ == "__main__":
    main()
