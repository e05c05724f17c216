"""Whether objective and metric rank models alike: rank correlations over the models that were scored by both.

A search climbs the objective and is judged by the metric.  Where the two rank models differently, the search climbs
the wrong hill, and its user has to know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from evomerge.search.evaluation.scale import SCALE, Line, Scale
from evomerge.search.storage.compact import Numbers, Packed, PackedScores, interned, places_of
from evomerge.search.storage.item_scores import evaluation_records, unpack
from evomerge.search.storage.study import in_full
from evomerge.search.storage.trial_record import record_of

FEWEST = 4  # models; the order of fewer says nothing
WEAK = 0.5  # a lower rank correlation is a disagreement


@dataclass(frozen=True, slots=True)
class ScoredModel:
    """A model with its mean scores on the search split, for each task that has both.

    name: of the baseline, or `trial N`.
    trial: its number; None if it is none.
    objective: task -> the mean objective, scaled.
    metric: task -> the mean metric.
    """

    name: str
    trial: int | None
    objective: Mapping[str, float]
    metric: Mapping[str, float]

    def means(self, scale: Scale, tasks: Sequence[str]) -> tuple[float, float] | None:
        """The means over tasks, by their weights, of objective and metric; None if a task lacks scores."""
        if any(task not in self.metric for task in tasks):
            return None
        weights = [scale.weights[task] for task in tasks]
        each = ([self.objective[task] for task in tasks], [self.metric[task] for task in tasks])
        objective, metric = (sum(map(mul, weights, means)) / sum(weights) for means in each)
        return objective, metric


Lines = tuple[tuple[str, Line, Line], ...]
"""Of every task: its name, the line of its objective, that of its metric."""


@dataclass(frozen=True)
class Agreement:
    """How alike objective and metric rank models.

    what: the task, or `all tasks`.
    models: how many were scored by both.
    correlation: Spearman's rank correlation; None if it is not defined.
    best: the model that is best by the metric.
    place: its place by the objective, from 1.
    objective, metric: the names.
    """

    what: str
    models: int
    correlation: float | None
    best: str
    place: int
    objective: str
    metric: str

    @property
    def disagrees(self) -> bool:
        """Whether the two rank models so differently that the user has to know."""
        weak = self.correlation is not None and self.correlation < WEAK
        return weak or self.place > max(2, self.models // 4)

    @property
    def sentence(self) -> str:
        """The agreement in words."""
        by = "-" if self.correlation is None else f"{self.correlation:.2f}"
        text = f"{self.what}: rank correlation of {self.objective} and {self.metric} over {self.models} models: {by}"
        if not self.disagrees:
            return text
        if self.place == 1:
            return f"{text}, which is weak; {self.best} is the best by both"
        places = f"{self.best} is the best by {self.metric} and number {self.place} by {self.objective}"
        return f"{text}; they disagree: {places}"


def scored_models(trials: Sequence[FrozenTrial], attributes: Mapping[str, Any]) -> list[ScoredModel]:
    """The models of a study that were scored on the search split by objective and metric of at least one task.

    trials: all that are in the study; those that were not scored on all items are left out.
    attributes: the study's.

    Empty for a study without a scale.
    """
    if SCALE not in attributes:
        return []
    scale = Scale.from_json(attributes[SCALE])
    tables: dict[str, list[Packed]] = {}
    numbers: dict[str, int] = {}
    for record in evaluation_records(attributes, ["search"]).values():
        if record.name is not None and record.partial is None:
            tables.setdefault(record.name, []).append(record.scores)
    for trial in filter(in_full, trials):
        name = model_name(trial)
        numbers[name] = trial.number
        tables.setdefault(name, []).append(record_of(trial).scores)
    # One object for equal lines: comparing them with those of the means that are kept costs nothing.
    lines: Lines = interned(tuple((name, task.objective, task.metric) for name, task in scale.tasks.items()))
    models = [scored_model(lines, name, numbers.get(name), found) for name, found in tables.items()]
    return [model for model in models if model.metric]


def model_name(trial: FrozenTrial) -> str:
    """The name of a trial's model: the baseline's, or `trial N`."""
    return str(trial.user_attrs.get("baseline", f"trial {trial.number}"))


def scored_model(lines: Lines, name: str, trial: int | None, found: Sequence[Packed]) -> ScoredModel:
    """A model from all its records.  lines: of every task.  found: the scores of each."""
    if len(found) == 1:
        return ScoredModel(name, trial, *means_of(lines, found[0]))
    objective: dict[str, float] = {}
    metric: dict[str, float] = {}
    for by_objective, by_metric in (means_of(lines, scores) for scores in found):
        objective |= by_objective
        metric |= by_metric
    return ScoredModel(name, trial, objective, metric)


def means_of(lines: Lines, scores: Packed) -> tuple[Numbers, Numbers]:
    """The mean scaled objective and the mean metric of each task that has both.

    They are kept with the scores: a search asks for those of all trials again and again.
    """
    if isinstance(scores, PackedScores) and scores.means is not None and scores.means[0] == lines:
        return scores.means[1:]
    texts = {
        task: (objective, by[objective.name], by[metric.name])
        for task, objective, metric in lines
        if objective.name in (by := scores.get(task, {})) and metric.name in by
    }
    places = places_of(tuple(texts))
    found = (
        Numbers(places, [float(line.of(unpack(text)).mean()) for line, text, _ in texts.values()]),
        Numbers(places, [float(unpack(text).mean()) for _, _, text in texts.values()]),
    )
    if isinstance(scores, PackedScores):
        scores.means = lines, *found
    return found


def agreements(models: Sequence[ScoredModel], attributes: Mapping[str, Any]) -> list[Agreement]:
    """How alike objective and metric rank the models of a study: over all tasks, then by task.

    Tasks whose objective is the metric are left out, and so is what fewer than FEWEST models were scored by.

    models: of `scored_models`.  attributes: the study's.
    """
    if not models:
        return []
    scale = Scale.from_json(attributes[SCALE])
    tasks = list(scale.tasks)
    differ = [t for t in tasks if scale.tasks[t].objective.name != scale.tasks[t].metric.name]
    groups = [("all tasks", tasks, "the objective", "the metric")] if differ and len(tasks) > 1 else []
    groups += [(f"task {t}", [t], scale.tasks[t].objective.name, scale.tasks[t].metric.name) for t in differ]
    found = []
    for what, chosen, objective, metric in groups:
        rows = [(m.name, *means) for m in models if (means := m.means(scale, chosen)) is not None]
        if len(rows) >= FEWEST:
            found.append(agreement(what, rows, objective, metric))
    return found


def agreement(what: str, rows: Sequence[tuple[str, float, float]], objective: str, metric: str) -> Agreement:
    """The agreement over models.  rows: name, objective and metric of each."""
    best = max(rows, key=lambda row: (row[2], row[1]))  # of models that are equal by the metric, the best by objective
    place = 1 + sum(row[1] > best[1] for row in rows)
    correlation = rank_correlation([row[1] for row in rows], [row[2] for row in rows])
    return Agreement(what, len(rows), correlation, best[0], place, objective, metric)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; equal values share their mean rank.  None if all x or all y are equal."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else None


def ranks(x: Sequence[float]) -> NDArray[np.float64]:
    """The ranks of values from 1, (n,); equal values share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return mean
