"""How a sampler best looks for the front of several tasks: hypervolumes at equal cost, on the tiny family.

    python examples/tiny/make.py runs/tiny
    python benchmarks/pareto.py run --seeds 5
    python benchmarks/pareto.py table runs/pareto.json

A problem is a number of tasks and of coefficients.  A trial's values are its tasks' mean objectives (`auto`) on ITEMS
items of each, scaled so that the base is 0 and the best parent 1; each seed draws other items.  A search begins with
the baselines, and `learned` also with the looks of a learned start that climbs by several weights.  Then a way proposes
the trials:

own        the sampler maximises the mean of the tasks
turns      each trial by the next one of the learned start's weights (`climbs`); a distribution of CMA-ES for each
later      FIRST trials by the mean of the tasks, then turns
multi      Optuna's sampler for several objectives; GP maximises logEHVI, NSGA keeps POPULATION

The table has the hypervolume after so many of these trials, as a share of the best that any search of the same problem
and seed reached, and at the end the mean difference to what evomerge does (PRODUCT).
"""

import argparse
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from objectives import CANDIDATES
from results import ROOT, Results, command_line, interval
from small_family import Rows, SmallFamily
from torch import Tensor

from evomerge.config.config_file import load_config
from evomerge.config.schema import SamplerConfig
from evomerge.search.learned.climbs import climbs, distance
from evomerge.search.learned.learn import AVERAGED, ITEMS, RATE
from evomerge.search.learned.minibatches import minibatch
from evomerge.search.learned.steps import Climber, average
from evomerge.search.samplers.registry import make_sampler
from evomerge.search.samplers.sampler_kind import SamplerSetup, trial_seed
from evomerge.search.space.space import Point
from evomerge.search.verdict.front import hypervolume

Values = tuple[float, ...]
"""One a task."""

TASKS = {2: (0, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3)}  # of the tiny family: rev, sort, count, add
SPACES: dict[int, dict[str, Any]] = {4: {"granularity": "model", "components": []}, 24: {}}
EACH = 8  # items of each task; a trial then takes 5 ms a task
LEAST = 0.05  # the smallest unit of a task
STEPS = 45  # of the first climb
POPULATION = 20
FIRST = 60
PRODUCT = {"learned": "turns cma-es", "scratch": "later cma-es"}  # what evomerge does
SIGMA = 0.1  # of CMA-ES after a learned start, as in `auto`
MARKS = (30, 60, 100, 200)
FORMULA = CANDIDATES["token mean floored -6"]
WAYS = {
    "own": ("cma-es", "tpe", "gp"),
    "turns": ("cma-es", "tpe", "gp"),
    "later": ("cma-es", "tpe", "gp"),
    "multi": ("nsga-ii", "nsga-iii", "tpe", "gp"),
}
FEW = {"gp": 60, "tpe": 200}  # trials of samplers that take long themselves; the others: the last mark


class Problem:
    """Trials of some tasks of a family.

    family: the models and the space.
    tasks: how many.
    seed: draws the items.
    """

    def __init__(self, family: SmallFamily, tasks: int, seed: int) -> None:
        self.family = family
        self.seed = seed
        self.tasks = [family.task_set.tasks[k].name for k in TASKS[tasks]]
        rng = np.random.default_rng(seed)
        every = [family.items(t, "search") for t in self.tasks]
        self.rows = joined([rows.pick(torch.as_tensor(rng.permutation(len(rows.gold))[:EACH])) for rows in every])
        found = [b.recipe for b in family.baselines if b.kind in ("base", "parent")]
        self.offset, *parents = (self.means(family.of_recipe(recipe)).numpy() for recipe in found)
        self.unit = np.maximum(np.max(parents, axis=0) - self.offset, LEAST)

    @cached_property
    def baselines(self) -> list[tuple[Point, Values]]:
        """Those that are points of the space."""
        points = [b.point for b in self.family.baselines if b.point is not None]
        return [(point, self(point)) for point in points]

    def means(self, values: dict[str, Tensor], rows: Rows | None = None) -> Tensor:
        """(T,) the mean objective of each task.  values: the weights of the model.  rows: as many of each task."""
        items = FORMULA(self.family.answers(values, rows or self.rows))
        return items.view(len(self.tasks), -1).mean(1)

    @torch.no_grad()
    def __call__(self, point: Point) -> Values:
        """The values of a trial."""
        means = self.means(self.family.values(torch.as_tensor(self.family.unit(point)))).numpy()
        return tuple(((means - self.offset) / self.unit).tolist())

    def gradient(self, point: Point, weights: dict[str, float], number: int) -> Point:
        """The derivative of the weighted mean of a mini-batch by every coefficient."""
        batch = minibatch({t: [str(k) for k in range(EACH)] for t in self.tasks}, self.seed, number, ITEMS)
        items = torch.tensor([place * EACH + int(k) for place, t in enumerate(self.tasks) for k in batch[t]])
        unit = torch.tensor(self.family.unit(point), requires_grad=True)
        means = self.means(self.family.values(unit), self.rows.pick(items))
        worth = torch.as_tensor([weights[t] for t in self.tasks]) / torch.as_tensor(self.unit)
        (slope,) = torch.autograd.grad(means @ worth.float(), unit)
        return dict(zip(self.family.axes, (slope.numpy() / self.family.width).tolist(), strict=True))

    @cached_property
    def learned(self) -> list[tuple[Point, Values]]:
        """The looks of a learned start."""
        found: list[tuple[Point, Values]] = []
        reached: list[tuple[dict[str, float], Point]] = []
        best = max(self.baselines, key=lambda trial: sum(trial[1]))[0]
        for climb in climbs(dict.fromkeys(self.tasks, 1.0), STEPS, pareto=True):
            near = min(reached, key=lambda r: distance(r[0], climb.weights), default=(climb.weights, best))
            climber, point, points = Climber(self.family.space.axes, RATE, climb.steps), near[1], []
            for step in range(climb.steps):
                points.append(point)
                point = climber.step(point, self.gradient(point, climb.weights, climb.number * STEPS + step))
                if len(points) in climb.looks:
                    mean = average(points[-max(1, round(AVERAGED * len(points))) :])
                    found.append((mean, self(mean)))
            reached.append((climb.weights, found[-1][0]))
        return found


