"""How a sampler best looks for the front of several tasks: hypervolumes at equal cost, on the tiny family.

    python examples/tiny/make.py runs/tiny
    python benchmarks/pareto.py run --seeds 5
    python benchmarks/pareto.py table runs/pareto.json

A problem is a number of tasks and of coefficients.  A trial's values are its tasks' mean objectives (`auto`) on ITEMS
items of each, scaled so that the base is 0 and the best parent 1; each seed draws other items.  A search begins with
the baselines, and `learned` also with the looks of a learned start that climbs by several weights.  Then a way proposes
the trials:

own            the sampler maximises the mean of the tasks
turns          each trial by the next one of the learned start's weights (`climbs`); a distribution of CMA-ES for each
later          FIRST trials by the mean of the tasks, then turns
several        a sampler that is told one value a task: the GP of evomerge maximises logEHVI, NSGA keeps POPULATION
several first  GP_FRONT trials of that GP, then turns

The table has the hypervolume after so many of these trials, as a share of the best that any search of the same problem
and seed reached, and at the end the mean difference to what evomerge does (PRODUCT).
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import torch
from objectives import CANDIDATES
from results import ROOT, Results, command_line, interval
from small_family import Rows, SmallFamily
from torch import Tensor

from evomerge.config.config_file import load_config
from evomerge.config.running import SamplerConfig
from evomerge.search.evaluation.scale import SCALE, Line, Scale, TaskScale
from evomerge.search.learned.climbs import Weights, climbs, distance
from evomerge.search.learned.learn import AVERAGED, ITEMS, RATE
from evomerge.search.learned.minibatches import minibatch
from evomerge.search.learned.steps import Climber, average
from evomerge.search.samplers import front
from evomerge.search.samplers.auto import CHOSEN, GP_FRONT, UNTIL
from evomerge.search.samplers.sampler_kind import trial_seed
from evomerge.search.space.space import Point, Space
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.item_scores import pack
from evomerge.search.storage.study import Begun, LearnedPoint, SearchStudy
from evomerge.search.storage.trial_record import TrialRecord
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
PRODUCT = {"learned": "turns cma-es", "scratch": "later cma-es"}  # what evomerge does where trials are cheap
MARKS = (30, 60, 100, 200)
FORMULA = CANDIDATES["token mean floored -6"]
WAYS = {
    "own": ("cma-es", "tpe", "gp"),
    "turns": ("cma-es", "tpe"),
    "later": ("cma-es", "tpe"),
    "several": ("nsga-ii", "nsga-iii", "tpe", "gp"),
    "several first": ("cma-es",),
}
OTHERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "nsga-ii": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
    "nsga-iii": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=POPULATION),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
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
    def learned(self) -> list[tuple[Point, Weights | None, Values]]:
        """The looks of a learned start, with the weights that they were learned by."""
        found: list[tuple[Point, Weights | None, Values]] = []
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
                    found.append((mean, climb.own_weights, self(mean)))
            reached.append((climb.weights, found[-1][0]))
        return found


class Search:
    """One search of a problem, by the study and the samplers of evomerge.

    way, sampler: see the module.
    learned: whether it begins with a learned start.
    folder: of its database.
    """

    def __init__(self, problem: Problem, way: str, sampler: str, learned: bool, folder: Path) -> None:
        self.problem, self.learned = problem, learned
        own = problem.family.space
        goals: Literal["mean", "pareto"] = "mean" if way == "own" else "pareto"
        config = own.config.model_copy(
            update={
                "goals": goals,
                "seed": problem.seed,
                "sampler": SamplerConfig(name="gp" if way == "several" else "auto"),
            }
        )
        stored = open_study(sqlite_url(folder / "study.db"), "pareto", create=True)
        self.scale = Scale({t: TaskScale(1.0, 0.0, Line("m"), Line("m")) for t in problem.tasks})
        stored.set_user_attr(SCALE, self.scale.to_json())
        stored.set_user_attr(CHOSEN, sampler)
        self.study = SearchStudy(stored, Space(config, own.layers, own.groups))
        self.values: list[Values] = []
        for number, (point, values) in enumerate(problem.baselines):
            self.finish(self.study.begin((f"baseline {number}", point)), values)
        for steps, (point, weights, values) in enumerate(problem.learned if learned else []):
            self.finish(self.study.begin(None, LearnedPoint(steps, point, weights)), values)
        if way == "several first":
            stored.set_user_attr(UNTIL, self.study.size + GP_FRONT)
        front.FIRST = FIRST if way == "later" else 0
        if way == "several" and sampler in OTHERS:
            made = front.FrontSampler(own.axes, self.scale, self.other, False, self.other, math.inf)
            self.study.kept_sampler, self.make = made, OTHERS[sampler]

    def other(self, number: int) -> optuna.samplers.BaseSampler:
        """A sampler for several goals that is not evomerge's."""
        return self.make(trial_seed(self.problem.seed, number))

    def run(self, count: int) -> dict[str, float]:
        """The hypervolume after the given trials and after so many more, up to `count`; `ms` of a proposal."""
        volumes, seconds = {"0": self.volume()}, []
        for number in range(1, count + 1):
            began = time.process_time()
            trial = self.study.begin(None)
            seconds.append(time.process_time() - began)
            self.finish(trial, self.problem(trial.params))
            if number in MARKS:
                volumes[str(number)] = self.volume()
                volumes[f"{number} ms"] = 1000 * float(np.mean(seconds))
        return volumes

    def finish(self, trial: Begun, values: Values) -> None:
        """Store the values of a trial."""
        scores = {t: {"m": [v]} for t, v in zip(self.problem.tasks, values, strict=True)}
        record = TrialRecord(items="i", scores={t: {"m": pack(v["m"])} for t, v in scores.items()})
        self.study.finish(trial, self.scale.value(scores), record)
        self.values.append(values)

    def volume(self) -> float:
        return hypervolume(np.array(self.values))


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
                results.once(key, partial(searched, problem, way, sampler, learned, count))


