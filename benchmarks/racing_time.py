"""What racing costs and saves in seconds: the trials of a finished search, each scored with and without a race.

    (cat configs/quickstart.yaml; echo 'racing: false') > configs/unraced.yaml
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
from evomerge.search.exam import open_exam
from evomerge.search.race import build_course, survey
from evomerge.search.run import open_run
from evomerge.search.scorer import Scorer, open_config_models
from evomerge.search.scores import objective_scores
from evomerge.search.space import build_space
from evomerge.search.study import SearchStudy, record_of


def replay(folder: Path, most: int) -> list[tuple[float, float, float]]:
    """(seconds without a race, with one, the share of the items it scored) of every sampled trial."""
    run = open_run(folder)
    config = run.config()
    models = open_config_models(config)
    study, exam = SearchStudy(run.study(), build_space(config, models)), open_exam(config)
    scorer = Scorer(config, models, exam, cache=run.folder / "cache")
    known = [objective_scores(t) for t in study.complete if "baseline" in t.user_attrs]
    items = record_of(study.complete[0])["items"]
    course = build_course(exam, items, known, config.seed, config.racing)
    work = scorer.prepared("search", everything=False)
    scorer.materialise(study.space.recipe(study.complete[0].params), Clock())
    began = time.perf_counter()
    looks = survey(course, scorer.engine, work.by_task, work)
    placed = f"{len(looks.ends)} looks placed in {time.perf_counter() - began:.1f} s"
    print(f"{len(course.ceiling)} items, {placed}: {looks.ends}; a trial to its end costs {looks.costs[-1]:.2f}")
    course = replace(course, looks=looks)
    full = [course.vector(t) for t in study.complete if "baseline" in t.user_attrs]
    found = []
    for trial in [t for t in study.complete if "baseline" not in t.user_attrs][:most]:
        recipe = study.space.recipe(trial.params)
        best = max(full, key=lambda scores: float(course.order.weights @ scores))
        race = course.race(best, [s for s in full if s is not best]) if len(looks.ends) > 1 else None
        seconds, share = {}, 1.0
        for raced in (True, False) if trial.number % 2 else (False, True):
            began = time.perf_counter()
            outcome = scorer.try_out(recipe, None, course if raced else None, race if raced else None)
            seconds[raced] = time.perf_counter() - began
            share = outcome.estimate.fraction if outcome.estimate else share
        if share == 1:
            full.append(course.vector(trial))
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