class Search:
    """One search of a problem.

    way, sampler: see the module.
    learned: whether it begins with a learned start.
    """

    def __init__(self, problem: Problem, way: str, sampler: str, learned: bool) -> None:
        self.problem, self.way = problem, way
        self.axes = problem.family.space.axes
        self.trials = [*problem.baselines, *(problem.learned if learned else [])]
        self.config = SamplerConfig(name=sampler, sigma0=SIGMA if learned else 0.2)
        tasks = len(problem.tasks)
        own = dict.fromkeys(problem.tasks, 1.0 / tasks)
        self.turns = [np.array(list(c.weights.values())) for c in climbs(own, 1, pareto=way in ("turns", "later"))]
        self.studies: dict[int, optuna.Study] = {}

    def run(self, count: int) -> dict[str, float]:
        """The hypervolume after the given trials and after so many more, up to `count`."""
        volumes = {"0": self.volume()}
        for number in range(count):
            key = 0 if self.way == "later" and number < FIRST else number % len(self.turns)
            if key not in self.studies:
                self.studies[key] = self.study(number, key)
            study = self.studies[key]
            trial = study.ask()
            point = {a: trial.suggest_float(a, d.low, d.high) for a, d in self.axes.items()}
            values = self.problem(point)
            study.tell(trial, self.told(key, values))
            for other, known in self.studies.items():
                if other != key:
                    give(known, self.axes, point, self.told(other, values))
            self.trials.append((point, values))
            if number + 1 in MARKS:
                volumes[str(number + 1)] = self.volume()
        return volumes

    def volume(self) -> float:
        return hypervolume(np.array([values for _, values in self.trials]))

    def told(self, key: int, values: Values) -> float | Values:
        """What the sampler of a turn is told of a trial.  key: the turn's number."""
        return values if self.way == "multi" else float(self.turns[key] @ np.array(values))

    def study(self, number: int, key: int) -> optuna.Study:
        """A turn's study with all trials so far.  number: of the trial that comes next.  key: the turn's number."""
        seed = trial_seed(self.problem.seed, number)
        goals = len(self.problem.tasks) if self.way == "multi" else 1
        study = optuna.create_study(directions=["maximize"] * goals, sampler=self.sampler(seed, number, key))
        for point, values in self.trials:
            give(study, self.axes, point, self.told(key, values))
        return study

    def sampler(self, seed: int, number: int, key: int) -> optuna.samplers.BaseSampler:
        if self.config.name == "nsga-ii":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
        if self.config.name == "nsga-iii":
            return optuna.samplers.NSGAIIISampler(seed=seed, population_size=POPULATION)
        return make_sampler(SamplerSetup(self.config, self.axes, 1000 * self.problem.seed + key, number))


