"""Which objective leads to the best metric: rank correlations, and what searches of equal cost reach.

    python examples/tiny/make.py runs/tiny && python examples/mixed/make.py runs/mixed
    python benchmarks/objectives.py run benchmarks/tiny24.yaml configs/mixed.yaml --out runs/objectives.json
    python benchmarks/objectives.py table runs/objectives.json

Every candidate is a formula for generation and one for multiple choice.  Each task is scaled so that the base is 0 and
the best parent is 1, as a search does it, unless the candidate's name says `raw`.

correlation   Spearman's, over random points, baselines and points near a good one, between the mean objective on the
              search items and the mean metric on the holdout items; and among the better half by metric alone
gradient      the metric on the holdout items of the mean of the last 30% of Adam's steps, from the best parent

learned       the metric on the holdout items after the learned start of a search (`--learned`), from `--starts`, by a
              named objective in the place of `auto` of generation tasks; for models of every size

`run` skips what the file has already, so a long run can be done in parts.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimizers import Family, by_steps
from results import Results, command_line, interval
from scipy.stats import spearmanr
from small_family import Answers, SmallFamily, Vector
from torch import Tensor

from evomerge.evaluate.metrics import CHOSEN
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.learned.learn import RATE, STEPS
from evomerge.search.learned.steps import Climber

Formula = Callable[[Answers], Tensor]
"""Answers -> (N,) item values."""


def tokens_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) the mean of (N, T) values over an answer's tokens."""
    return values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)


def floored(logprob: Tensor, floor: float) -> Tensor:
    """log((p + e) / (1 + e)), e = exp(floor)."""
    return torch.logaddexp(logprob, logprob.new_tensor(floor)) - np.log1p(np.exp(floor))


def choice_logprob(answers: Answers) -> Tensor:
    """(N,) the log-softmax over the choices at the gold one."""
    assert answers.choices is not None
    assert answers.gold is not None
    return answers.choices.log_softmax(1).gather(1, answers.gold[:, None])[:, 0]


def choice_margin(answers: Answers) -> Tensor:
    """(N,) the gold choice's log-likelihood minus the best other one's."""
    assert answers.choices is not None
    assert answers.gold is not None
    right = answers.choices.gather(1, answers.gold[:, None])
    return (right - answers.choices.scatter(1, answers.gold[:, None], -torch.inf).amax(1, keepdim=True))[:, 0]


def by_kind(generation: Formula, choice: Formula) -> Formula:
    """One formula for tasks with choices, one for the others."""
    return lambda answers: generation(answers) if answers.choices is None else choice(answers)


def whole(answers: Answers) -> Tensor:
    """(N,) the gold answer's log-probability."""
    return answers.logprobs.sum(1)


def per_token(answers: Answers) -> Tensor:
    """(N,) the gold answer's log-probability per token."""
    return tokens_mean(answers.logprobs, answers.mask)


def per_root_token(answers: Answers) -> Tensor:
    """(N,) the gold answer's log-probability, divided by the root of its number of tokens."""
    return whole(answers) / answers.mask.sum(1).sqrt()


def per_token_floored(floor: float) -> Formula:
    return lambda answers: tokens_mean(floored(answers.logprobs, floor), answers.mask)


def weakest(floor: float) -> Formula:
    """The least probable token of the gold answer."""
    return lambda answers: floored(answers.logprobs.masked_fill(~answers.mask, 0.0).amin(1), floor)


def smallest_margin(answers: Answers) -> Tensor:
    """(N,) the log-sigmoid of the smallest margin of a token."""
    return torch.nn.functional.logsigmoid(answers.margins.masked_fill(~answers.mask, torch.inf).amin(1))


def mean_margin(floor: float) -> Formula:
    """The mean over tokens of the floored log-sigmoid of the margin."""
    return lambda a: tokens_mean(floored(torch.nn.functional.logsigmoid(a.margins), floor), a.mask)


