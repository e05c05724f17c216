"""The course that a study's candidates race on, from what the study knows of its baselines."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from optuna.trial import FrozenTrial

from evomerge.evaluate.racing import PREDICTORS
from evomerge.search.baselines import Baseline
from evomerge.search.ledger import Book
from evomerge.search.race import Course, build_course
from evomerge.search.scores import objective_scores
from evomerge.search.study import SearchStudy, rank, record_of

LOOKS = "evomerge:looks"  # study attribute: after how many items its races look


def rivals(study: SearchStudy, items: str) -> tuple[FrozenTrial | None, list[FrozenTrial]]:
    """Of the trials evaluated in full on these items, the best and the latest others."""
    best = study.best
    if best is not None and record_of(best).get("items") != items:  # items were changed on the way
        here = (t for t in study.complete if record_of(t).get("items") == items)
        best = max(here, key=rank, default=None)
    latest = (t for t in reversed(study.complete) if t is not best and record_of(t).get("items") == items)
    return best, list(islice(latest, PREDICTORS))[::-1]


def make_course(study: SearchStudy, known: list[Baseline], book: Book) -> Course | None:
    """The race course of a search whose baselines have all been evaluated.

    None if the configuration wants no race, or the study says that looking early does not pay.
    """
    config = study.space.config
    if not config.racing.enabled:
        return None
    items = book.items("search")
    scores: list[dict[str, Any]] = []
    for baseline in known:
        trial = study.of_baseline(baseline.name)
        if trial is not None and record_of(trial).get("items") == items:
            scores.append(objective_scores(trial))
        elif (found := book.stored("search", baseline.recipe)) is not None:
            scores.append(book.exam.of(found, "objective"))
    ends = looks_of(study, items)
    if ends is not None and len(ends) == 1:
        return None
    return build_course(book.exam, items, scores, config.seed, config.racing, ends or ())


def looks_of(study: SearchStudy, items: str) -> Sequence[int] | None:
    """After how many items the study's races look, None if that is still to be found out; none for those that began
    before it was kept, whose races are cut as `chunks` says."""
    found: dict[str, Any] = study.stored.user_attrs.get(LOOKS, {})
    if found.get("items") == items:
        ends: list[int] = found["ends"]
        return ends
    return () if not found and any(record_of(t).get("race") for t in study.finished) else None