def joined(tasks: Sequence[Rows]) -> Rows:
    """The rows of several generation tasks as one."""
    length, scored = (max(getattr(r, name).shape[1] for r in tasks) for name in ("tokens", "scored"))
    pad = torch.nn.functional.pad
    starts = np.cumsum([0, *(len(r.tokens) for r in tasks)])
    return Rows(
        torch.cat([pad(r.tokens, (0, length - r.tokens.shape[1])) for r in tasks]),
        torch.cat([pad(r.scored, (0, scored - r.scored.shape[1]), value=1) for r in tasks]),
        torch.cat([pad(r.mask, (0, scored - r.mask.shape[1])) for r in tasks]),
        torch.cat([r.gold + int(start) for r, start in zip(tasks, starts, strict=False)]),
        None,
    )


def give(study: optuna.Study, axes: Any, point: Point, told: float | Values) -> None:
    """Add a trial whose point the study's sampler did not choose."""
    study.enqueue_trial(point)
    trial = study.ask()
    for axis, bounds in axes.items():
        trial.suggest_float(axis, bounds.low, bounds.high)
    study.tell(trial, told)


def open_family(path: Path, axes: int) -> SmallFamily:
    """The family of a configuration with so many coefficients."""
    config = load_config(path)
    space = config.space.model_copy(update=SPACES[axes])
    splits = config.splits.model_copy(update={"search": 100, "selection": 10, "holdout": 10})
    tasks = [t.model_copy(update={"objective": "auto"}) for t in config.tasks]
    return SmallFamily(config.model_copy(update={"space": space, "splits": splits, "tasks": tasks}))


def run(arguments: argparse.Namespace) -> None:
    """Measure what the file does not have yet."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    results = Results(arguments.out)
    families = {axes: open_family(arguments.tiny, axes) for axes in arguments.axes}
    for seed, tasks, axes in product(
        range(arguments.first, arguments.first + arguments.seeds), arguments.tasks, arguments.axes
    ):
        problem = Problem(families[axes], tasks, seed)
        for learned, way in product([name == "learned" for name in arguments.starts], arguments.ways):
            for sampler in WAYS[way]:
                if sampler not in arguments.samplers:
                    continue
                start, count = "learned" if learned else "scratch", min(FEW.get(sampler, MARKS[-1]), arguments.trials)
                key = f"{tasks}/{axes}/{start}/{way} {sampler}/{seed}"
                results.once(key, lambda p=problem, w=way, s=sampler, n=count, x=learned: Search(p, w, s, x).run(n))


def table(found: dict[str, dict[str, float]]) -> None:
    """Print what was measured, as Markdown."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, dict[str, float]]]] = {}
    best: dict[tuple[str, str, str], float] = {}
    for key, volumes in found.items():
        tasks, axes, start, way, seed = key.split("/")
        groups.setdefault((tasks, axes, start), {}).setdefault(way, {})[seed] = volumes
        best[tasks, axes, seed] = max(best.get((tasks, axes, seed), 0.0), *volumes.values())
    for (tasks, axes, start), ways in sorted(groups.items()):
        marks = " | ".join(map(str, MARKS))
        own = PRODUCT[start]
        print(f"\n{tasks} tasks, {axes} coefficients, {start}\n\n| way | start | {marks} | less {own} | seeds |")
        print("|---" * (len(MARKS) + 4) + "|")
        for way, by_seed in ways.items():
            shares = {s: {m: v / best[tasks, axes, s] for m, v in each.items()} for s, each in by_seed.items()}
            cells = [interval([v[str(m)] for v in shares.values() if str(m) in v], 2) for m in (0, *MARKS)]
            rival = ways.get(own, {})
            less = []  # at the last mark that both have
            for seed in by_seed.keys() & rival.keys() if way != own else ():
                mark = max(by_seed[seed].keys() & rival[seed].keys(), key=int)
                less.append((by_seed[seed][mark] - rival[seed][mark]) / best[tasks, axes, seed])
            print(f"| {way} | {' | '.join(cells)} | {interval(less, 2)} | {len(by_seed)} |")


def main() -> None:
    parser, running = command_line(__doc__, "pareto", 5, run, table)
    running.add_argument("--tasks", type=int, nargs="+", default=list(TASKS))
    running.add_argument("--axes", type=int, nargs="+", default=list(SPACES))
    running.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    running.add_argument("--samplers", nargs="+", default=["cma-es", "tpe", "gp", "nsga-ii", "nsga-iii"])
    running.add_argument("--starts", nargs="+", choices=["scratch", "learned"], default=["scratch", "learned"])
    running.add_argument("--trials", type=int, default=MARKS[-1])
    running.add_argument("--tiny", type=Path, default=ROOT / "benchmarks" / "tiny24.yaml")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