def half_and_half(floor: float) -> Formula:
    """The mean of the mean token and of the weakest token."""
    return lambda a: (per_token_floored(floor)(a) + weakest(floor)(a)) / 2


def choice_floored(floor: float) -> Formula:
    return lambda answers: floored(choice_logprob(answers), floor)


CANDIDATES: dict[str, Formula] = {
    "metric": lambda answers: answers.right(),
    "metric raw": lambda answers: answers.right(),
    "gold_logprob raw": whole,
    "gold_logprob": whole,
    "gold_prob": by_kind(lambda a: whole(a).exp(), lambda a: choice_logprob(a).exp()),
    "answer floored -6": by_kind(lambda a: floored(whole(a), -6.0), choice_floored(-6.0)),
    "token mean": by_kind(per_token, choice_logprob),
    "per root of tokens": by_kind(per_root_token, choice_logprob),
    "token mean floored -4": by_kind(per_token_floored(-4.0), choice_floored(-4.0)),
    "token mean floored -6": by_kind(per_token_floored(-6.0), choice_floored(-6.0)),
    "token mean floored -6 raw": by_kind(per_token_floored(-6.0), choice_floored(-6.0)),
    "token mean floored -8": by_kind(per_token_floored(-8.0), choice_floored(-8.0)),
    "weakest token -6": by_kind(weakest(-6.0), choice_floored(-6.0)),
    "mean and weakest -6": by_kind(half_and_half(-6.0), choice_floored(-6.0)),
    "smallest margin": by_kind(smallest_margin, lambda a: torch.nn.functional.logsigmoid(choice_margin(a))),
    "mean margin -6": by_kind(mean_margin(-6.0), choice_floored(-6.0)),
}


class Objective:
    """A candidate on a family: scaled values of answers.

    family: the models and items.
    name: of `CANDIDATES`.
    """

    def __init__(self, family: SmallFamily, name: str) -> None:
        self.formula, self.raw = CANDIDATES[name], name.endswith("raw")
        self.offset, self.unit = self.scale(family, self.formula)

    def scale(self, family: SmallFamily, formula: Formula) -> tuple[dict[str, float], dict[str, float]]:
        """Task -> the base's mean and what the best parent has more; 1 where no parent is better beyond noise."""
        offset, unit = {}, {}
        for task, base in family.known["base"]["search"].items():
            start = formula(base)
            gains = [formula(family.known[p]["search"][task]) - start for p in family.parents]
            best = max(gains, key=lambda g: g.mean().item())
            clear = best.mean() > 2 * best.std() / len(best) ** 0.5
            offset[task], unit[task] = start.mean().item(), best.mean().item() if clear else 1.0
        return offset, unit

    def task(self, name: str, answers: Answers) -> Tensor:
        """(N,) scaled item values."""
        values = self.formula(answers)
        return values if self.raw else (values - self.offset[name]) / self.unit[name]

    def mean(self, answers: Mapping[str, Answers]) -> float:
        """The mean over tasks."""
        return float(np.mean([self.task(name, found).mean().item() for name, found in answers.items()]))


class KnownFamily(SmallFamily):
    """With the answers of its baselines on search and holdout items: name -> split -> task -> answers."""

    def __init__(self, path: Path, items: int) -> None:
        from evomerge.config.config_file import load_config

        config = load_config(path)
        splits = config.splits.model_copy(update={"search": items, "selection": 60, "holdout": 200})
        super().__init__(config.model_copy(update={"splits": splits}))
        self.name = config.name
        self.parents = [b.name for b in self.baselines if b.kind == "parent"]
        self.known = {b.name: self.on_both(self.of_recipe(b.recipe)) for b in self.baselines}

    def on_both(self, values: dict[str, Tensor]) -> dict[str, dict[str, Answers]]:
        return {"search": self.score(values, "search"), "holdout": self.score(values, "holdout")}

    def start(self, objective: Objective) -> Vector:
        """The best baseline in the space by the objective, in the unit cube."""
        inside = [b for b in self.baselines if b.point is not None]
        best = max(inside, key=lambda b: objective.mean(self.known[b.name]["search"]))
        assert best.point is not None
        return self.unit(best.point)

    def holdout(self, unit: Vector) -> float:
        """The mean metric on the holdout items."""
        return self.metric(self.values(torch.as_tensor(np.clip(unit, 0, 1))), "holdout")


