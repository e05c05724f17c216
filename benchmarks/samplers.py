"""Which sampler finds most by how many trials: by dimension, start and workers, on a smooth model of a family.

    python examples/tiny/make.py runs/tiny
    python benchmarks/samplers.py run
    python benchmarks/samplers.py table runs/samplers.json

`run` first makes the smooth model (benchmarks/surrogate.py), if the file has not all its points.  It is of the tiny
family; with `--real` of a family of adapters of a real model, for instance SmolLM2-135M.

Then it proposes trials by the samplers of evomerge itself.  A seed deals the items into search and holdout items, and
seeds the sampler.  The first trials are the base, the sources and their means; with a good start then the end of the
learned start in that space, by evomerge's steps on mini-batches.  A trial's value is half its objective and half its
exact match, each scaled; the objective is that of `auto`.  After so many trials of the sampler, a search is worth what
its best trial by then has on the holdout items, where 0 is the best baseline and 1 the end of CMA-ES by the holdout
items themselves, after 1000 trials; in 240 coefficients the learned start is 1.  With workers, that many trials run at
once.

coarse       CMA-ES from coarse to fine, as evomerge begins without a learned start: all weights of a source at once,
             then by kind, then all; cma-es is without it
cma-es       in 48 coefficients and more after a learned start it moves whole groups, those of 24, as evomerge does
cma-es free  never does so

In 48 coefficients and more CMA-ES after a learned start runs without a study and with one worker.

benchmarks/true_samplers.py merges and scores what these searches found.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from results import Results, command_line, interval
from surrogate import HIGH, PARTS, POINTS, REAL, SOURCES, TASKS, TINY, Surrogate, add_family, fit, given_points

from evomerge.config.running import COARSE, SamplerConfig
from evomerge.search.evaluation.scale import LEAST, METRIC_SHARE, Line, fitted
from evomerge.search.learned.learn import AVERAGED, ITEMS, RATE, STEPS
from evomerge.search.learned.steps import Climber, average
from evomerge.search.samplers.cmaes import WIDE
from evomerge.search.samplers.registry import make_sampler, sampler_kind
from evomerge.search.samplers.sampler_kind import SamplerSetup
from evomerge.search.storage.optuna_private import MemoryStorage
from evomerge.search.storage.trial_record import LEARNED

Vector = NDArray[np.float64]
DIMENSIONS = tuple(sorted({*TINY, *REAL}))
BUDGETS = (30, 60, 100, 200, 400)
LONG, LONG_STEP = 1000, 0.1  # trials whose end counts as 1, and the first step of CMA-ES there
SLOW = {"gp": 100}  # samplers of so few trials here
STARTS = ("baseline", "learned")
SAMPLERS = ("cma-es", "cma-es free", "coarse", "random", "tpe", "gp")


# --- Searching ---


class Problem:
    """A search on the surrogate: a space and a seed, which deals the items.

    dimensions: of the space.
    """

    def __init__(self, surrogate: Surrogate, dimensions: int, seed: int, share: float) -> None:
        self.surrogate, self.groups, self.seed, self.share = surrogate, surrogate.groups[dimensions], seed, share
        self.names = [f"w{k:03d}" for k in range(dimensions)]
        self.axes = {name: FloatDistribution(0.0, HIGH) for name in self.names}
        coarse = surrogate.groups[24 if dimensions > 24 else dimensions]
        first = [int(np.argmax(self.groups == k)) for k in range(dimensions)]  # a weight of each coefficient
        self.coarse = coarse[first]
        self.pairs = {name: f"{f // PARTS}" for name, f in zip(self.names, first, strict=True)}
        kinds = surrogate.groups[sorted(surrogate.groups)[1]]
        self.ties = {name: f"{kinds[f]}" for name, f in zip(self.names, first, strict=True)}
        rng = np.random.default_rng(seed)
        items, searched = surrogate.items, surrogate.searched
        dealt = [t * items + rng.permutation(items) for t in range(TASKS)]
        self.search = np.array([d[:searched] for d in dealt])  # (tasks, items)
        self.holdout = np.array([d[searched:] for d in dealt])
        self.given = [np.array([p[f] for f in first]) for p in given_points().values()]
        known = [surrogate.at(p[self.groups]) for p in self.given]
        self.lines = [[self.line(known, items, which) for which in (0, 1)] for items in self.search]

    @staticmethod
    def line(known: Sequence[tuple[Vector, Vector]], items: NDArray[np.int64], which: int) -> Line:
        """The scale of a task's objective (0) or metric (1)."""
        base, *others = [(o if which == 0 else (m > 0).astype(float))[items].tolist() for o, m in known]
        parents = {f"source {k}": each for k, each in enumerate(others[-SOURCES:])}
        return fitted("score", base, parents, LEAST if which else 0.0)

    def value(self, point: Vector, split: str = "search", share: float | None = None) -> float:
        """The value of a trial.  point: (D,)."""
        objective, margin = self.surrogate.at(point[self.groups])
        share = self.share if share is None else share
        means = []
        for items, (line, metric) in zip(getattr(self, split), self.lines, strict=True):
            smooth, right = line.of(objective[items]).mean(), metric.of((margin[items] > 0).astype(float)).mean()
            means.append((1 - share) * smooth + share * right)
        return float(np.mean(means))

    def metric(self, point: Vector) -> float:
        """The mean exact match on the holdout items."""
        return float((self.surrogate.at(point[self.groups])[1][self.holdout] > 0).mean())

    def learned(self) -> Vector:
        """(D,) the end of the learned start: steps from the best baseline, on mini-batches of the search items."""
        rng = np.random.default_rng([self.seed, 1])
        climber, seen = Climber(self.axes, RATE, STEPS), []
        point = dict(zip(self.names, max(self.given, key=self.value).tolist(), strict=True))
        for _ in range(STEPS):
            seen.append(point)
            items = np.zeros(TASKS * self.surrogate.items)
            for task, (line, _) in zip(self.search, self.lines, strict=True):
                items[rng.choice(task, ITEMS // TASKS, replace=False)] = 1 / line.unit
            fine = self.surrogate.gradient(np.array([point[n] for n in self.names])[self.groups], items)
            gradient = np.bincount(self.groups, fine, len(self.names))
            point = climber.step(point, dict(zip(self.names, gradient.tolist(), strict=True)))
        last = average(seen[-round(AVERAGED * STEPS) :])
        return np.array([last[n] for n in self.names])


class Found(NamedTuple):
    """What a search found.

    points: the best by value after each trial of the sampler, each (D,).
    seconds: of each proposal.
    """

    points: list[Vector]
    seconds: list[float]


def sampled(problem: Problem, name: str, start: Vector | None, workers: int, trials: int) -> Found:
    """A search by a sampler of evomerge.  start: tried after the baselines, and taken as learned."""
    coarse = name == "coarse"
    config = SamplerConfig(name="cma-es" if coarse else name, coarse=COARSE * coarse)
    tied = (problem.ties, problem.pairs) if coarse else ({}, {})
    study = optuna.create_study(storage=MemoryStorage(), direction="maximize")
    values: list[tuple[float, Vector]] = []

    def propose() -> tuple[optuna.Trial, Vector]:
        if number[0] == 0 or not sampler_kind(config.name).serves_all_trials:
            setup = SamplerSetup(config, problem.axes, problem.seed, number[0], workers, *tied)
            study.sampler = make_sampler(setup)
        number[0] += 1
        asked = study.ask()
        return asked, np.array([asked.suggest_float(axis, 0.0, HIGH) for axis in problem.names])

    def finish(trial: optuna.Trial, point: Vector) -> None:
        value = problem.value(point)
        study.tell(trial, value)
        values.append(max([(value, point), *values[-1:]], key=lambda v: v[0]))

    number = [0]
    for given in problem.given + ([] if start is None else [start]):
        attributes = {LEARNED: STEPS} if given is start else {}
        study.enqueue_trial(dict(zip(problem.names, given.tolist(), strict=True)), user_attrs=attributes)
        finish(*propose())
    first, seconds = len(values), []
    running: list[tuple[optuna.Trial, Vector]] = []
    while len(seconds) < trials or running:
        while len(running) < workers and len(seconds) < trials:
            began = time.process_time()
            running.append(propose())
            seconds.append(time.process_time() - began)
        finish(*running.pop(0))
    return Found([point for _, point in values[first:]], seconds)


def from_learned(
    problem: Problem, start: Vector, trials: int, groups: NDArray[np.int64] | None, split: str, step: float
) -> Found:
    """CMA-ES from the end of the learned start, with one worker.

    groups: (D,) the group of each coefficient if whole groups are moved up or down.
    split: whose items give the values.
    step: the first, as a share of the bounds.
    """
    from cmaes import CMA

    found, seconds = [(problem.value(start, split), start)], []
    centre = start / HIGH
    mean = centre if groups is None else np.full(groups.max() + 1, 0.5)
    bounds = np.tile([0.0, 1.0], (len(mean), 1))
    tries = min(10 * len(mean), 500)  # to draw a point within the bounds; ten times the dimension takes seconds
    optimizer = CMA(mean=mean, sigma=step, bounds=bounds, seed=problem.seed, n_max_resampling=tries)
    group: list[tuple[Vector, float]] = []
    for _ in range(trials):
        began = time.process_time()
        place = optimizer.ask()
        seconds.append(time.process_time() - began)
        point = HIGH * (place if groups is None else np.clip(centre + place[groups] - 0.5, 0, 1))
        value = problem.value(point, split)
        group.append((place, -value))
        found.append(max([(value, point), found[-1]], key=lambda v: v[0]))
        if len(group) == optimizer.population_size:
            optimizer.tell(group)
            group = []
    return Found([point for _, point in found[1:]], seconds)


def at_random(problem: Problem, start: Vector | None, trials: int) -> Found:
    """Points anywhere; the best of them, of the start and of the baselines."""
    rng = np.random.default_rng([problem.seed, 2])
    points = [*problem.given, *([] if start is None else [start]), *rng.uniform(0, HIGH, (trials, len(problem.names)))]
    found: list[tuple[float, Vector]] = []
    for point in points:
        found.append(max([(problem.value(point), point), *found[-1:]], key=lambda v: v[0]))
    return Found([point for _, point in found[-trials:]], [0.0])


def run(arguments: argparse.Namespace) -> None:
    """Measure what the file does not have yet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    fit(arguments.surrogate, arguments.family, arguments.real, arguments.points or POINTS[arguments.real])
    surrogate, results = Surrogate(arguments.surrogate), Results(arguments.out)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    spaces = [d for d in arguments.dimensions if d in surrogate.groups]
    for seed, dimensions, share in product(seeds, spaces, arguments.shares):
        problem = Problem(surrogate, dimensions, seed, share)
        starts = dict(zip(STARTS, (None, problem.learned()), strict=True))
        results.once(f"ends/{dimensions}/{seed}", lambda p=problem, s=starts: ends(p, s["learned"]))
        for name, start in product(arguments.samplers, arguments.starts):
            title = name if share == METRIC_SHARE else f"{name}, metric {share:g}"
            trials = min(SLOW.get(name, BUDGETS[-1]), arguments.trials)
            alone = name in ("random", "coarse") or dimensions > WIDE
            for workers in (1,) if alone else arguments.workers:
                if not unfit(name, dimensions, start):
                    results.once(
                        f"{title}/{dimensions}/{start}/{workers}/{seed}",
                        lambda p=problem, n=name, s=starts[start], w=workers, t=trials: measured(p, n, s, w, t),
                    )


def measured(problem: Problem, name: str, start: Vector | None, workers: int, trials: int) -> dict[str, Any]:
    """What a search's best points have on the holdout items after each of the BUDGETS: value and exact match."""
    if name == "random":
        found = at_random(problem, start, trials)
    elif name == "coarse":
        found = sampled(problem, name, start, workers, trials)
    elif name.startswith("cma-es") and len(problem.axes) > WIDE and start is not None:
        groups = None if name == "cma-es free" else problem.coarse
        found = from_learned(problem, start, trials, groups, "search", SamplerConfig().sigma0)
    else:
        found = sampled(problem, name, start, workers, trials)
    points = [found.points[b - 1] for b in BUDGETS if b <= trials]
    return {
        "points": [p.tolist() for p in points],
        "values": [problem.value(p, "holdout", METRIC_SHARE) for p in points],
        "metric": [problem.metric(p) for p in points],
        "seconds": float(np.mean(found.seconds)),
    }


def unfit(name: str, dimensions: int, start: str) -> bool:
    """Whether a way is the same as another one here."""
    return (name == "coarse" and dimensions == 4) or (name == "cma-es free" and (dimensions < 48 or start != "learned"))


def ends(problem: Problem, learned: Vector) -> dict[str, Any]:
    """Holdout values of the best baseline, the learned start, and CMA-ES after LONG trials from there."""
    best = max(problem.given, key=problem.value)
    wide = len(problem.axes) > TINY[-2]  # there LONG trials take minutes
    long = learned if wide else from_learned(problem, learned, LONG, None, "holdout", LONG_STEP).points[-1]
    return {
        "points": {"learned": learned.tolist(), "optimum": long.tolist()},
        "baseline": problem.value(best, "holdout"),
        "learned": problem.value(learned, "holdout"),
        "optimum": problem.value(long, "holdout"),
        "baseline metric": problem.metric(best),
        "learned metric": problem.metric(learned),
        "optimum metric": problem.metric(long),
    }


# --- Printing ---


def table(found: dict[str, Any]) -> None:
    """Print what was measured, as Markdown: means over seeds, and 95% intervals.

    First the value, from 0 for the best baseline to 1 for the optimum, then the exact match.
    """
    for dimensions, which in product(DIMENSIONS, ("values", "metric")):
        edges = {int(k.split("/")[2]): v for k, v in found.items() if k.startswith(f"ends/{dimensions}/")}
        if not edges:
            continue

        def shown(value: float, seed: int, known: Mapping[int, Any] = edges, plain: bool = which == "metric") -> float:
            low, high = known[seed]["baseline"], known[seed]["optimum"]
            return value if plain else (value - low) / (high - low)

        suffix, digits = (" metric", 3) if which == "metric" else ("", 2)
        known = [
            f"{end} {interval([shown(e[end + suffix], seed) for seed, e in edges.items()], digits)}"
            for end in ("baseline", "learned", "optimum")
        ]
        print(f"\n{dimensions} coefficients, {which}, {len(edges)} seeds; {', '.join(known)}\n")
        print(f"| sampler | start | workers | {' | '.join(map(str, BUDGETS))} | ms a proposal | seeds |")
        print("|---|---|---|" + "---|" * (len(BUDGETS) + 2))
        ways = dict.fromkeys(k.rpartition("/")[0] for k in found if k.split("/")[1] == str(dimensions))
        for way in sorted((w for w in ways if not w.startswith("ends")), key=lambda w: w.split("/")[2:]):
            name, _, start, workers = way.split("/")
            runs = {int(k.split("/")[4]): v for k, v in found.items() if k.startswith(f"{way}/")}
            cells = [
                interval([shown(r[which][k], s) for s, r in runs.items() if k < len(r[which])], digits)
                for k in range(len(BUDGETS))
            ]
            own = 1000 * float(np.mean([r["seconds"] for r in runs.values()]))
            print(f"| {name} | {start} | {workers} | {' | '.join(cells)} | {own:.1f} | {len(runs)} |")


def main() -> None:
    parser, running = command_line(__doc__, "samplers", 10, run, table)
    add_family(running)
    running.add_argument("--points", type=int, help=f"of the surrogate; {POINTS[False]}, or {POINTS[True]} if real")
    running.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    running.add_argument("--dimensions", nargs="+", type=int, choices=DIMENSIONS, default=DIMENSIONS)
    running.add_argument("--workers", nargs="+", type=int, default=(1, 8))
    running.add_argument("--shares", nargs="+", type=float, default=[METRIC_SHARE], help="of the metric in the value")
    running.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    running.add_argument("--trials", type=int, default=BUDGETS[-1])
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
