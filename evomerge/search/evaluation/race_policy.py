"""Which candidate of a study races, and against which trials; decided from what the study has stored.

`race_setup.py` has what all races of a search share.  A candidate races against the incumbent, as long as races have
not made the whole search clearly slower than scoring every candidate on all items.  The test itself is
`evaluate/racing.py`; `Evaluator.trial_scores_in_race` (`evaluator.py`) asks it after each chunk.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import PREDICTORS
from evomerge.search.evaluation.race_setup import RaceSetup, build_race_setup
from evomerge.search.evaluation.stored_evaluations import StoredEvaluations
from evomerge.search.space.baselines import Baseline
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.study import SearchStudy, rank
from evomerge.search.storage.trial_record import TrialRecord, record_of

LOOKS = "evomerge:looks"  # study attribute: after how many items its races look, and the cost of each look
WORST = 1.05  # the time of the search with races may be at most this many times the time without


def rivals(
    study: SearchStudy, items: str, value: Callable[[FrozenTrial], float] | None = None
) -> tuple[FrozenTrial | None, list[FrozenTrial]]:
    """Return the incumbent and the latest other trials, of those that were scored on all of these items.

    items: the name under which the study keeps the items' ids.
    value: of a trial, by which the incumbent is the best; None: the study's.
    """
    here = (t for t in study.complete if record_of(t).items == items)
    best = study.best
    if value is not None:
        best = max(here, key=lambda t: (value(t), -t.number), default=None)
    elif best is not None and record_of(best).items != items:  # the items were changed after that trial
        best = max(here, key=rank, default=None)
    latest = (t for t in reversed(study.complete) if t is not best and record_of(t).items == items)
    return best, list(islice(latest, PREDICTORS))[::-1]


def make_race_setup(study: SearchStudy, known: list[Baseline], evaluations: StoredEvaluations) -> RaceSetup | None:
    """The race setup of a search whose baselines have all been scored.

    None if the configuration turns races off, or if looking before the last item was found not to pay.
    """
    config = study.space.config
    if not config.racing.enabled:
        return None
    items = evaluations.items("search")
    scores: list[Mapping[str, Mapping[str, Any]]] = []
    for baseline in known:
        trial = study.of_baseline(baseline.name)
        if trial is not None and record_of(trial).items == items:
            scores.append(trial_scores(trial))
        elif (found := evaluations.stored("search", baseline.recipe)) is not None:
            scores.append(found)
    looks = looks_of(study, items)
    if looks is not None and len(looks.ends) == 1:
        return None
    return build_race_setup(evaluations.task_set, evaluations.scale, items, scores, config.seed, config.racing, looks)


def looks_of(study: SearchStudy, items: str) -> Looks | None:
    """After how many items the study's races look, None if that has not been chosen for these items."""
    found: dict[str, Any] = study.stored.user_attrs.get(LOOKS, {})
    return Looks(tuple(found["ends"]), tuple(found["costs"])) if found.get("items") == items else None


def must_choose_looks(study: SearchStudy, items: str) -> bool:
    """Whether the looks still have to be chosen.

    A study whose races began before looks were chosen by their cost keeps the looks of `even_looks`.
    """
    if looks_of(study, items) is not None:
        return False
    return LOOKS in study.stored.user_attrs or not any(record_of(t).raced for t in study.finished)


def may_race(study: SearchStudy, race_setup: RaceSetup) -> bool:
    """Whether the next candidate may race.

    It may if, should it and all running trials be scored on every item, the search would still take at most WORST times
    as long as without races, by the costs of `place_looks`.
    """
    spent = plain = 0.0
    for trial in study.finished:
        record = record_of(trial)
        if record.items == race_setup.items:
            plain += 1.0
            spent += cost_of(record, race_setup)
    coming = study.count - len(study.finished) + 1
    return spent + coming * race_setup.looks.costs[-1] <= WORST * (plain + coming)


def cost_of(record: TrialRecord, race_setup: RaceSetup) -> float:
    """The cost of a trial, as a share of the cost of scoring all items at once."""
    if not record.raced:
        return 1.0
    seen = (1.0 if record.partial is None else record.partial) * len(race_setup.ceiling)
    return float(np.interp(seen, (0, *race_setup.looks.ends), (0.0, *race_setup.looks.costs)))
