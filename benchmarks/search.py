"""What a search finds and what it costs, against other ways to search: the table of docs/explanation/search.md.

    python examples/tiny/make.py runs/tiny && python examples/mixed/make.py runs/mixed
    pip install cma                                        # for mergekit-evolve's setting
    python benchmarks/search.py run --rows evolve cma-es mixed equals --seeds 10 --out runs/proof.json
    python benchmarks/search.py run --rows smollm2 bad --smollm2 FOLDER --base FOLDER --out runs/proof.json
    python benchmarks/search.py table runs/proof.json

Rows, each against a floor that the same run measures on the same items:

evolve    cost to reach what mergekit-evolve's setting reaches with 100 evaluations: pycma, every source at 1/n, no
          bounds, sigma 1/6, whole generations, the task's metric as the objective
cma-es    cost to reach what CMA-ES of evomerge reaches with 200 trials
mixed     tasks of different kinds: the candidate's metric on the selection items less the best parent's
equals    sources that are equally good by construction: how often the verdict names no winner
smollm2   adapters of SmolLM2-135M: the candidate's metric on the holdout items, and the minutes until the verdict
bad       the same with one more adapter that has forgotten everything

Cost is counted in full evaluations of the search items: a trial costs the share of the items that it was scored on, a
gradient step of k items 3 k / N.  Only the sampler's own points and those of the gradient count, never a baseline.  The
value of a cost is what the best own point by then, by the search's own objective, has on the holdout items.

`run` skips what the file has already, so a long run can be done in parts; `--trials` and `--seeds` may differ.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import ROOT, Results, command_line, interval
from small_family import SmallFamily, with_changes

import evomerge
from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig
from evomerge.search.evaluation import scale
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.search.storage.trial_record import record_of
from evomerge.sources.tensor_names import PARTS

STEP_COST = 3.0  # of an item in a gradient step, in forwards
EVALUATIONS, TRIALS = 100, 200  # of the rivals
SAMPLERS = ("auto", "learned", "cma-es", "gp", "tpe")
EQUAL_SOURCES, NOISE = 3, 6.0  # deviation of an equal source's weights, relative to the task vector's
EQUAL_SKILL = "count"  # of the tiny family: the source that is copied, and the task
Point = dict[str, float]


@dataclass(frozen=True)
class Step:
    """A better point than all before: after what cost, where, and what it has on the holdout items.

    metric: mean accuracy or exact match.  logprob: the mean log-probability of the gold answer.
    """

    cost: float
    metric: float
    logprob: float


def value_of(family: SmallFamily, point: Point) -> tuple[float, float]:
    """The mean metric and the mean gold log-probability on the holdout items."""
    weights = torch.tensor(family.unit(point))
    answers = family.score(family.values(weights), "holdout")
    metric = np.mean([a.right().mean().item() for a in answers.values()])
    return float(metric), float(np.mean([a.logprobs.sum(1).mean().item() for a in answers.values()]))


# --- mergekit-evolve's setting ---


def evolve(family: SmallFamily, seed: int, evaluations: int) -> list[Step]:
    """pycma on the metric of the search items, from 1/n, without bounds; the better points in order."""
    import cma

    sources = len(family.config.sources)
    start = np.full(len(family.axes), 1.0 / sources)
    options = {"maxfevals": evaluations, "seed": seed + 1, "verbose": -9}
    optimizer = cma.CMAEvolutionStrategy(start, 1 / 6, options)
    best, cost, steps = -np.inf, 0, []
    while not optimizer.stop():
        asked = optimizer.ask()
        values = []
        for weights in asked:
            point = dict(zip(family.axes, weights.tolist(), strict=True))
            values.append(family.metric(family.values(torch.tensor(family.unit(point))), "search"))
            cost += 1
            if values[-1] > best:
                best = values[-1]
                steps.append(Step(cost, *value_of(family, point)))
        optimizer.tell(asked, [-v for v in values])
    return steps


# --- Searches of evomerge ---


def searched(config: SearchConfig) -> "tuple[evomerge.Run, float, Path]":
    """Search in a folder that is deleted by the caller; the run, its seconds and the folder."""
    folder = Path(tempfile.mkdtemp(prefix="evomerge-proof-"))
    started = time.perf_counter()
    run = evomerge.search(config, run=folder / "run", show=False)
    return run, time.perf_counter() - started, folder


def own_points(run: evomerge.Run, items: int) -> Iterator[tuple[float, Point]]:
    """(cost, point) whenever a point of the sampler or the gradient is better than all such points before.

    items: on the search split, N.
    """
    study = run.files.study()
    steps = [study.user_attrs[k]["items"] for k in sorted(study.user_attrs) if k.startswith("learned:")]
    taken, cost, best = 0, 0.0, -np.inf
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and "baseline" not in t.user_attrs]
    for trial in sorted(finished, key=lambda t: record_of(t).order or t.number):
        reached = int(trial.user_attrs.get("learned", taken))  # gradient steps before this trial
        cost += STEP_COST * sum(steps[taken:reached]) / items
        taken, record = max(taken, reached), record_of(trial)
        cost += 1.0 if record.partial is None else record.partial
        if record.in_full and trial.value is not None and trial.value > best:
            best = trial.value
            yield cost, dict(trial.params)


def searches(family: SmallFamily, config: SearchConfig) -> dict[str, Any]:
    """One search of a small family: its better points in order, its verdict, its seconds."""
    run, seconds, folder = searched(config)
    items = sum(len(s["search"]) for s in family.task_set.items.values())
    steps = [Step(cost, *value_of(family, point)) for cost, point in own_points(run, items)]
    found = judged(run) | {"steps": [vars(s) for s in steps], "seconds": seconds, "trials": len(run.trials)}
    shutil.rmtree(folder)
    return found


def judged(run: evomerge.Run) -> dict[str, Any]:
    """What the verdict says: winner or not, holdout and selection means of the candidate and the best parent."""
    content = json.loads(run.files.verdict_file.read_text(encoding="utf-8"))
    chosen = content["chosen"]["name"]
    selection = {entry["name"]: entry["selection_metric"] for entry in content["finalists"]}
    kinds = {entry["name"]: entry["kind"] for entry in content["finalists"]}
    parents = [name for name, kind in kinds.items() if kind == "parent"]
    rivals = [name for name, kind in kinds.items() if kind != "candidate"]
    verdict = run.verdict
    assert verdict is not None
    return {
        "winner": verdict.winner,
        "recommended": verdict.recommended,
        "chosen": chosen,
        "chosen_kind": kinds[chosen],
        "selection": selection[chosen],
        "score": verdict.score.value,
        "best_parent": max(selection[p] for p in parents),
        "best_baseline": max(selection[r] for r in rivals),
        "sentence": verdict.sentence,
        "weights": weights_of(run),
    }


def weights_of(run: evomerge.Run) -> dict[str, float]:
    """The mean weight of each source in the chosen recipe."""
    import yaml

    recipe = yaml.safe_load(run.files.winner_file.read_text(encoding="utf-8"))
    return {s["name"]: mean_number(s.get("parameters", {}).get("weight", 0.0)) for s in recipe["sources"]}


def mean_number(value: Any) -> float:
    """The mean of the numbers in nested lists and mappings."""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return float(np.mean([mean_number(p) for p in parts])) if isinstance(parts, list) else float(parts)


# --- Sources that are equally good ---


def equal_family(like: Path, source: str, folder: Path, seed: int) -> Path:
    """Write a base and EQUAL_SOURCES sources: copies of one source, each with noise of its own.

    like: a folder of a tiny family.
    """
    from safetensors.torch import load_file, save_file

    first = load_file(like / "base" / "model.safetensors")
    tuned = load_file(like / source / "model.safetensors")
    for k, name in enumerate(["base", *(f"copy{k}" for k in range(EQUAL_SOURCES))]):
        shutil.copytree(like / source, folder / name)
        generator = torch.Generator().manual_seed(1000 * seed + k)
        noisy = {}
        for key, tensor in tuned.items():
            size = NOISE * (tensor - first[key]).std()
            noisy[key] = tensor + size * torch.randn(tensor.shape, generator=generator)
        save_file(noisy, folder / name / "model.safetensors", {"format": "pt"})
    return folder


def equals(config: SearchConfig, like: Path, seed: int, trials: int) -> dict[str, Any]:
    """One search among equal sources, by a normalised mean of them: no point is better than all at the same weight.

    It is small, because a verdict's error rate does not depend on the numbers of items and trials.
    """
    with tempfile.TemporaryDirectory(prefix="evomerge-equals-") as place:
        folder = equal_family(like, EQUAL_SKILL, Path(place) / "family", seed)
        sources = [{"name": f"copy{k}", "path": str(folder / f"copy{k}")} for k in range(EQUAL_SOURCES)]
        space = {"granularity": "depth", "knots": 2, "weight": [0.05, 1.0], "normalize": True}
        changed = with_changes(
            config,
            name="equals",
            base=str(folder / "base"),
            sources=sources,
            method="linear",
            space=space,
            tasks=[{"task": t.task} for t in config.tasks if Path(t.task).stem == EQUAL_SKILL],
            seed=seed,
            splits={"search": 24, "selection": 24, "holdout": 60},
            budget={"trials": trials},
        )
        run, seconds, where = searched(changed)
        found = judged(run) | {"seconds": seconds}
        shutil.rmtree(where)
        return found


# --- SmolLM2 ---


def smollm2_config(arguments: argparse.Namespace, bad: bool, seed: int) -> SearchConfig:
    """The search of the adapters in a folder: `adapters/NAME` and `tasks/NAME.yaml`."""
    folder: Path = arguments.smollm2.resolve()
    names = sorted(p.name for p in (folder / "adapters").iterdir())
    sources = [{"name": n, "path": str(folder / "adapters" / n)} for n in names]
    if bad:
        sources.append({"name": "bad", "path": str(arguments.bad.resolve())})
    tasks = []
    for name in names:
        generates = "generate_until" in (folder / "tasks" / f"{name}.yaml").read_text(encoding="utf-8")
        gold = {"gold": "{{target}}<|im_end|>"} if generates else {}
        tasks.append({"task": str(folder / "tasks" / f"{name}.yaml")} | gold)
    content: dict[str, Any] = {
        "name": "smollm2",
        "base": str(arguments.base.resolve()),
        "sources": sources,
        "method": "task_arithmetic",
        "space": {"granularity": "layer", "components": list(PARTS), "weight": [-0.5, 2.0]},
        "tasks": tasks,
        "splits": {"search": 120, "selection": 30, "holdout": 150},
        "sampler": {"name": arguments.sampler},
        "budget": {"trials": 100, "timeout": arguments.timeout},
        "dtype": "bfloat16",
        "seed": seed,
    }
    return SearchConfig.model_validate(content)


def smollm2(arguments: argparse.Namespace, bad: bool, seed: int) -> dict[str, Any]:
    """One search of the adapters; the candidate's scores on the holdout items."""
    run, seconds, folder = searched(smollm2_config(arguments, bad, seed))
    content = json.loads(run.files.verdict_file.read_text(encoding="utf-8"))
    found = judged(run) | {"seconds": seconds, "holdout": content["holdout"]["winner"]}
    if arguments.keep is not None:
        shutil.move(folder / "run", arguments.keep / f"smollm2-{'bad' if bad else 'good'}-{seed}")
    shutil.rmtree(folder, ignore_errors=True)
    return found


