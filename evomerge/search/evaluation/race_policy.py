"""Which candidate of a study races, and against which trials; decided from what the study has stored.

`race_setup.py` has what all races of a search share.  A candidate races against the incumbent, as long as races have
not made the whole search clearly slower than scoring every candidate on all items.  The test itself is
`evaluate/racing.py`; `TrialScorer.score_in_race` (`trial_scorer.py`) asks it after each chunk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import PREDICTORS, Race, Vector
from evomerge.search.evaluation.jobs import Failure, RaceLooksJob
from evomerge.search.evaluation.race_setup import RaceSetup, build_race_setup
from evomerge.search.evaluation.stored_evaluations import Evaluations, StoredEvaluations
from evomerge.search.space.baselines import Baseline
from evomerge.search.storage.item_scores import trial_scores
from evomerge.search.storage.study import SearchStudy, rank
from evomerge.search.storage.trial_record import RaceRecord, TrialRecord, record_of
from evomerge.search.workers.pool import Pool

LOOKS = "evomerge:looks"  # study attribute: after how many items its races look, and the cost of each look
WORST = 1.05  # the time of the search with races may be at most this many times the time without


class Races:
    """The races of a search: a candidate runs against the incumbent of the moment at which it begins.

    study: its trials evaluated in full are the incumbent and the candidates that predict differences.
    setup: the order of the items and where a race looks.
    """

    def __init__(self, study: SearchStudy, setup: RaceSetup) -> None:
        self.study = study
        self.setup = setup
        self.vectors: dict[int, Vector] = {}  # trial number -> the values of its items (N,)
        self.penalties: dict[int, float] = {}  # trial number -> its penalty

    def next(self, weights: Mapping[str, float] | None) -> tuple[Race | None, RaceSetup, RaceRecord]:
        """The race of the next candidate, its setup, and what its record says of it; no race if it does not race.

        weights: of the tasks, by which the candidate is compared; None: the search's; empty: it is not compared.
        """
        setup = self.setup.weighted(weights) if weights else self.setup
        if weights == {} or not may_race(self.study, setup):
            return None, setup, RaceRecord(None)

        def value(trial: FrozenTrial) -> float:
            return float(setup.order.weights @ self.vector(trial)) - self.penalty(trial)

        incumbent, others = rivals(self.study, setup.items, None if weights is None else value)
        if incumbent is None:
            return None, setup, RaceRecord(None)
        record = RaceRecord(incumbent.number, tuple(t.number for t in others))
        race = setup.race(self.vector(incumbent), [self.vector(t) for t in others], self.penalty(incumbent))
        if self.study.space.config.goals != "pareto":  # there every trial is weighed anew, by each turn's weights
            self.forget_all_but([incumbent, *others])
        return race, setup, record

    def forget_all_but(self, trials: Sequence[FrozenTrial]) -> None:
        """Free the item scores of all other trials: a later candidate that races against one reads them again."""
        kept = {trial.number for trial in trials}
        self.vectors = {number: vector for number, vector in self.vectors.items() if number in kept}

    def vector(self, trial: FrozenTrial) -> Vector:
        """A trial's item scores, (N,)."""
        if trial.number not in self.vectors:
            self.vectors[trial.number] = self.setup.vector(trial)
        return self.vectors[trial.number]

    def penalty(self, trial: FrozenTrial) -> float:
        """The penalties of a trial's guards."""
        if trial.number not in self.penalties:
            self.penalties[trial.number] = self.setup.scale.penalty(trial_scores(trial))
        return self.penalties[trial.number]


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


async def settle_races(study: SearchStudy, known: list[Baseline], evaluations: Evaluations) -> Races | None:
    """How a search's candidates race; None if looking at their scores early does not pay.

    known: the baselines, which have all been scored.

    Where races look is chosen once and kept with the study: it decides on batches, and so on the scores' last bits.
    """
    setup = make_race_setup(study, known, evaluations)
    if setup is not None and must_choose_looks(study, setup.items):
        looks = await chosen_looks(setup, evaluations.pool, "candidates do not race in this session")
        if looks is None:
            return None
        study.stored.set_user_attr(LOOKS, {"items": setup.items, **asdict(looks)})
        evaluations.pool.log(f"races look after {', '.join(map(str, looks.ends))} items")
        setup = make_race_setup(study, known, evaluations)
    return None if setup is None else Races(study, setup)


async def chosen_looks(setup: RaceSetup, pool: Pool, else_say: str) -> Looks | None:
    """After how many items races should look, as a worker finds out; None, and `else_say` in the log, if it cannot."""
    result = await pool.run(RaceLooksJob(setup), "choosing where races look")
    if isinstance(result, Failure):
        pool.log(f"{else_say}: {result.reason}")
        return None
    assert result.looks is not None, "a RaceLooksJob gives looks"
    return result.looks


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
