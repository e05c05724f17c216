"""Whether a model keeps the guards on the holdout split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from evomerge.search.verdict.intervals import Interval, intervals, ranges_of_differences, score_range

if TYPE_CHECKING:
    from evomerge.search.evaluation.guards import Guard, Tables


@dataclass(frozen=True)
class GuardResult:
    """A guard on the holdout split.

    name, max_drop, of: the guard's.
    metric: the names of the metrics that it compares.
    drop: the reference's mean minus the model's, paired by items.
    state: `kept` if the upper end of the drop's interval is at most `max_drop`, `broken` if the lower end is above it;
        each is wrong in at most 5% of all cases.
    """

    name: str
    metric: str
    of: str
    max_drop: float
    drop: Interval
    state: Literal["kept", "broken", "not decidable"]


def judge_guard(guard: "Guard", reference: "Tables", model: "Tables", seed: int, same: bool = False) -> GuardResult:
    """Compare a model with a guard's reference on the same items.

    reference, model: their item scores.
    seed: of the bootstrap.
    same: whether the model is the reference, which drops by nothing.
    """
    before, after = (
        {task: np.asarray(scores).tolist() for task, scores in guard.scores(table).items()}
        for table in (reference, model)
    )
    weights = dict.fromkeys(guard.metrics, 1.0)
    ranges = {t: score_range(metric, [before[t], after[t]]) for t, metric in guard.metrics.items()}
    drops = {task: np.subtract(before[task], after[task]).tolist() for task in guard.metrics}
    [drop] = [Interval(0.0, 0.0, 0.0)] if same else intervals([drops], ranges_of_differences(ranges), weights, seed)
    metric = ", ".join(dict.fromkeys(guard.metrics.values()))
    return GuardResult(guard.name, metric, guard.of, guard.max_drop, drop, state_of(drop, guard.max_drop))


def state_of(drop: Interval, allowed: float) -> Literal["kept", "broken", "not decidable"]:
    """Whether a drop is surely within what is allowed, surely beyond it, or neither."""
    if drop.high is not None and drop.high <= allowed:
        return "kept"
    return "broken" if drop.low is not None and drop.low > allowed else "not decidable"


def not_kept(guards: Sequence[GuardResult]) -> str:
    """The guards that are not kept, in words; empty if all are."""
    parts = {
        "broken": "{} is broken",
        "not decidable": "these items cannot show that {} is kept",
    }
    return "; ".join(parts[g.state].format(f"guard {g.name}") for g in guards if g.state != "kept")
