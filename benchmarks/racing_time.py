"""What racing costs and saves in seconds: the trials of a finished search, each scored with and without a race.

    (cat benchmarks/tiny.yaml; echo 'racing: false') > configs/unraced.yaml
    evomerge search configs/unraced.yaml --trials 100 --run runs/unraced
    python benchmarks/racing_time.py runs/unraced

The recorded trials come in their own order, in one process, on one live model, one way timed after the other (which
is first changes from trial to trial).  The race is a search's own: its looks are placed by measured times, its
incumbent is the best candidate evaluated in full so far, with the full ones before as history.
"""

import argparse
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from evomerge.evaluate.clock import Clock
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.race_setup import build_race_setup, choose_looks
from evomerge.search.evaluation.scale import scale_of
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.run import open_run
from evomerge.search.space.space import build_space
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.trial_record import record_of


def replay(folder: Path, most: int) -> list[tuple[float, float, float]]:
    """(seconds without a race, with one, the share of the items it scored) of every sampled trial."""
    run = open_run(folder)
    config = run.config()
    models = open_config_models(config)
    study, task_set = SearchStudy(run.study(), build_space(config, models)), open_task_set(config)
    evaluator = Evaluator(config, models, task_set, cache=run.folder / "cache")
    known = [trial_scores(t) for t in study.complete if "baseline" in t.user_attrs]
    items = record_of(study.complete[0]).items or ""
    race_setup = build_race_setup(
        task_set, scale_of(study.stored.user_attrs, task_set), items, known, config.seed, config.racing
    )
    work = evaluator.workloads.whole("search")
    evaluator.materialise(study.space.recipe(study.complete[0].params), Clock())
    began = time.perf_counter()
    looks = choose_looks(race_setup, evaluator.engine, work.by_task, work)
    placed = f"{len(looks.ends)} looks placed in {time.perf_counter() - began:.1f} s"
    print(f"{len(race_setup.ceiling)} items, {placed}: {looks.ends}; a trial to its end costs {looks.costs[-1]:.2f}")
    race_setup = replace(race_setup, looks=looks)
    full = [race_setup.vector(t) for t in study.complete if "baseline" in t.user_attrs]
    found = []
    for trial in [t for t in study.complete if "baseline" not in t.user_attrs][:most]:
        recipe = study.space.recipe(trial.params)
        best = max(full, key=lambda scores: float(race_setup.order.weights @ scores))
        race = race_setup.race(best, [s for s in full if s is not best]) if len(looks.ends) > 1 else None
        seconds, share = {}, 1.0
        for raced in (True, False) if trial.number % 2 else (False, True):
            began = time.perf_counter()
            outcome = evaluator.score_trial(recipe, None, race_setup if raced else None, race if raced else None)
            seconds[raced] = time.perf_counter() - began
            share = outcome.estimate.fraction if outcome.estimate else share
        if share == 1:
            full.append(race_setup.vector(trial))
        found.append((seconds[False], seconds[True], share))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs with `racing: false`")
    parser.add_argument("--trials", type=int, default=1000, help="of each run, at most")
    args = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for folder in args.runs:
        print(f"\n{folder.name}")
        found = replay(folder, args.trials)[1:]  # the first warms up
        plain, raced = (sum(row[k] for row in found) for k in (0, 1))
        never = [b / a for a, b, share in found if share == 1]
        scored = statistics.mean(row[2] for row in found)
        print(f"{len(found)} trials, {len(found) - len(never)} stopped, {scored:.0%} of the items scored")
        print(f"time with a race {raced / plain:.2f} of without, {plain / len(found):.3f} s a trial")
        if never:
            print(f"trials that ran to their end: {sum(never) / len(never):.2f} (mean), {max(never):.2f} (most)")


if __name__ == "__main__":
    main()