# --- Running and printing ---


def set_share(share: float) -> None:
    """Give the metric another share in the values of trials; without any, trials are not scored by it."""
    scale.METRIC_SHARE = share
    if not share:
        TaskSet.values_metric = lambda self, task: False  # type: ignore[method-assign]


def run(arguments: argparse.Namespace) -> None:
    """Measure what the file does not have yet."""
    if {"smollm2", "bad"} & {*arguments.rows} and not (arguments.smollm2 and arguments.base):
        sys.exit("the rows smollm2 and bad need --smollm2 and --base")
    if "bad" in arguments.rows and not arguments.bad:
        sys.exit("the row bad needs --bad")
    results = Results(arguments.out)
    usual = arguments.share == scale.METRIC_SHARE
    set_share(arguments.share)
    labels = {o: o if usual else f"{o} share {arguments.share:g}" for o in arguments.objectives}
    small = [row for row in arguments.rows if row in ("evolve", "cma-es")]
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        if small:
            family = SmallFamily(with_changes(load_config(arguments.tiny), seed=seed))
            if "evolve" in small:
                results.once(
                    f"evolve/pycma {arguments.evaluations}/{seed}",
                    lambda f=family, s=seed: {"steps": [vars(x) for x in evolve(f, s, arguments.evaluations)]},
                )
            for objective in arguments.objectives:
                kept = with_changes(family.config, objective=None if objective == "metric" else objective)
                rival = with_changes(kept, sampler={"name": "cma-es"}, budget={"trials": arguments.rival})
                if "cma-es" in small:
                    key = f"cma-es/{labels[objective]} {arguments.rival}/{seed}"
                    results.once(key, lambda f=family, c=rival: searches(f, c))
                for name in arguments.samplers:
                    own = with_changes(kept, sampler={"name": name}, budget={"trials": arguments.trials})
                    key = f"tiny/{name} {labels[objective]} {arguments.trials}/{seed}"
                    results.once(key, lambda f=family, c=own: searches(f, c))
        if "mixed" in arguments.rows:
            mixed = with_changes(load_config(arguments.mixed), seed=seed)
            family = SmallFamily(mixed)
            for objective in arguments.objectives:
                kept = with_changes(mixed, objective=None if objective == "metric" else objective)
                for name in arguments.samplers:
                    own = with_changes(kept, sampler={"name": name}, budget={"trials": arguments.trials})
                    key = f"mixed/{name} {labels[objective]} {arguments.trials}/{seed}"
                    results.once(key, lambda f=family, c=own: searches(f, c))
        if "equals" in arguments.rows:
            config, like = load_config(arguments.tiny), Path(load_config(arguments.tiny).base).parent
            for name in arguments.samplers:
                own = with_changes(config, sampler={"name": name, "steps": 30}, objective=arguments.objectives[0])
                key = f"equals/{name} {arguments.objectives[0]} {arguments.trials}/{seed}"
                results.once(key, lambda c=own, s=seed, f=like: equals(c, f, s, arguments.trials))
        for row in ("smollm2", "bad"):
            if row in arguments.rows:
                bad = row == "bad"
                results.once(f"{row}/{arguments.sampler}/{seed}", lambda b=bad, s=seed: smollm2(arguments, b, s))


