"""Optimizers of the learned start: what each reaches on a search's own items, and what it costs.

    python benchmarks/optimizers.py run benchmarks/tiny24.yaml --seeds 3 [--out runs/optimizers.json]
    python benchmarks/optimizers.py table runs/optimizers.json

matrix    the learned start's steps (search/learned/steps.py), on mini-batches of 16 items
adam      Adam (Kingma and Ba 2015) on the same mini-batches; the rate falls along half a cosine
l-bfgs    SciPy's L-BFGS-B on all search items; the best point of its first 4, 8 and 12 gradients

Every optimizer begins with all coefficients at `--start` and climbs the mean of `objective: auto_mean`, not scaled.
The result of `matrix` and `adam` is the mean point of the last 30% of the steps.  Cost is counted in steps of 16 items.
"""

import argparse
import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import Results, command_line, interval
from small_family import with_changes

from evomerge.config.config_file import load_config
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import EvaluationJob, GradientJob, Outcome, TrialJob
from evomerge.search.evaluation.scale import Scale, make_scale
from evomerge.search.evaluation.task_set import Scores, open_task_set
from evomerge.search.learned.learn import AVERAGED, ITEMS
from evomerge.search.learned.minibatches import minibatch
from evomerge.search.learned.steps import Climber, average
from evomerge.search.models import open_config_models
from evomerge.search.space.baselines import Baseline, base_alone, baselines
from evomerge.search.space.greedy_soup import greedy_soup
from evomerge.search.space.space import Point, build_space

