"""The one table of metrics: what each needs, its direction, its bounds and its formula for one item.

A new metric is one entry of `TABLE` and its formula; everything that depends on the metric reads the table: which
requests are made (`engine.py`), which task has it (`tasks.py`), the sign of item scores, the highest score that a race
assumes (`racing.py`) and the bounds of intervals (`search/verdict/intervals.py`).

Another package adds an objective by an entry point of the group `evomerge.objectives` whose object is a `Metric`:

    [project.entry-points."evomerge.objectives"]
    edit_similarity = "my_package:edit_similarity"
"""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import EvomergeError
from evomerge.plugins import load_plugin

Needs = Literal["gold", "choices", "generation", "lm_eval"]
KINDS: dict[Needs, tuple[str, ...]] = {
    "gold": ("multiple_choice", "generate_until", "loglikelihood"),
    "choices": ("multiple_choice",),
    "generation": ("generate_until",),
}
"""What a metric needs -> the kinds of lm-eval tasks (`output_type`) that have it."""

OBJECTIVES = "evomerge.objectives"  # the group of entry points


@dataclass(frozen=True)
class Answer:
    """What a model answered to one item, as far as it was computed.

    doc: the item's document.
    gold_logprob: the log-likelihood of the gold answer in nats.
    gold_bytes: the length of the gold answer in UTF-8.
    logprobs: the log-likelihood of every choice in nats; empty where only the gold answer's was computed.
    gold: the index of the gold choice in `logprobs`.
    text: the generated answer.
    """

    doc: dict[str, Any]
    gold_logprob: float = math.nan
    gold_bytes: int = 0
    logprobs: Sequence[float] = ()
    gold: int = 0
    text: str = ""


@dataclass(frozen=True)
class Metric:
    """One metric of an item.

    name: as configurations write it.
    needs: what is computed for it: only the log-likelihood of the gold answer (`gold`), that of every choice
        (`choices`), a generated answer (`generation`), or the requests of lm-eval's own metric (`lm_eval`).
    higher_is_better: the direction; for `lm_eval` used where the task does not give one.
    worst, best: the bounds of an item's value, None if it has no bound.
    smooth: whether it moves with every change of a probability, unlike right or wrong.
    formula: the value of one item from its `Answer`; None for `lm_eval`, where lm-eval computes the value.
    from_lm_eval: lm-eval's raw value of one item as a number.
    """

    name: str
    needs: Needs
    higher_is_better: bool
    worst: float | None
    best: float | None
    smooth: bool
    formula: Callable[[Answer], float] | None = None
    from_lm_eval: Callable[[Any], float] = float

    @property
    def score_bounds(self) -> tuple[float | None, float | None]:
        """The lowest and the highest item score, the higher the better; None if there is no bound."""
        if self.higher_is_better:
            return self.worst, self.best
        return None if self.worst is None else 0.0 - self.worst, None if self.best is None else 0.0 - self.best


def gold_prob(answer: Answer) -> float:
    """The probability of the gold answer."""
    return math.exp(min(0.0, answer.gold_logprob))


def bits_per_byte(answer: Answer) -> float:
    """The negative log-likelihood of the gold answer in bits for each byte of its text."""
    return -answer.gold_logprob / math.log(2) / max(1, answer.gold_bytes)


def margin(answer: Answer) -> float:
    """The gold choice's log-likelihood minus that of the best other choice, in nats: above 0 where `acc` is 1."""
    others = [x for k, x in enumerate(answer.logprobs) if k != answer.gold]
    right = answer.logprobs[answer.gold]
    return right - max(others, default=right)


def brier(answer: Answer) -> float:
    """The squared error of the softmax over the choices (Brier 1950)."""
    highest = max(answer.logprobs)
    odds = [math.exp(x - highest) for x in answer.logprobs]
    total = sum(odds)
    return sum((x / total - (k == answer.gold)) ** 2 for k, x in enumerate(odds))


def rate(value: Any, nats: float = 1.0) -> float:
    """lm-eval's (log-likelihood, count) of a text as the negative log-likelihood per word or byte, in units of `nats`.

    lm-eval's perplexity is the exponential of the mean of that.
    """
    if not isinstance(value, tuple):
        return float(value)
    loglikelihood, count = value
    return float(-loglikelihood / max(1, count) / nats)


def squared_error(value: Any) -> float:
    """lm-eval's (gold choice, probabilities) as the squared error of an item."""
    if not isinstance(value, tuple):
        return float(value)
    gold, probabilities = value
    return float(sum((float(p) - (k == gold)) ** 2 for k, p in enumerate(probabilities)))


TABLE = (
    #      name           needs      higher  worst  best  smooth
    Metric("acc", "lm_eval", True, 0.0, 1.0, False),
    Metric("acc_norm", "lm_eval", True, 0.0, 1.0, False),
    Metric("acc_bytes", "lm_eval", True, 0.0, 1.0, False),
    Metric("exact_match", "lm_eval", True, 0.0, 1.0, False),
    Metric("brier_score", "lm_eval", False, 2.0, 0.0, True, from_lm_eval=squared_error),
    Metric("perplexity", "lm_eval", False, None, 0.0, True, from_lm_eval=lambda loglikelihood: -float(loglikelihood)),
    Metric("word_perplexity", "lm_eval", False, None, 0.0, True, from_lm_eval=rate),
    Metric("byte_perplexity", "lm_eval", False, None, 0.0, True, from_lm_eval=rate),
    Metric("margin", "choices", True, None, None, True, margin),
    Metric("brier", "choices", False, 2.0, 0.0, True, brier),
    Metric("gold_logprob", "gold", True, None, 0.0, True, lambda answer: answer.gold_logprob),
    Metric("gold_prob", "gold", True, 0.0, 1.0, True, gold_prob),
    # A rolling task has no gold answer: there the metric of this name is lm-eval's.
    Metric("bits_per_byte", "gold", False, None, 0.0, True, bits_per_byte, lambda value: rate(value, math.log(2))),
)
METRICS = {metric.name: metric for metric in TABLE}


def find_metric(name: str) -> Metric | None:
    """The metric of the table, or else the one that another package adds; None if there is none of this name.

    name: without a filter.  EvomergeError if the other package's entry point is not a usable `Metric`.
    """
    return METRICS.get(name) or added_metric(name)


def added_metric(name: str) -> Metric | None:
    """The metric that an entry point of this name gives, None if there is no such entry point.

    EvomergeError if the entry point cannot be loaded, or its object is not a `Metric` of this name with a formula.
    """
    entry = next(iter(importlib.metadata.entry_points(group=OBJECTIVES, name=name)), None)
    if entry is None:
        return None
    where = f"objective {name!r}: the entry point {entry.value} of {entry.dist.name if entry.dist else 'a package'}"
    found = load_plugin(entry, Metric, where, "is not an evomerge.evaluate.metrics.Metric")
    if found.name != name or found.formula is None or found.needs not in KINDS:
        raise EvomergeError(f"{where} needs the name {name!r}, a formula, and one of {', '.join(KINDS)} as `needs`")
    return found


def added_names() -> list[str]:
    """The names of the metrics that other packages add, sorted."""
    return sorted(entry.name for entry in importlib.metadata.entry_points(group=OBJECTIVES))
