"""What the samplers of benchmarks/samplers.py found in truth: their points, merged and scored.

    python benchmarks/true_samplers.py run --searches runs/samplers.json --trials 60
    python benchmarks/true_samplers.py table runs/true_samplers.json

The best point of each search of one worker after so many trials, the end of the learned start, and the best point found
by the holdout items are scored on the items of the surrogate, from which each seed deals the same search and holdout
items.  0 is the best baseline, 1 the point found by the holdout items.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from results import Results, command_line, interval
from samplers import BUDGETS, Problem
from surrogate import Scored, Surrogate, Vector, add_family, real_family, tiny_family

from evomerge.search.evaluation.scale import METRIC_SHARE


class Truth(Surrogate):
    """The models at any point, in the place of the smooth model."""

    def __init__(self, path: Path, family: Scored) -> None:
        super().__init__(path)
        self.family = family
        self.known = {point.tobytes(): scores for point, scores in zip(self.points, self.scores, strict=True)}

    def at(self, point: Vector) -> tuple[Vector, Vector]:
        """Objectives and margins of all items at a point, each (items,)."""
        key = point.tobytes()
        if key not in self.known:
            self.known[key] = self.family.scores(point)
        return tuple(self.known[key])


def searched(found: dict[str, Any], dimensions: int, seed: int, trials: int) -> dict[str, dict[str, Any]]:
    """Way -> point, and the value and exact match that the smooth model gives it on the holdout items."""
    ends = found[f"ends/{dimensions}/{seed}"]
    points = {
        f"{end}/{end}": {"point": point, "value": ends[end], "metric": ends[f"{end} metric"]}
        for end, point in ends["points"].items()
    }
    number = BUDGETS.index(trials)
    for key, result in found.items():
        name, size, *rest = key.split("/")
        if name != "ends" and [size, *rest[1:]] == [f"{dimensions}", "1", f"{seed}"] and number < len(result["points"]):
            points[f"{name}/{rest[0]}"] = {
                "point": result["points"][number],
                "value": result["values"][number],
                "metric": result["metric"][number],
            }
    return points


def run(arguments: argparse.Namespace) -> None:
    """Measure what the file does not have yet."""
    truth = Truth(arguments.surrogate, (real_family if arguments.real else tiny_family)(arguments.family))
    results, found = Results(arguments.out), Results(arguments.searches).found
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        problem = Problem(truth, arguments.dimensions, seed, METRIC_SHARE)
        best = max(problem.given, key=problem.value)
        ways = searched(found, arguments.dimensions, seed, arguments.trials)
        ways["baseline/baseline"] = {"point": best, "value": found[f"ends/{arguments.dimensions}/{seed}"]["baseline"]}
        for way, known in ways.items():
            key = f"{way}/{arguments.dimensions}/{arguments.trials}/{seed}"
            results.once(key, lambda p=problem, k=known: scored(p, np.array(k["point"]), k["value"]))


def scored(problem: Problem, point: Vector, smooth: float) -> dict[str, float]:
    """Value and exact match on the holdout items; and the value by the smooth model."""
    return {"value": problem.value(point, "holdout"), "metric": problem.metric(point), "smooth": smooth}


def table(found: dict[str, Any]) -> None:
    """Print what was measured, as Markdown: means over seeds, and 95% intervals."""
    shown: dict[str, dict[str, list[float]]] = {}
    for key, result in found.items():
        name, start, *rest, seed = key.split("/")
        low, high = (found["/".join([end, end, *rest, seed])] for end in ("baseline", "optimum"))
        row = shown.setdefault("/".join([name, start, *rest]), {"value": [], "smooth": [], "metric": []})
        for which in ("value", "smooth"):
            row[which].append((result[which] - low[which]) / (high[which] - low[which]))
        row["metric"].append(result["metric"])
    pairs = np.array([(r["value"], r["smooth"]) for r in found.values()])
    print(f"\n{len(pairs)} points; correlation of value and smooth model {np.corrcoef(pairs.T)[0, 1]:.3f}\n")
    print("| found by | start | coefficients | trials | value | by the smooth model | exact match | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    for way, row in shown.items():
        cells = [interval(row["value"], 2), interval(row["smooth"], 2), interval(row["metric"]), str(len(row["value"]))]
        print(f"| {' | '.join([*way.split('/'), *cells])} |")


def main() -> None:
    parser, running = command_line(__doc__, "true_samplers", 10, run, table)
    add_family(running)
    running.add_argument("--searches", type=Path, default=Path("runs/samplers.json"))
    running.add_argument("--dimensions", type=int, default=24)
    running.add_argument("--trials", type=int, choices=BUDGETS, default=60)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
