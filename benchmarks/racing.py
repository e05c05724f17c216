"""What racing saves and what it risks, on the item scores of finished searches.

    python examples/tiny/make.py runs/tiny
    evomerge search benchmarks/tiny.yaml --trials 200 --run runs/logprob
    sed 's/gold_logprob/exact_match/; s/name: quickstart/name: exact/' benchmarks/tiny.yaml > configs/exact.yaml
    evomerge search configs/exact.yaml --trials 200 --run runs/exact
    python benchmarks/racing.py runs/logprob runs/exact

Equal candidates: three incumbents of the run (its best trial, its median one, its best baseline), each against
candidates whose value is made equal to its own:
  swapped   its scores and another trial's, exchanged on random items; whichever of the two is the better
            is then lowered by the same amount on every item until the values are equal
  jackpot   the same gap below the incumbent on every item, made up for by a few items at the ceiling: the most
            skewed differences there are
  identical its own scores
Each is raced in a new random order.  The repeated Wilcoxon test (p = .1 after every chunk, if the mean so far is
negative) stands beside it for context.

A gap of ten points: pairs of trials whose values differ by 0.08 to 0.12, the worse one raised or lowered by the same
amount on every item to make it 0.10, on the run's own scores if they lie in [0, 1], else on exp(score).

The recorded search: its trials in their own order, each raced against the best one that was evaluated in full,
with the full ones before it as history; baselines are never raced.  What is resampled is the item order and, in the
second line, also the items (bootstrap within each task).  The same winner: the best of the full ones is the trial
that is best without racing on the same items.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from evomerge.evaluate.racing import ALPHA, Order, Race, Vector, ceiling, chunks, item_weights, race_order
from evomerge.search.run import open_run
from evomerge.search.storage.item_scores import objective_scores
from evomerge.search.storage.study import in_full
from evomerge.search.storage.trial_record import record_of

Matrix = NDArray[np.float64]
ALPHAS = (0.02, 0.05, 0.1)


@dataclass(frozen=True)
class Recorded:
    """scores: (T, N) of the finished trials, task after task.  baselines: which of them are.  tasks: name -> items."""

    scores: Matrix
    baselines: list[int]
    tasks: dict[str, int]
    weights: Vector
    ceiling: Vector

    def order(self, seed: int, informative: bool) -> Order:
        ids = [f"{task}:{k}" for task, n in self.tasks.items() for k in range(n)]
        return race_order(ids, self.weights, seed, self.scores[self.baselines] if informative else None, self.ceiling)

    @property
    def values(self) -> Vector:
        return self.scores @ self.weights

    def resampled(self, rng: np.random.Generator) -> "Recorded":
        """The items drawn anew within each task."""
        sizes = np.array(list(self.tasks.values()))
        starts = sizes.cumsum() - sizes
        columns = np.concatenate([k + rng.integers(n, size=n) for k, n in zip(starts, sizes, strict=True)])
        return replace(self, scores=self.scores[:, columns])


def read(folder: Path) -> tuple[Recorded, str]:
    """The finished trials of a finished run, and what they were scored by."""
    run = open_run(folder)
    study = run.study()
    tasks = json.loads(run.verdict_file.read_text(encoding="utf-8"))["tasks"]
    trials = [t for t in study.trials if in_full(t)]
    if any(record_of(t).partial is not None for t in study.trials):
        sys.exit(f"{folder}: its candidates were raced; record a search with `racing: false`")
    baselines = [k for k, t in enumerate(trials) if "baseline" in t.user_attrs]
    by_task = {name: np.array([objective_scores(t)[name] for t in trials]) for name in tasks}
    counts = {name: found.shape[1] for name, found in by_task.items()}
    weights = item_weights({name: task["weight"] for name, task in tasks.items()}, counts)
    tops = [np.full(n, ceiling(tasks[name]["objective"], by_task[name][baselines])) for name, n in counts.items()]
    recorded = Recorded(
        np.concatenate(list(by_task.values()), axis=1), baselines, counts, weights, np.concatenate(tops)
    )
    return recorded, ", ".join(sorted({task["objective"] for task in tasks.values()}))


Racer = Callable[[Order, Vector, Vector, Vector, Matrix | None], float]
"""(order, incumbent, candidate, ceiling, history) -> the share of the items after which it was stopped, 1 if never."""


def betting(
    order: Order, incumbent: Vector, candidate: Vector, top: Vector, history: Matrix | None, alpha: float = ALPHA
) -> float:
    race = Race(order, incumbent, top, history, alpha)
    for chunk in chunks(order):
        if race.observe(candidate[chunk]):
            return race.estimate().fraction
    return 1.0


def repeated_wilcoxon(order: Order, incumbent: Vector, candidate: Vector, top: Vector, history: Matrix | None) -> float:
    d = (candidate - incumbent)[order.items]
    seen = 0
    for chunk in chunks(order)[:-1]:
        seen += len(chunk)
        if d[:seen].mean() < 0 and wilcoxon(d[:seen], alternative="less").pvalue < 0.1:
            return seen / len(d)
    return 1.0


def swapped(data: Recorded, incumbent: int, rng: np.random.Generator) -> tuple[Vector, Vector]:
    """A pair of equal value: two trials' scores exchanged on random items, the better one lowered everywhere."""
    other = rng.choice([k for k in range(len(data.scores)) if k != incumbent])
    swap = rng.random(len(data.weights)) < 0.5
    one = np.where(swap, data.scores[incumbent], data.scores[other])
    two = np.where(swap, data.scores[other], data.scores[incumbent])
    gap = data.weights @ (one - two)
    return one - max(0.0, gap), two - max(0.0, -gap)


