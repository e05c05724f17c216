"""How often the verdict is wrong: coverage of its intervals, winners by luck, and the gains that it sees.

    python benchmarks/verdict.py [--repeats 4000]

Every cell draws score tables from a known truth and asks `evomerge.search.verdict.intervals` and `judge`.  Columns of
coverage: the share of intervals wholly above and wholly below the truth (5% each at most), next to a plain percentile
bootstrap at the same level.  Kinds of scores: right or wrong at a chance of .02, .5 or .97; normal; heavy-tailed
(normal with deviation 0.3, and 3% of the items lose 8).
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from evomerge.search.verdict import intervals as module
from evomerge.search.verdict.intervals import DRAWS, Interval, Range, intervals, ranges_of_differences, score_range
from evomerge.search.verdict.verdict import Rival, judge

Scores = NDArray[np.float64]
KINDS = ("right .02", "right .5", "right .97", "normal", "heavy")
ITEMS = (20, 50, 100, 200, 800)
TASKS = (1, 4)
RIVALS = (1, 3, 8)
WEIGHTS = {tasks: {f"task {k}": 1.0 for k in range(tasks)} for tasks in TASKS}
SHARED = 0.6  # of the items two models always answer alike
BATCH = 200  # tables that share their draws
HEAVY_LOSS, HEAVY_SHARE = 8.0, 0.03


def truth(kind: str) -> float:
    """The mean of a kind of scores."""
    if kind.startswith("right"):
        return float(kind.split()[1])
    return -HEAVY_LOSS * HEAVY_SHARE if kind == "heavy" else 0.0


def draw(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Scores:
    """Item scores."""
    if kind.startswith("right"):
        return (rng.random(shape) < truth(kind)).astype(float)
    if kind == "normal":
        return rng.normal(0, 1, shape)
    return rng.normal(0, 0.3, shape) - HEAVY_LOSS * (rng.random(shape) < HEAVY_SHARE)


def models(kind: str, rng: np.random.Generator, count: int, items: int) -> Scores:
    """Scores of equally good models on the same items, (count, items); they agree on some."""
    common, own = draw(kind, rng, (1, items)), draw(kind, rng, (count, items))
    return np.where(rng.random((1, items)) < SHARED, common, own)


def metric(kind: str) -> str:
    return "acc" if kind.startswith("right") else "gold_logprob"


def split(scores: Scores, tasks: int) -> dict[str, list[float]]:
    """One model's items as tables of that many tasks."""
    return {f"task {k}": part.tolist() for k, part in enumerate(np.array_split(scores, tasks))}


def plain(items: Scores, rng: np.random.Generator) -> tuple[Scores, Scores]:
    """The ends of the percentile bootstrap (Efron 1979) of tables of one task, (n, C)."""
    counts = rng.multinomial(len(items), np.full(len(items), 1 / len(items)), size=2000) / len(items)
    low, high = np.quantile(counts @ items, [0.05, 0.95], axis=0)
    return low, high


def batches(repeats: int) -> Iterator[int]:
    """Seeds of batches of tables."""
    return iter(range(0, repeats, BATCH))


def coverage(kind: str, count: int, tasks: int, differences: bool, repeats: int) -> str:
    """One row of the table of intervals, without its name."""
    above = below = plain_above = plain_below = width = total = 0.0
    for seed in batches(repeats):
        rng = np.random.default_rng([seed, count, tasks, differences])
        pairs = [models(kind, rng, 2, count) for _ in range(BATCH)]
        tables = [p[1] - p[0] if differences else p[0] for p in pairs]
        real = 0.0 if differences else truth(kind)
        found: list[Interval] = []
        for pair, table in zip(pairs, tables, strict=True):
            seen = [split(p, tasks) for p in pair]
            ranges: dict[str, Range | None] = {
                task: score_range(metric(kind), [s[task] for s in seen]) for task in seen[0]
            }
            if any(r is None for r in ranges.values()):
                return f"{'no interval: fewer than 100 items a task':>52s}"
            found += intervals(
                [split(table, tasks)], ranges_of_differences(ranges) if differences else ranges, WEIGHTS[tasks], 0
            )
        lows, highs = (np.array([getattr(f, end) for f in found]) for end in ("low", "high"))
        low, high = plain(np.array(tables).T, rng)
        above, below = above + np.sum(lows > real + 1e-9), below + np.sum(highs < real - 1e-9)
        plain_above, plain_below = plain_above + np.sum(low > real + 1e-9), plain_below + np.sum(high < real - 1e-9)
        width, total = width + float(np.sum(highs - lows)), total + BATCH
    shares = " ".join(f"{100 * x / total:5.1f}" for x in (above, below))
    shares_plain = " ".join(f"{100 * x / total:5.1f}" for x in (plain_above, plain_below))
    return f"{shares}   {width / total:7.3f}   {shares_plain}"