def searched(problem: Problem, way: str, sampler: str, learned: bool, count: int) -> dict[str, float]:
    """The result of one search."""
    with tempfile.TemporaryDirectory() as folder:
        return Search(problem, way, sampler, learned, Path(folder)).run(count)


def table(found: dict[str, dict[str, float]]) -> None:
    """Print what was measured, as Markdown."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, dict[str, float]]]] = {}
    best: dict[tuple[str, str, str], float] = {}
    for key, volumes in found.items():
        tasks, axes, start, way, seed = key.split("/")
        groups.setdefault((tasks, axes, start), {}).setdefault(way, {})[seed] = volumes
        reached = [v for mark, v in volumes.items() if "ms" not in mark]
        best[tasks, axes, seed] = max(best.get((tasks, axes, seed), 0.0), *reached)
    for (tasks, axes, start), ways in sorted(groups.items()):
        marks = " | ".join(map(str, MARKS))
        own = PRODUCT[start]
        print(f"\n{tasks} tasks, {axes} coefficients, {start}\n\n| way | start | {marks} | less {own} | ms | seeds |")
        print("|---" * (len(MARKS) + 5) + "|")
        for way, by_seed in ways.items():
            shares = {s: {m: v / best[tasks, axes, s] for m, v in each.items()} for s, each in by_seed.items()}
            cells = [interval([v[str(m)] for v in shares.values() if str(m) in v], 2) for m in (0, *MARKS)]
            rival = ways.get(own, {})
            less = []  # at the last mark that both have
            for seed in by_seed.keys() & rival.keys() if way != own else ():
                mark = max({str(m) for m in MARKS} & by_seed[seed].keys() & rival[seed].keys(), key=int)
                less.append((by_seed[seed][mark] - rival[seed][mark]) / best[tasks, axes, seed])
            own_time = [max((m for m in v if "ms" in m), key=lambda m: int(m.split()[0])) for v in by_seed.values()]
            spent = np.mean([v[m] for v, m in zip(by_seed.values(), own_time, strict=True)])
            print(f"| {way} | {' | '.join(cells)} | {interval(less, 2)} | {spent:.0f} | {len(by_seed)} |")


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
