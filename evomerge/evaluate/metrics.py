"""The one table of metrics: what each needs, its direction, its bounds and its formula.

A new metric is one entry of `TABLE` and its formula (`formulas.py`).  Everything that depends on the metric reads the
table: which requests are made (`engine.py`), which task has it (`task_metrics.py`), the sign of item scores, the
highest score that a race assumes (`racing.py`) and the bounds of intervals (`search/verdict/intervals.py`).

Another package adds an objective by an entry point of the group `evomerge.objectives` whose object is a `Metric`:

    [project.entry-points."evomerge.objectives"]
    edit_similarity = "my_package:edit_similarity"
"""

import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from evomerge.errors import EvomergeError
from evomerge.evaluate.formulas import (
    LOWEST,
    TensorAnswer,
    answer_logprob,
    answer_logprob_tensor,
    answer_weakest,
    answer_weakest_tensor,
    bits_per_byte,
    bits_per_byte_tensor,
    brier,
    brier_tensor,
    choice_entropy,
    choice_entropy_tensor,
    choice_logprob,
    choice_logprob_norm,
    choice_logprob_norm_tensor,
    choice_logprob_tensor,
    gold_prob,
    gold_prob_tensor,
    margin,
    margin_tensor,
    rate,
    squared_error,
    token_entropy,
    token_entropy_tensor,
)
from evomerge.evaluate.formulas import Answer as Answer  # plug-ins import it from here
from evomerge.plugins import load_plugin

if TYPE_CHECKING:
    from torch import Tensor

Needs = Literal["gold", "choices", "generation", "lm_eval"]
KINDS: dict[Needs, tuple[str, ...]] = {
    "gold": ("multiple_choice", "generate_until", "loglikelihood"),
    "choices": ("multiple_choice",),
    "generation": ("generate_until",),
}
"""What a metric needs -> the kinds of lm-eval tasks (`output_type`) that have it."""

OBJECTIVES = "evomerge.objectives"  # the group of entry points

Extra = Literal["margins", "entropies"]
"""What is computed for each token of the gold answer only if a metric of the task reads it."""


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
    differentiable: the same formula on tensors, a scalar with the metric's own direction; None if there is none.
    extra: what the formula reads beside that.  Such a metric is only computed for a task whose objective or metric it
        is.
    """

    name: str
    needs: Needs
    higher_is_better: bool
    worst: float | None
    best: float | None
    smooth: bool
    formula: Callable[[Answer], float] | None = None
    from_lm_eval: Callable[[Any], float] = float
    differentiable: "Callable[[TensorAnswer], Tensor] | None" = None
    extra: Extra | None = None

    @property
    def score_bounds(self) -> tuple[float | None, float | None]:
        """The lowest and the highest item score, the higher the better; None if there is no bound."""
        if self.higher_is_better:
            return self.worst, self.best
        return None if self.worst is None else 0.0 - self.worst, None if self.best is None else 0.0 - self.best


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
    Metric("choice_logprob", "choices", True, LOWEST, 0.0, True, choice_logprob, differentiable=choice_logprob_tensor),
    Metric(
        "choice_logprob_norm", "choices", True, LOWEST, 0.0, True, choice_logprob_norm,
        differentiable=choice_logprob_norm_tensor,
    ),
    Metric("margin", "choices", True, None, None, True, margin, differentiable=margin_tensor),
    Metric("brier", "choices", False, 2.0, 0.0, True, brier, differentiable=brier_tensor),
    Metric("choice_entropy", "choices", False, None, 0.0, True, choice_entropy, differentiable=choice_entropy_tensor),
    Metric("answer_logprob", "gold", True, LOWEST, 0.0, True, answer_logprob, differentiable=answer_logprob_tensor),
    Metric("answer_weakest", "gold", True, LOWEST, 0.0, True, answer_weakest, differentiable=answer_weakest_tensor),
    Metric(
        "gold_logprob", "gold", True, None, 0.0, True, lambda answer: answer.gold_logprob,
        differentiable=lambda answer: answer.gold_logprob,
    ),
    Metric("gold_prob", "gold", True, 0.0, 1.0, True, gold_prob, differentiable=gold_prob_tensor),
    Metric(
        "token_entropy", "gold", False, None, 0.0, True, token_entropy, differentiable=token_entropy_tensor,
        extra="entropies",
    ),
    # A rolling task has no gold answer: there the metric of this name is lm-eval's.
    Metric(
        "bits_per_byte", "gold", False, None, 0.0, True, bits_per_byte, lambda value: rate(value, math.log(2)),
        differentiable=bits_per_byte_tensor,
    ),
)  # fmt: skip
METRICS = {metric.name: metric for metric in TABLE}
AUTO, AUTO_MEAN = "auto", "auto_mean"  # studies older than `answer_weakest` go on with the second
CHOSEN: dict[str, dict[str, str]] = {
    AUTO: {
        "multiple_choice": "choice_logprob",
        "generate_until": "answer_weakest",
        "loglikelihood": "answer_weakest",
        "loglikelihood_rolling": "bits_per_byte",
    },
    AUTO_MEAN: {
        "multiple_choice": "choice_logprob",
        "generate_until": "answer_logprob",
        "loglikelihood": "answer_logprob",
        "loglikelihood_rolling": "bits_per_byte",
    },
    "entropy": {
        "multiple_choice": "choice_entropy",
        "generate_until": "token_entropy",
        "loglikelihood": "token_entropy",
    },
}
"""An objective that stands for others -> kind of task -> the metric that it is there."""
NORMALISED = {"acc_norm": "choice_logprob_norm", "acc_bytes": "choice_logprob_norm"}
"""The task's metric -> what `auto` is instead of `choice_logprob`."""


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