def mean_right(answers: Mapping[str, Answers]) -> float:
    return float(np.mean([a.right().mean().item() for a in answers.values()]))


def adam(family: KnownFamily, objective: Objective, seed: int, steps: int, batch: int) -> Vector:
    """The mean of the last 30% of the steps, in the unit cube; the rate falls from 0.06 by a cosine."""
    rng = np.random.default_rng(seed)
    theta = torch.tensor(family.start(objective), dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([theta], betas=(0.9, 0.99))
    orders: dict[str, list[int]] = {}
    late: list[Vector] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.06 * 0.5 * (1 + np.cos(np.pi * step / steps))
        values = family.values(theta)
        loss = torch.zeros(())
        for task in family.task_set.tasks:
            count = len(family.task_set.items[task.name]["search"])
            queue = orders.setdefault(task.name, [])
            if len(queue) < batch:
                queue += rng.permutation(count).tolist()
            picked, orders[task.name] = queue[:batch], queue[batch:]
            answers = family.answers(values, family.items(task.name, "search").pick(torch.tensor(picked)))
            loss = loss - objective.task(task.name, answers).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            theta.clamp_(0, 1)
        if step >= 0.7 * steps:
            late.append(theta.detach().numpy().copy())
    return np.mean(late, axis=0)


def points(family: KnownFamily, count: int, good: Vector) -> Iterator[Vector]:
    """Random points: a third anywhere, a third of small weights, a third on the way to a good point."""
    rng = np.random.default_rng(0)
    for k in range(count):
        anywhere = rng.random(len(good))
        if k % 3 == 0:
            yield anywhere
        elif k % 3 == 1:
            yield anywhere * rng.random()
        else:
            yield good + (anywhere - good) * rng.random() * 0.7


def correlations(family: KnownFamily, count: int) -> dict[str, dict[str, float]]:
    """Candidate -> Spearman's correlation over all points, over the better half, and by task."""
    good = adam(family, Objective(family, "token mean floored -6"), 0, 30, 24)
    seen = list(family.known.values())
    seen += [family.on_both(family.values(torch.as_tensor(u))) for u in points(family, count, good)]
    metric = np.array([mean_right(s["holdout"]) for s in seen])
    better = metric >= np.median(metric)
    found = {}
    for name in CANDIDATES:
        objective = Objective(family, name)
        value = np.array([objective.mean(s["search"]) for s in seen])
        row = {"all": rank(value, metric), "better half": rank(value[better], metric[better])}
        row["metric of its best"] = float(metric[np.argmax(value)])
        for task in family.known["base"]["search"]:
            mine = np.array([objective.task(task, s["search"][task]).mean().item() for s in seen])
            row[task] = rank(mine, np.array([s["holdout"][task].right().mean().item() for s in seen]))
        found[name] = row
    return found


def rank(one: Vector, two: Vector) -> float:
    """Spearman's correlation; 0 if one of them is constant."""
    return 0.0 if np.ptp(one) == 0 or np.ptp(two) == 0 else float(spearmanr(one, two).statistic)


def learned(path: Path, objective: str, start: str, seed: int) -> dict[str, float]:
    """What the learned start of a search reaches by an objective of generation tasks.  start: see `Family.starts`."""
    CHOSEN["auto"]["generate_until"] = objective
    family = Family(path, seed, 0.5, fine=False, objective="auto")
    family.take_scale()
    return by_steps(family, Climber, RATE, STEPS, family.starts(start))[""]


def run(arguments: argparse.Namespace) -> None:
    """Measure what the file does not have yet."""
    results = Results(arguments.out)
    if arguments.learned:
        if not arguments.answers:
            TaskSet.values_metric = lambda self, task: False  # type: ignore[method-assign]
        for path, objective, start in product(arguments.configs, arguments.learned, arguments.starts):
            way = objective if start == "0.5" else f"{objective} from {start}"
            for seed in range(arguments.first, arguments.first + arguments.seeds):
                results.once(f"{path.stem}/learned/{way}/{seed}", partial(learned, path, objective, start, seed))
        return
    names = [n for n in CANDIDATES if arguments.only is None or n in arguments.only]
    for path in arguments.configs:
        family = KnownFamily(path, arguments.items)
        where = family.name
        results.once(f"{where}/baselines", lambda f=family: {n: mean_right(k["holdout"]) for n, k in f.known.items()})
        results.once(f"{where}/correlation", lambda f=family: correlations(f, arguments.points))
        for seed, name in product(range(arguments.first, arguments.first + arguments.seeds), names):
            objective = Objective(family, name)

            def by_gradient(f: KnownFamily = family, o: Objective = objective, s: int = seed) -> float:
                return f.holdout(adam(f, o, s, arguments.steps, arguments.batch))

            if not name.startswith("metric"):
                results.once(f"{where}/gradient/{name}/{seed}", by_gradient)


def table(found: dict[str, Any]) -> None:
    """Print what was measured, as Markdown."""
    print_learned({key: value for key, value in found.items() if "/learned/" in key})
    for family in dict.fromkeys(key.split("/")[0] for key in found if key.endswith("/baselines")):
        base = found[f"{family}/baselines"]
        best = max(base, key=base.__getitem__)
        print(f"\n## {family}: holdout metric; best baseline {best} {base[best]:.3f}\n")
        print("| objective | rank correlation | better half | its best point | gradient | seeds |")
        print("|---|---|---|---|---|---|")
        for name in CANDIDATES:
            row = found[f"{family}/correlation"].get(name, {})
            cells = [f"{row[k]:.3f}" if row else "" for k in ("all", "better half", "metric of its best")]
            learned = [v for k, v in found.items() if k.startswith(f"{family}/gradient/{name}/")]
            print(f"| {name} | {' | '.join(cells)} | {interval(learned)} | {len(learned)} |")


def print_learned(found: Mapping[str, Any]) -> None:
    """Print what the learned start reached, and the paired differences to the first row of each family."""
    rows: dict[str, dict[str, dict[str, dict[str, float]]]] = {}  # family -> way -> seed -> values
    for key, values in found.items():
        family, _, way, seed = key.split("/")
        rows.setdefault(family, {}).setdefault(way, {})[seed] = values
    if rows:
        print("| family | objective | seeds | metric after the learned start | less the first | objective less it |")
        print("|---|---|---|---|---|---|")
    for family, each in rows.items():
        first = next(iter(each.values()))
        for way, by_seed in each.items():
            pairs = [(v, first[seed]) for seed, v in by_seed.items() if seed in first and by_seed is not first]
            less = [interval([own[k] - other[k] for own, other in pairs]) for k in ("metric", "objective")]
            cells = (family, way, str(len(by_seed)), interval([v["metric"] for v in by_seed.values()]), *less)
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser, running = command_line(__doc__, "objectives", 3, run, table)
    running.add_argument("configs", type=Path, nargs="+")
    running.add_argument("--items", type=int, default=100, help="search items of each task")
    running.add_argument("--points", type=int, default=60, help="for the correlations, beside the baselines")
    running.add_argument("--steps", type=int, default=40, help="of Adam")
    running.add_argument("--batch", type=int, default=24, help="items of each task a step")
    running.add_argument("--learned", nargs="*", help="named objectives; measure only what the learned start reaches")
    running.add_argument(
        "--starts", nargs="+", default=["0.5"], help="of the learned start: a number, uniform, baseline, race"
    )
    running.add_argument("--answers", action="store_true", help="baselines by answers too: slow in models of real size")
    running.add_argument("--only", nargs="*", help="names of candidates")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
