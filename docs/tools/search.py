"""The pictures of docs/explanation/winners-curse.md and racing-and-gradient.md."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from merging import Lab
from numpy.typing import NDArray
from svg import Axes, Picture

import evomerge
from evomerge.search.evaluation.task_set import open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.space.space import Point, build_space
from evomerge.search.storage.step_record import step_records

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 2000
SEARCH, SELECTION, HOLDOUT = 100, 100, 200
FINALISTS = 5
SPREAD = 0.02


# --- The winner's curse ---


def search_once(trials: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Scores of simulated searches, (REPEATS, 4).

    Every trial is a model whose chance of a right answer is drawn around 0.5, with a standard deviation of SPREAD.  The
    best FINALISTS on the search items are scored on the selection items, and the best of them on the holdout items.

    Columns: the best score on the search items; the chosen model's score on the selection items; its score on the
    holdout items; its true chance.
    """
    truth = rng.normal(0.5, SPREAD, (REPEATS, trials)).clip(0, 1)
    seen = rng.binomial(SEARCH, truth) / SEARCH
    order = np.argsort(-seen, axis=1)[:, :FINALISTS]
    finalists = np.take_along_axis(truth, order, 1)
    again = rng.binomial(SELECTION, finalists) / SELECTION
    chosen = again.argmax(1)
    rows = np.arange(REPEATS)
    true = finalists[rows, chosen]
    return np.stack([seen.max(1), again[rows, chosen], rng.binomial(HOLDOUT, true) / HOLDOUT, true], 1)


def winners_curse(folder: Path) -> None:
    """Three scores of the model that a search chooses, and its true one, by the number of trials."""
    counts = (1, 2, 3, 5, 10, 20, 40, 100, 200, 400, 1000)
    means = np.array([search_once(n, np.random.default_rng(n)).mean(0) for n in counts])  # (counts, 4)
    for count, row in zip(counts, means, strict=True):
        print(f"{count} trials: search {row[0]:.3f}, selection {row[1]:.3f}, holdout {row[2]:.3f}, true {row[3]:.3f}")
    picture = Picture(560, 300, "Scores of the chosen model by the number of trials, in a simulation")
    axes = Axes(picture, (50, 30, 490, 210), (0, 3), (0.48, 0.68))
    axes.labels("trials", "mean score of the model that is chosen")
    axes.x_ticks((np.log10(n), str(n)) for n in (1, 3, 10, 40, 100, 400, 1000))
    axes.y_ticks((v, f"{v:.2f}") for v in (0.5, 0.55, 0.6, 0.65))
    xs = np.log10(counts).tolist()
    for column, kind in enumerate(("orange", "purple", "green", "grey dash")):
        axes.line(xs, means[:, column].tolist(), kind)
    names = (("orange", "search items"), ("purple", "selection items"), ("green", "holdout items"), ("grey", "truth"))
    picture.key(50, 290, names)
    picture.save(folder / "winners-curse.svg")


# --- A real search ---


def real_search(folder: Path) -> None:
    """The search of configs/quickstart.yaml: its gradient steps, its trials, and how many items each took."""
    with tempfile.TemporaryDirectory() as scratch:
        run = evomerge.search(ROOT / "configs" / "quickstart.yaml", run=f"{scratch}/run", show=False)
        draw_search(run, folder)


def draw_search(run: "evomerge.Run", folder: Path) -> None:
    """Draw a finished run."""
    study = run.files.study()
    steps = step_records(study.user_attrs)
    trials = run.trials
    learned = {t.number: int(t.user_attrs["learned"]) for t in study.trials if "learned" in t.user_attrs}
    best = max(t.value for t in trials if t.state == "complete" and t.value is not None)
    sampled = [t for t in trials if t.baseline is None and t.number not in learned]
    stopped = [t for t in sampled if t.state == "stopped early"]
    share = sum(t.evaluated for t in sampled) / len(sampled)
    print(f"{len(steps)} steps, looks after {sorted(learned.values())}: {[f'{trials[n].value:.3f}' for n in learned]}")
    print(f"best baseline {max(t.value or 0.0 for t in trials if t.baseline):.3f}")
    print(f"{len(sampled)} sampled trials, {len(stopped)} stopped early, {share:.0%} of the items scored")
    print(run.verdict.sentence if run.verdict else "no verdict")

    found = holdout_along(run, [step.point for step in steps])
    numbers = [min(number, len(steps)) for number in found]
    scores = [row["mean"] for row in found.values()]
    print("exact match at steps", {k: f"{row['mean']:.3f}" for k, row in found.items()})
    parent = max(c.score for c in run.verdict.comparisons) if run.verdict else 0.0
    picture = Picture(640, 300, "Exact match along the gradient steps of a search of the tiny family")
    axes = Axes(picture, (50, 30, 570, 210), (0, len(steps)), (0.4, 0.62))
    axes.labels("gradient steps (16 items each)", "mean exact match on the holdout items")
    axes.x_ticks((v, str(v)) for v in range(0, len(steps) + 1, 10))
    axes.y_ticks((v, f"{v:.2f}") for v in (0.4, 0.45, 0.5, 0.55, 0.6))
    axes.line([0, len(steps)], [parent, parent], "grey dash")
    axes.line(numbers, scores, "blue")
    axes.dots(numbers, scores, "blue", 3)
    picture.key(50, 290, (("blue", "the point of the steps"), ("grey", "best baseline, where the steps begin")))
    picture.save(folder / "gradient.svg")

    low, high = -0.05, best + 0.2
    picture = Picture(640, 300, "The trials of a search of the tiny family, and the share of the items that each took")
    upper = Axes(picture, (50, 30, 570, 120), (-0.7, len(trials) - 0.3), (low, high))
    upper.labels("", "value (of stopped trials: an estimate)")
    upper.y_ticks((v, f"{v:g}") for v in (0, 0.5, 1) if low < v < high)
    lower = Axes(picture, (50, 175, 570, 75), upper.x, (0, 1))
    lower.labels("", "share of the items that were scored")
    lower.y_ticks((v, f"{v:g}") for v in (0, 0.5, 1))
    lower.x_ticks((t.number, str(t.number)) for t in trials[::5])
    for trial in trials:
        kind = "grey" if trial.baseline else "purple" if trial.number in learned else "green"
        kind = "orange" if trial.state == "stopped early" else kind
        upper.dots([trial.number], [trial.value or 0.0], kind, 3.5)
        lower.bar((trial.number - 0.4, trial.number + 0.4), (0, trial.evaluated), f"{kind} bar")
    names = (("grey", "baseline"), ("purple", "learned"), ("green", "sampled"), ("orange", "sampled, stopped early"))
    picture.key(50, 290, names)
    picture.save(folder / "racing.svg")


def holdout_along(run: "evomerge.Run", points: Sequence[Point], every: int = 3) -> dict[int, dict[str, float]]:
    """Step -> exact match on the run's holdout items, by task and in the mean, for each third step and the last."""
    lab, config = Lab(), run.config
    space = build_space(config, open_config_models(config))
    tasks = open_task_set(config).split("holdout")
    items = {task: [(i.doc["prompt"], i.doc["answer"]) for i in found] for task, found in tasks.items()}
    found = {}
    for number in sorted({*range(0, len(points), every), len(points) - 1}):
        evomerge.merge(space.recipe(points[number]), model=lab.model, show=False)
        scores = {task: lab.score(listed)[0] for task, listed in items.items()}
        found[number] = scores | {"mean": float(np.mean(list(scores.values())))}
    return found


def draw(folder: Path) -> None:
    """Write all pictures and print their numbers."""
    winners_curse(folder)
    real_search(folder)