def last(result: Mapping[str, Any], which: str) -> float:
    """What the last of a search's better points has on the holdout items."""
    return float(result["steps"][-1][which])


def cost_to_reach(result: Mapping[str, Any], target: float, which: str) -> float:
    """The least cost after which the best own point has `target` on the holdout items; infinity if none has."""
    return min((s["cost"] for s in result["steps"] if s[which] >= target), default=np.inf)


def share_interval(count: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, count, of - count + 1)) if count else 0.0
    return low, float(beta.ppf(0.975, count + 1, of - count)) if count < of else 1.0


def ratio(costs: Sequence[float], whole: float) -> str:
    """The median of costs as a share of the rival's, with the 95% interval of the median (bootstrap), and misses."""
    shares = np.array(costs) / whole
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(shares, (4000, len(shares))), axis=1)
    ends = np.quantile(medians, [0.025, 0.975], method="nearest")
    low, middle, high = (f"{x:.2f}" if np.isfinite(x) else "never" for x in (ends[0], np.median(shares), ends[1]))
    missed = int(np.sum(~np.isfinite(shares)))
    return f"{middle} [{low}, {high}] ({len(shares)} seeds{f', {missed} never' if missed else ''})"


def grouped(found: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """`row/way` -> seed -> result."""
    groups: dict[str, dict[int, Any]] = {}
    for key, result in found.items():
        way, _, seed = key.rpartition("/")
        groups.setdefault(way, {})[int(seed)] = result
    return groups


def table(found: Mapping[str, Any]) -> None:
    """Print what was measured, as Markdown."""
    groups = grouped(found)
    rivals = {w: r for w, r in groups.items() if w.startswith(("evolve/", "cma-es/"))}
    print("Floors and searches on the tiny family, holdout items, the best own point\n")
    print("| way | seeds | exact match | gold log-probability | winners |\n|---|---|---|---|---|")
    for way, results in groups.items():
        if way.startswith(("evolve/", "cma-es/", "tiny/")):
            metric, logprob = ([last(r, w) for r in results.values()] for w in ("metric", "logprob"))
            won = sum(r["winner"] for r in results.values()) if not way.startswith("evolve/") else ""
            print(f"| {way} | {len(results)} | {interval(metric)} | {interval(logprob)} | {won} |")
    print("\nCost to reach a rival's value with the same seed, as a share of the rival's cost (median over seeds)\n")
    print("| search | rival | by exact match | by gold log-probability |\n|---|---|---|---|")
    for way, results in groups.items():
        for rival, theirs in rivals.items() if way.startswith("tiny/") else ():
            both = sorted(results.keys() & theirs.keys())
            whole = float(rival.split()[-1])
            if both:
                cells = [
                    ratio([cost_to_reach(results[s], last(theirs[s], w), w) for s in both], whole)
                    for w in ("metric", "logprob")
                ]
                print(f"| {way} | {rival} | {cells[0]} | {cells[1]} |")
    for way, results in groups.items():
        if way.startswith("mixed/"):
            own = [last(r, "metric") for r in results.values()]
            chosen = [r["selection"] - r["best_parent"] for r in results.values()]
            below = sum(c < 0 for c in chosen)
            won = sum(r["winner"] for r in results.values())
            print(
                f"\n{way}, {len(own)} seeds: best own point, holdout {interval(own)}; chosen less the best parent on "
                f"selection {interval(chosen)}, below it in {below} of {len(chosen)}; a winner in {won}"
            )
        if way.startswith("equals/"):
            wins = sum(bool(r["winner"]) for r in results.values())
            count = len(results)
            low, high = share_interval(count - wins, count)
            share = f"{100 * (count - wins) / count:.0f}% [{100 * low:.1f}%, {100 * high:.1f}%]"
            print(f"\n{way}: no winner in {count - wins} of {count}, {share}")
        if way.startswith(("smollm2/", "bad/")):
            for seed, result in results.items():
                weights = ", ".join(f"{n} {w:.2f}" for n, w in result["weights"].items())
                minutes = result["seconds"] / 60
                print(
                    f"\n{way}, seed {seed}: {result['sentence']} {minutes:.0f} minutes in all. Mean weights: {weights}"
                )


def main() -> None:
    parser, running = command_line(__doc__, "proof", 10, run, table)
    rows = ["evolve", "cma-es", "mixed", "equals", "smollm2", "bad"]
    running.add_argument("--rows", nargs="+", choices=rows, default=rows[:4])
    running.add_argument("--trials", type=int, default=60, help="of each search")
    running.add_argument("--evaluations", type=int, default=EVALUATIONS, help="of mergekit-evolve's setting")
    running.add_argument("--rival", type=int, default=TRIALS, help="trials of CMA-ES as a rival")
    running.add_argument("--samplers", nargs="*", choices=SAMPLERS, default=["auto"])
    running.add_argument("--objectives", nargs="+", default=["auto"], help="`metric`: the configuration names none")
    running.add_argument("--share", type=float, default=scale.METRIC_SHARE, help="of the metric in a trial's value")
    running.add_argument("--tiny", type=Path, default=ROOT / "benchmarks" / "tiny24.yaml")
    running.add_argument("--mixed", type=Path, default=ROOT / "configs" / "mixed.yaml")
    running.add_argument("--smollm2", type=Path, help="folder with adapters/NAME and tasks/NAME.yaml")
    running.add_argument("--base", type=Path, help="checkpoint that examples/smollm2/fetch_base.py wrote")
    running.add_argument("--bad", type=Path, help="adapter that examples/smollm2/train_lora.py --rate 0.03 trained")
    running.add_argument("--sampler", default="learned", help="of smollm2 and bad")
    running.add_argument("--timeout", help="of smollm2 and bad")
    running.add_argument("--keep", type=Path, help="folder for the run folders of smollm2 and bad")
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