def jackpot(data: Recorded, incumbent: int, rng: np.random.Generator) -> tuple[Vector, Vector]:
    """A pair of equal value: a few items at the ceiling pay for a small loss on all the others."""
    own = data.scores[incumbent]
    gains = data.weights * (data.ceiling - own)
    few = rng.permutation(np.flatnonzero(gains > 0))[: max(1, int(0.01 * len(own)))]
    lucky = np.isin(np.arange(len(own)), few)
    loss = gains[lucky].sum() / data.weights[~lucky].sum()
    return own, np.where(lucky, data.ceiling, own - loss)


def identical(data: Recorded, incumbent: int, rng: np.random.Generator) -> tuple[Vector, Vector]:
    return data.scores[incumbent], data.scores[incumbent]


def false_stops(data: Recorded, repeats: int) -> None:
    ranked = np.argsort(data.values)
    best_baseline = max(data.baselines, key=lambda k: data.values[k])
    incumbents = {"best": int(ranked[-1]), "median": int(ranked[len(ranked) // 2]), "baseline": best_baseline}
    racers: dict[str, Racer] = {f"{a:g}": partial(betting, alpha=a) for a in ALPHAS}
    racers["Wilcoxon"] = repeated_wilcoxon
    print("equal candidates stopped       " + "".join(f"{name:>10}" for name in racers))
    for make in (swapped, jackpot, identical):
        for name, incumbent in incumbents.items():
            count = repeats if make is not identical else repeats // 20
            stopped = dict.fromkeys(racers, 0)
            for seed in range(count):
                one, two = make(data, incumbent, np.random.default_rng(seed))
                order = data.order(seed, informative=True)
                history = data.scores[[k for k in ranked[-40:] if k != incumbent]] if seed % 2 else None
                for racer, race in racers.items():
                    stopped[racer] += race(order, one, two, data.ceiling, history) < 1
            cells = "".join(f"{n / count:10.2%}" for n in stopped.values())
            print(f"  {make.__name__:10} {name:9} ({count:5})" + cells, flush=True)


def ten_points(data: Recorded, repeats: int) -> None:
    if data.scores.max() <= 0:
        data = replace(data, scores=np.exp(data.scores), ceiling=np.exp(data.ceiling))
    rng = np.random.default_rng(0)
    values = data.values
    pairs = [(a, b) for a in range(len(values)) for b in range(len(values)) if 0.08 <= values[a] - values[b] <= 0.12]
    if not pairs:
        print("ten points: no two trials are that far apart")
        return
    chosen = [pairs[k] for k in rng.integers(len(pairs), size=repeats)]
    for label, informative, known in (
        ("default", True, True),
        ("no history", True, False),
        ("no history, uninformed order", False, False),
    ):
        shares = []
        for seed, (a, b) in enumerate(chosen):
            worse = data.scores[b] + (values[a] - values[b] - 0.1)
            history = data.scores[[k for k in range(len(values)) if k not in (a, b)][:32]] if known else None
            shares.append(betting(data.order(seed, informative), data.scores[a], worse, data.ceiling, history))
        found = np.array(shares)
        print(
            f"ten points, {label:30} {np.mean(found <= 0.35):7.1%} stopped by 35% of the items; "
            f"median {np.median(found):.1%}, 90% by {np.quantile(found, 0.9):.1%}   "
            f"({repeats} races, {len(pairs)} pairs)",
            flush=True,
        )


@dataclass
class Replay:
    """share: item evaluations over those without racing.  errors: of the values told, shrunk and plain, per stop."""

    share: float
    same: bool
    errors: list[tuple[float, float]]


def replay(data: Recorded, order: Order, racer: Racer | None) -> Replay:
    """The recorded search, raced; `racer` None is the race itself with its estimates."""
    values, best = data.values, -1
    full: list[int] = []
    shares: list[float] = []
    errors: list[tuple[float, float]] = []
    for k, scores in enumerate(data.scores):
        share = 1.0
        if k not in data.baselines:
            history = data.scores[[j for j in full if j != best]]
            if racer:
                share = racer(order, data.scores[best], scores, data.ceiling, history)
            else:
                race = Race(order, data.scores[best], data.ceiling, history)
                if any(race.observe(scores[chunk]) for chunk in chunks(order)):
                    found = race.estimate()
                    seen = order.items[: len(race.d)]
                    plain = values[best] + np.mean(scores[seen] - data.scores[best][seen])
                    share = found.fraction
                    errors.append((found.value - values[k], plain - values[k]))
        shares.append(share)
        if share == 1:
            full.append(k)
            best = k if best < 0 or values[k] > values[best] else best
    return Replay(float(np.mean(shares)), best == int(np.argmax(values)), errors)


def searches(data: Recorded, repeats: int) -> None:
    without_history: Racer = lambda order, one, two, top, history: betting(order, one, two, top, None)  # noqa: E731
    for label, bootstrap, informative, racer, count in (
        ("orders", False, True, None, repeats),
        ("orders and items", True, True, None, repeats),
        ("orders, uninformed", False, False, None, repeats // 4),
        ("orders, no history", False, True, without_history, repeats // 4),
        ("orders, Wilcoxon", False, True, repeated_wilcoxon, repeats // 10),
    ):
        found = []
        for seed in range(count):
            drawn = data.resampled(np.random.default_rng(seed)) if bootstrap else data
            found.append(replay(drawn, drawn.order(seed, informative), racer))
        shares = np.array([r.share for r in found])
        line = f"search, {label:20} {1 / shares.mean():5.2f}x fewer item evaluations "
        line += (
            f"({1 / shares.max():.2f} to {1 / shares.min():.2f}), same winner {np.mean([r.same for r in found]):6.1%}"
        )
        if errors := [e for r in found for e in r.errors]:
            told, plain = np.sqrt(np.mean(np.square(errors), axis=0))
            line += f", error of a stopped value {told:.4f} (plain mean {plain:.4f})"
        print(f"{line}   ({count} runs)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--repeats", type=int, default=200, help="resampled runs; 3 times as many single races per row")
    args = parser.parse_args()
    print(f"{platform.machine()}, numpy {np.__version__}, alpha {ALPHA:g} where none is said")
    for folder in args.runs:
        data, objectives = read(folder)
        counts = ", ".join(f"{name} {n}" for name, n in data.tasks.items())
        spread = f"values {data.values.min():.3f} to {data.values.max():.3f}"
        print(f"\n{folder.name}: {len(data.scores)} trials, {objectives}, {spread}, items: {counts}")
        false_stops(data, 3 * args.repeats)
        ten_points(data, 3 * args.repeats)
        searches(data, args.repeats)


if __name__ == "__main__":
    main()
