"""The race setup that a study's candidates race on, from what the study knows of its baselines."""

from itertools import islice
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import PREDICTORS
from evomerge.search.evaluation.full_evaluations import StoredEvaluations
from evomerge.search.evaluation.race_setup import RaceSetup, build_race_setup
from evomerge.search.space.baselines import Baseline
from evomerge.search.storage.item_scores import objective_scores
from evomerge.search.storage.study import SearchStudy, rank
from evomerge.search.storage.trial_record import TrialRecord, record_of

LOOKS = "evomerge:looks"  # study attribute: where its races look, and what that costs
WORST = 1.05  # what racing may make of the time of a whole search


def rivals(study: SearchStudy, items: str) -> tuple[FrozenTrial | None, list[FrozenTrial]]:
    """Of the trials evaluated in full on these items, the best and the latest others."""
    best = study.best
    if best is not None and record_of(best).items != items:  # items were changed on the way
        here = (t for t in study.complete if record_of(t).items == items)
        best = max(here, key=rank, default=None)
    latest = (t for t in reversed(study.complete) if t is not best and record_of(t).items == items)
    return best, list(islice(latest, PREDICTORS))[::-1]


def make_race_setup(study: SearchStudy, known: list[Baseline], evaluations: StoredEvaluations) -> RaceSetup | None:
    """The race race setup of a search whose baselines have all been evaluated.

    None if the configuration wants no race, or the study says that looking early does not pay.
    """
    config = study.space.config
    if not config.racing.enabled:
        return None
    items = evaluations.items("search")
    scores: list[dict[str, Any]] = []
    for baseline in known:
        trial = study.of_baseline(baseline.name)
        if trial is not None and record_of(trial).items == items:
            scores.append(objective_scores(trial))
        elif (found := evaluations.stored("search", baseline.recipe)) is not None:
            scores.append(evaluations.task_set.of(found, "objective"))
    looks = looks_of(study, items)
    if looks is not None and len(looks.ends) == 1:
        return None
    return build_race_setup(evaluations.task_set, items, scores, config.seed, config.racing, looks)


def looks_of(study: SearchStudy, items: str) -> Looks | None:
    """Where the study's races look, None if it does not say."""
    found: dict[str, Any] = study.stored.user_attrs.get(LOOKS, {})
    return Looks(tuple(found["ends"]), tuple(found["costs"])) if found.get("items") == items else None


def must_choose_looks(study: SearchStudy, items: str) -> bool:
    """Whether it is still to be found out where races look; those that began before it was are cut as they were."""
    if looks_of(study, items) is not None:
        return False
    return LOOKS in study.stored.user_attrs or not any(record_of(t).raced for t in study.finished)


def may_race(study: SearchStudy, race_setup: RaceSetup) -> bool:
    """Whether the next candidate may race: if it and those in hand ran to their ends, the search would still have cost
    at most WORST times what it would have without races, by the costs of `place_looks`."""
    spent = plain = 0.0
    for trial in study.finished:
        record = record_of(trial)
        if record.items == race_setup.items:
            plain += 1.0
            spent += cost_of(record, race_setup)
    coming = study.count - len(study.finished) + 1
    return spent + coming * race_setup.looks.costs[-1] <= WORST * (plain + coming)


def cost_of(record: TrialRecord, race_setup: RaceSetup) -> float:
    """What a trial cost, as a part of scoring all items at once."""
    if not record.raced:
        return 1.0
    seen = (1.0 if record.partial is None else record.partial) * len(race_setup.ceiling)
    return float(np.interp(seen, (0, *race_setup.looks.ends), (0.0, *race_setup.looks.costs)))
