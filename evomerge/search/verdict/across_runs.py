"""Several runs side by side: their verdicts, and their chosen candidates on the holdout items that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.run import Run
from evomerge.search.storage.item_scores import evaluation_record, rows_of_record
from evomerge.search.verdict.intervals import Interval, intervals, ranges_of_differences, score_range

Scores = dict[str, dict[str, float]]
"""Task -> item id -> its score by the task's metric."""


@dataclass(frozen=True)
class Judged:
    """One run.

    run: its folder.
    method, sampler, seed: of its configuration.
    outcome, sentence, recommended, score: of its verdict; None if it has none.
    gain: of the candidate over the best baseline; None without a verdict, or if a baseline took the candidate's place.
    baseline: the name of that baseline.
    tasks: task -> the chosen candidate's mean metric on the holdout split.
    recipe: the digest of the chosen candidate's recipe.
    """

    run: str
    method: str
    sampler: str
    seed: int
    outcome: str | None = None
    sentence: str | None = None
    recommended: str | None = None
    score: Interval | None = None
    gain: Interval | None = None
    baseline: str | None = None
    tasks: dict[str, float] = field(default_factory=dict)
    recipe: str | None = None


@dataclass(frozen=True)
class Pair:
    """The chosen candidates of two runs on the holdout items that both have scored.

    difference: the first one's mean metric minus the second one's, paired by items; None if they share no item.
    shared: how many items both have.  items: how many each has.
    left_out: tasks that count for one of them only, or have another metric there.
    note: what to know about the comparison; empty if there is nothing.
    same: whether both candidates are the same recipe.
    """

    first: str
    second: str
    difference: Interval | None
    shared: int
    items: tuple[int, int]
    left_out: list[str]
    note: str = ""
    same: bool = False

    @property
    def sentence(self) -> str:
        """The pair in words."""
        names = f"{self.first} and {self.second}"
        if self.difference is None:
            return f"{names}: {self.note or 'no holdout item in common, so their candidates cannot be compared'}"
        if self.same:
            return f"{names}: their candidates are the same recipe"
        where = f"on {self.shared} shared holdout items"
        if set(self.items) != {self.shared}:
            where += f" of {self.items[0]} and {self.items[1]}"
        text = f"{names}: {self.difference.value:+.3f} {where}"
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            text += ", too few items for an interval"
        else:
            better = self.first if low > 0 else self.second if high < 0 else None
            meaning = f"{better} is better" if better else "no difference shown"
            text += f" [{low:+.3f}, {high:+.3f}]: {meaning}"
        text += f"; not compared: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{text}; {self.note}" if self.note else text


@dataclass(frozen=True)
class AcrossRuns:
    """All runs and all pairs of those that have a verdict."""

    runs: list[Judged]
    pairs: list[Pair]

    @property
    def sentences(self) -> list[str]:
        """The runs together, then each pair, in words."""
        scores = [r.score.value for r in self.runs if r.score is not None]
        found = []
        if len(scores) > 1:
            better = sum(r.outcome == "better" for r in self.runs)
            found.append(
                f"{better} of {len(self.runs)} runs found something better; holdout scores of their candidates: mean "
                f"{np.mean(scores):.3f}, standard deviation {np.std(scores, ddof=1):.3f}, {min(scores):.3f} to "
                f"{max(scores):.3f}"
            )
        return found + [pair.sentence for pair in self.pairs]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        pairs = [asdict(pair) | {"sentence": pair.sentence} for pair in self.pairs]
        return {"runs": [asdict(run) for run in self.runs], "pairs": pairs}


def compare_runs(runs: Sequence[Run]) -> AcrossRuns:
    """Put runs side by side.  EvomergeError if there are fewer than two, or one cannot be read."""
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise EvomergeError("a run is named twice")
    if len(runs) < 2:
        raise EvomergeError("give two runs or more")
    names = short_names(runs)
    judged = [judged_of(run, name) for run, name in zip(runs, names, strict=True)]
    ended = [(run, j) for run, j in zip(runs, judged, strict=True) if j.recipe is not None]
    known = {j.run: holdout_of(run, j) for run, j in ended}
    return AcrossRuns(judged, [pair_of(a, b, known) for (_, a), (_, b) in combinations(ended, 2)])


