"""The finalists: which models a search takes to the selection split.

Trials and baselines were scored on the search split.  Finalists are the five best trials by value, the best by metric,
learned points, the mean of the final search distribution, with `goals: pareto` trials along the front (front.py), and
every baseline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from optuna.trial import FrozenTrial

from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.evaluation.agreement import scored_models
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.space.baselines import Baseline, model_key
from evomerge.search.storage.study import SearchStudy, rank
from evomerge.search.storage.trial_record import LEARNED, WEIGHTS
from evomerge.search.verdict.front import front_of, spread_along

FINALISTS = 5  # trials by value
ALONG_FRONT = 8  # trials of the front, at most


@dataclass(frozen=True)
class Finalist:
    """A model that is scored on the selection split.

    kind: a baseline's, or `candidate` for one that the search found.
    trial: its number; None if it has none.
    """

    name: str
    kind: str
    trial: int | None
    recipe: Recipe


def finalists_of(study: SearchStudy, baselines: Sequence[Baseline]) -> list[Finalist]:
    """What was searched, then the baselines, the base among them."""
    kinds = {"start": "candidate"}  # what an earlier search found is a candidate of this one
    compared = [Finalist(b.name, kinds.get(b.kind, b.kind), study.baselines.get(b.name), b.recipe) for b in baselines]
    return searched_finalists(study, baselines) + compared


def searched_finalists(study: SearchStudy, baselines: Sequence[Baseline]) -> list[Finalist]:
    """The best candidates of the search by value and by metric, its learned points and the mean of its distribution.

    None of them makes the same model as a baseline.
    """
    space = study.space
    complete = sorted((t for t in study.complete if "baseline" not in t.user_attrs), key=rank, reverse=True)
    trials = [
        *complete[:FINALISTS],
        *best_by_metric(study, complete),
        *learned_points(complete),
        *along_front(study, complete),
    ]
    found = [Finalist(f"trial {t.number}", "candidate", t.number, space.recipe(t.params)) for t in trials]
    if (mean := study.distribution_mean()) is not None:
        found.append(Finalist("mean of the search distribution", "candidate", None, space.recipe(mean)))
    known = {model_key(baseline.recipe, space.layers) for baseline in baselines}
    unique: dict[object, Finalist] = {}
    for finalist in found:
        unique.setdefault(model_key(finalist.recipe, space.layers), finalist)
    return [finalist for key, finalist in unique.items() if key not in known]


def learned_points(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of points that gradient steps by the search's own task weights led to."""
    return [t for t in trials if LEARNED in t.user_attrs and WEIGHTS not in t.user_attrs]


def best_by_metric(study: SearchStudy, ranked: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trial that is best by the metric on the search split, of those that were scored by it; empty if none was.

    ranked: the trials to choose among, the best by value first; it is chosen if several are equal.
    """
    models = scored_models(study.trials, attributes := study.stored.user_attrs)
    if not models:
        return []
    scale = Scale.from_json(attributes[SCALE])
    means = {m.trial: found[1] for m in models if (found := m.means(scale, list(scale.tasks))) is not None}
    known = [t for t in ranked if t.number in means]
    return [max(known, key=lambda t: means[t.number])] if known else []


def along_front(study: SearchStudy, ranked: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """With `goals: pareto` trials along the front, at most ALONG_FRONT; empty without.  ranked: the trials to take."""
    front = front_of(study.trials, study.stored.user_attrs) if study.space.config.goals == "pareto" else None
    if front is None:
        return []
    known = {t.number: t for t in ranked}
    members = [m for m in front.members if m.number in known]
    points = np.array([m.values for m in members])
    return [known[members[i].number] for i in spread_along(points, ALONG_FRONT)]