Vector = NDArray[np.float64]
MATRICES = [f"attention.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]
FINE = {"granularity": "layer", "components": MATRICES}
OPTIMIZERS = ("matrix:0.05:100", "adam:0.04:100", "adam:0.04:150", "adam:0.08:100", "l-bfgs")
LOOKS = (4, 8, 12)  # gradients of L-BFGS
RACE = 15  # steps from each of several starts


@dataclass
class Family:
    """A search's models and items, and its space.

    units: by what the objective of each task is divided.
    """

    path: Path
    seed: int
    start: float
    fine: bool
    objective: str = "auto_mean"
    evaluator: Evaluator = field(init=False)
    units: dict[str, float] = field(init=False)
    scale: Scale = field(init=False)
    known: dict[str, Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = load_config(self.path)
        space = config.space.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        if self.fine:
            space = {k: v for k, v in space.items() if k != "knots"} | FINE
        config = with_changes(config, seed=self.seed, objective=self.objective, space=space)
        models = open_config_models(config)
        self.space = build_space(config, models)
        self.task_set = open_task_set(config)
        self.evaluator = Evaluator(config, models, self.task_set)
        self.ids = {t: [i.id for i in items] for t, items in self.task_set.split("search").items()}
        self.first: Point = dict.fromkeys(self.space.axes, self.start)
        self.units = dict.fromkeys(self.ids, 1.0)

    def take_scale(self) -> None:
        """Divide each task's objective by what its best parent has more of it than the base, as a search does."""
        parents = {b.name: self.scores(b) for b in baselines(self.space) if b.kind == "parent"}
        self.scale = make_scale(self.task_set, self.scores(base_alone(self.space)), parents)
        self.units = {name: task.objective.unit for name, task in self.scale.tasks.items()}

    def scores(self, baseline: Baseline) -> Scores:
        """By what trials are scored by, on the search items."""
        key = baseline.recipe.model_dump_json()
        if key not in self.known:
            found = self.done(TrialJob(baseline.recipe, None)).scores
            for task in self.task_set.tasks:  # a metric that is no part of a trial's value has a line in the scale too
                found[task.name].setdefault(task.metric, found[task.name][task.objective])
            self.known[key] = found
        return self.known[key]

    def best_baseline(self) -> Baseline:
        """Where a search would begin, by the scale that was taken."""

        async def value(baseline: Baseline) -> float:
            return self.scale.value(self.scores(baseline))

        known = baselines(self.space)
        soup = asyncio.run(greedy_soup(self.space, known, value))
        inside = [b for b in (*known, soup.baseline) if b.point is not None]
        best = max(inside, key=lambda b: self.scale.value(self.scores(b)))
        print(f"seed {self.seed}: the best baseline is {best.name}. {soup.sentence}")
        return best

    def starts(self, name: str) -> list[Point]:
        """The points at which a climb begins.

        name: a number, the value of all coefficients; `uniform`, 1/n; `baseline`, the best one; `race`, 0.5 and both.
        """
        if name == "race":
            return [point for each in ("baseline", "uniform", "0.5") for point in self.starts(each)]
        if name == "baseline":
            best = self.best_baseline()
            assert best.point is not None
            return [best.point]
        value = 1 / len(self.space.config.sources) if name == "uniform" else float(name)
        return [dict.fromkeys(self.space.axes, value)]

    def done(self, job: GradientJob | EvaluationJob | TrialJob) -> Outcome:
        found = self.evaluator.run(job)
        assert isinstance(found, Outcome), found
        return found

    def gradient(self, point: Point, items: Mapping[str, list[str]]) -> tuple[float, dict[str, float]]:
        """The mean objective of some items, and its derivative by each coefficient."""
        weights = {task: 1 / len(items) / len(each) / self.units[task] for task, each in items.items()}
        found = self.done(GradientJob(self.space.recipe(point), items, weights))
        means = [np.mean(next(iter(scores.values()))) for scores in found.scores.values()]
        return float(np.mean(means)), self.space.gradient(found.gradient)

    def objective_at(self, point: Point) -> float:
        """The mean scaled objective of a point on the search items."""
        scores = self.done(TrialJob(self.space.recipe(point), None)).scores
        return float(np.mean([np.mean(scores[t.name][t.objective]) / self.units[t.name] for t in self.task_set.tasks]))

    def reached(self, point: Point, cost: float, seconds: float) -> dict[str, float]:
        """What a point has on the holdout items."""
        scores = self.done(EvaluationJob(self.space.recipe(point), "holdout")).scores
        both: tuple[Any, Any] = ("objective", "metric")
        return {which: self.task_set.mean(scores, which) for which in both} | {"cost": cost, "seconds": seconds}


@dataclass
class Adam:
    """The optimizer of that name, with the interface of `Climber`."""

    axes: Mapping[str, Any]
    rate: float
    steps: int
    taken: int = 0
    mean: Vector | float = 0.0
    square: Vector | float = 0.0

    def step(self, point: Point, gradient: Mapping[str, float]) -> Point:
        g = np.array([gradient[name] for name in self.axes])
        rate = self.rate * (1 + np.cos(np.pi * self.taken / self.steps)) / 2
        self.taken += 1
        self.mean, self.square = 0.9 * self.mean + 0.1 * g, 0.99 * self.square + 0.01 * g * g
        mean, square = self.mean / (1 - 0.9**self.taken), self.square / (1 - 0.99**self.taken)
        moved = np.array([point[name] for name in self.axes]) + rate * mean / (np.sqrt(square) + 1e-12)
        bounds = np.array([(axis.low, axis.high) for axis in self.axes.values()])
        return dict(zip(self.axes, np.clip(moved, *bounds.T).tolist(), strict=True))


@dataclass
class Climb:
    """Steps on mini-batches.

    points: where each step was taken, and where the next one is.
    """

    family: Family
    climber: Climber | Adam
    points: list[Point]

    def go(self, steps: int) -> None:
        """Go on until so many steps are taken."""
        for number in range(len(self.points) - 1, steps):
            point, family = self.points[-1], self.family
            items = minibatch(family.ids, family.seed, number, ITEMS)
            self.points.append(self.climber.step(point, family.gradient(point, items)[1]))

    def mean(self) -> Point:
        """The mean point of the last steps."""
        taken = self.points[:-1]
        return average(taken[-max(1, round(AVERAGED * len(taken))) :])


def by_steps(
    family: Family, make: Callable[..., Climber | Adam], rate: float, steps: int, starts: Sequence[Point] = ()
) -> dict[str, dict[str, float]]:
    """The mean point of the last steps on mini-batches.

    starts: where it begins.  From each of several a climb takes RACE steps, and the one with the best objective on the
        search items goes on with those that are left.
    """
    started, starts = time.process_time(), starts or [family.first]
    left = steps - RACE * (len(starts) - 1)
    climbs = [Climb(family, make(family.space.axes, rate, left), [start]) for start in starts]
    best = climbs[0]
    if len(climbs) > 1:
        for climb in climbs:
            climb.go(RACE)
        best = max(climbs, key=lambda climb: family.objective_at(climb.mean()))
        print(f"seed {family.seed}: start {climbs.index(best)} won the race")
    best.go(left)
    return {"": family.reached(best.mean(), steps, time.process_time() - started)}


def by_lbfgs(family: Family) -> dict[str, dict[str, float]]:
    """The best points of L-BFGS after so many gradients."""
    from scipy.optimize import minimize

    axes, tried, started = list(family.space.axes), [], time.process_time()

    def loss(x: Vector) -> tuple[float, Vector]:
        point = dict(zip(axes, x.tolist(), strict=True))
        value, gradient = family.gradient(point, family.ids)
        tried.append((value, point, time.process_time() - started))
        return -value, -np.array([gradient[name] for name in axes])

    bounds = [(axis.low, axis.high) for axis in family.space.axes.values()]
    first = np.array([family.first[name] for name in axes])
    minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxfun": max(LOOKS)})
    found = {}
    for look in LOOKS:
        _, point, _ = max(tried[:look], key=lambda each: each[0])
        cost = look * sum(map(len, family.ids.values())) / ITEMS
        found[f"{look} gradients"] = family.reached(point, cost, tried[min(look, len(tried)) - 1][2])
    return found


def climbed(family: Family, name: str) -> dict[str, dict[str, float]]:
    """What an optimizer reaches.  name: of the command line."""
    if name == "l-bfgs":
        return by_lbfgs(family)
    kind, rate, steps = name.split(":")
    return by_steps(family, {"matrix": Climber, "adam": Adam}[kind], float(rate), int(steps))


def run(arguments: argparse.Namespace) -> None:
    results = Results(arguments.out)
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        family = Family(arguments.config, seed, arguments.start, arguments.fine)
        for name in arguments.optimizers:
            results.once(
                f"{arguments.config.stem} {len(family.space.axes)}/{name}/{seed}", partial(climbed, family, name)
            )


def table(found: dict[str, Any]) -> None:
    """Print what was measured, as Markdown."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for key, parts in found.items():
        family, name, _ = key.split("/")
        for part, values in parts.items():
            rows.setdefault((family, f"{name} {part}".strip()), []).append(values)
    print("| family, coefficients | optimizer | seeds | steps of 16 items | objective | metric |")
    print("|---|---|---|---|---|---|")
    for (family, name), each in rows.items():
        objective, metric = (interval([values[key] for values in each]) for key in ("objective", "metric"))
        print(f"| {family} | {name} | {len(each)} | {each[0]['cost']:.0f} | {objective} | {metric} |")


def main() -> None:
    parser, running = command_line(__doc__, "optimizers", 3, run, table)
    running.add_argument("config", type=Path)
    running.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, help="KIND:RATE:STEPS, or l-bfgs")
    running.add_argument("--start", type=float, default=0.5)
    running.add_argument("--fine", action="store_true", help="a coefficient for every source, layer and matrix")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