def false_winners(kind: str, count: int, tasks: int, rivals: int, repeats: int) -> float:
    """How often one of several equal models is called the winner over the others."""
    wins = 0
    for seed in range(repeats):
        rng = np.random.default_rng([seed, count, tasks, rivals])
        tables = [split(m, tasks) for m in models(kind, rng, 1 + rivals, count)]
        others = [Rival(f"rival {k}", "parent", table) for k, table in enumerate(tables[1:])]
        metrics = dict.fromkeys(tables[0], metric(kind))
        wins += judge(tables[0], others, metrics, WEIGHTS[tasks], seed).winner
    return wins / repeats


def optimism(count: int, rivals: int, repeats: int, chosen_on_selection: bool) -> float:
    """By how much the holdout score of the best of equal baselines is too good, in points."""
    rng = np.random.default_rng(0)
    total = 0.0
    for _ in range(repeats):
        selection, holdout = models("right .5", rng, rivals, count), models("right .5", rng, rivals, count)
        best = int(np.argmax((selection if chosen_on_selection else holdout).mean(axis=1)))
        total += float(holdout[best].mean()) - 0.5
    return 100 * total / repeats


def table(title: str, rows: Iterator[str]) -> None:
    print(f"\n{title}")
    for row in rows:
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=4000, help="tables a cell")
    parser.add_argument("--draws", type=int, default=1000, help=f"bootstrap draws (a verdict takes {DRAWS:,})")
    arguments = parser.parse_args()
    module.DRAWS = arguments.draws
    repeats = arguments.repeats
    head = f"{'scores':10s} {'of':10s} {'tasks':>5s} {'items':>5s}"

    def rows(row: Callable[..., str], *axes: tuple[object, ...]) -> Iterator[str]:
        return (row(*cell) for cell in product(*axes))

    def covered(kind: str, differences: bool, tasks: int, count: int) -> str:
        what = "difference" if differences else "model"
        return f"{kind:10s} {what:10s} {tasks:5d} {count:5d}   {coverage(kind, count, tasks, differences, repeats)}"

    title = f"{head}   {'above':>5s} {'below':>5s}   {'width':>7s}   plain bootstrap above, below (%)"
    table(title, rows(covered, KINDS, (False, True), TASKS, ITEMS))

    def lucky(kind: str, tasks: int, count: int) -> str:
        found = " ".join(f"{100 * false_winners(kind, count, tasks, r, repeats // 4):5.1f}" for r in RIVALS)
        return f"{kind:10s} {'':10s} {tasks:5d} {count:5d}   {found}"

    title = f"{head}   called winner though all are equal (%), against {', '.join(map(str, RIVALS))} rivals"
    table(title, rows(lucky, KINDS, TASKS, (50, 200, 800)))

    def too_good(rivals: int) -> str:
        found = (optimism(200, rivals, repeats, chosen) for chosen in (False, True))
        return f"{rivals:5d} equal baselines   " + "   ".join(f"{x:+.2f}" for x in found)

    title = "Points by which the best baseline's score is too good: chosen on holdout, on selection (200 items)"
    table(title, rows(too_good, RIVALS))

    def needed(gain: float) -> str:
        return f"{gain:5.2f}   " + "   ".join(f"{items_for(gain, changed):6,d}" for changed in (0.2, 0.4))

    title = "Items for a gain in accuracy to be shown four times in five, if 20% or 40% of the items change"
    table(title, rows(needed, (0.02, 0.05, 0.1)))


def items_for(gain: float, changed: float) -> int:
    """How many items show a gain in accuracy, if two models differ on a share of them."""
    return int(np.ceil((module.STANDARD_ERRORS / gain) ** 2 * (changed - gain**2)))


if __name__ == "__main__":
    main()