def short_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names where they differ, else their paths as given."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def judged_of(run: Run, name: str) -> Judged:
    """One run, by its configuration and its verdict."""
    config, verdict = run.config(), run.verdict()
    if verdict is None:
        return Judged(name, config.method, config.sampler.name, config.seed)
    searched = verdict["chosen"]["name"] != verdict["recommended"]
    first = next(iter(verdict["comparisons"]), None) if searched else None
    return Judged(
        name,
        config.method,
        config.sampler.name,
        config.seed,
        verdict["outcome"],
        verdict["sentence"],
        verdict["recommended"],
        Interval(**verdict["score"]),
        None if first is None else Interval(**first["difference"]),
        None if first is None else first["name"],
        {task: cell["value"] for task, cell in verdict["holdout"]["winner"].items()},
        verdict["chosen"].get("recipe"),
    )


@dataclass(frozen=True)
class Holdout:
    """The scores of a run's chosen candidate.

    metrics, weights: of the goals, by task.
    scores: by the metrics; None if the study cannot be read.
    problem: why not.
    """

    metrics: dict[str, str]
    weights: dict[str, float]
    seed: int
    scores: Scores | None
    problem: str = ""


def holdout_of(run: Run, judged: Judged) -> Holdout:
    """The item scores of a run's chosen candidate on the holdout split, from its study."""
    verdict = run.verdict()
    assert verdict is not None, "asked only for runs with a verdict"
    metrics = {task: entry["metric"] for task, entry in verdict["tasks"].items()}
    try:
        attributes = run.study().user_attrs
        record = evaluation_record(attributes, "holdout", str(judged.recipe))
        rows = list(rows_of_record(attributes, record, {}))
    except EvomergeError as error:
        return Holdout(metrics, {}, judged.seed, None, f"{judged.run}: its study cannot be read ({error})")
    weights = Scale.from_json(attributes[SCALE]).weights if SCALE in attributes else dict.fromkeys(metrics, 1.0)
    goals = {task: metric for task, metric in metrics.items() if task in weights}
    scores: Scores = {}
    for row in rows:
        if goals.get(row["task"]) == row["metric"]:
            scores.setdefault(row["task"], {})[row["item"]] = row["score"]
    problem = "" if scores else f"{judged.run}: its study has no holdout scores of its candidate"
    return Holdout(goals, weights, judged.seed, scores or None, problem)


def pair_of(a: Judged, b: Judged, known: Mapping[str, Holdout]) -> Pair:
    """Two runs on the items that both have scored."""
    first, second = known[a.run], known[b.run]
    if first.scores is None or second.scores is None:
        return Pair(a.run, b.run, None, 0, (0, 0), [], first.problem or second.problem)
    common = [t for t, m in first.metrics.items() if second.metrics.get(t) == m]
    left_out = sorted((first.metrics.keys() | second.metrics.keys()) - set(common))
    shared = {t: sorted(first.scores.get(t, {}).keys() & second.scores.get(t, {}).keys()) for t in common}
    left_out += [task for task, ids in shared.items() if not ids]
    shared = {task: ids for task, ids in shared.items() if ids}
    items = (sum(map(len, first.scores.values())), sum(map(len, second.scores.values())))
    if not shared:
        return Pair(a.run, b.run, None, 0, items, left_out)
    tables = [{t: [each[t][i] for i in ids] for t, ids in shared.items()} for each in (first.scores, second.scores)]
    ranges = {t: score_range(first.metrics[t], [table[t] for table in tables]) for t in shared}
    gaps = {t: np.subtract(tables[0][t], tables[1][t]).tolist() for t in shared}
    [gap] = intervals([gaps], ranges_of_differences(ranges), first.weights, first.seed)
    shares = [[h.weights[t] / sum(h.weights[s] for s in shared) for t in shared] for h in (first, second)]
    note = "" if np.allclose(shares[0], shares[1]) else f"the tasks weigh as in {a.run}"
    count = sum(map(len, shared.values()))
    return Pair(a.run, b.run, gap, count, items, left_out, note, a.recipe == b.recipe)
