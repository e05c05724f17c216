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
from typing import TYPE_CHECKING, Any, Literal

from evomerge.errors import EvomergeError
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

FLOOR = -6.0
"""In nats: a token or a choice that is less probable than exp(FLOOR) hardly lowers a floored objective any more."""


@dataclass(frozen=True)
class Answer:
    """What a model answered to one item, as far as it was computed.

    doc: the item's document.
    gold_logprob: the log-likelihood of the gold answer in nats.
    gold_bytes: the length of the gold answer in UTF-8.
    logprobs: the log-likelihood of every choice in nats; empty where only the gold answer's was computed.
    gold: the index of the gold choice in `logprobs`.
    text: the generated answer.
    token_logprobs: (T,) the log-probability of each token of the gold answer in nats; empty if there is no gold answer.
    token_margins: (T,) the logit of each of them minus that of the best other token: all above 0 where greedy decoding
        gives the gold answer.  Empty unless a metric has `extra="margins"`.
    token_entropies: (T,) the entropy in nats of the distribution that each of them is drawn from.  Empty unless a
        metric has `extra="entropies"`.
    lengths: (C,) the number of characters of every choice.
    """

    doc: dict[str, Any]
    gold_logprob: float = math.nan
    gold_bytes: int = 0
    logprobs: Sequence[float] = ()
    gold: int = 0
    text: str = ""
    token_logprobs: Sequence[float] = ()
    token_margins: Sequence[float] = ()
    token_entropies: Sequence[float] = ()
    lengths: Sequence[int] = ()


@dataclass(frozen=True)
class TensorAnswer:
    """What a model answered to one item, as tensors through which a metric is differentiated; see `Answer`.

    gold_logprob: a scalar.
    token_logprobs: (T,).
    logprobs: (C,), empty where only the gold answer's was computed.
    gold, gold_bytes, lengths: as in `Answer`.
    token_entropies: (T,), None unless the metric has `extra="entropies"`.
    """

    gold_logprob: "Tensor"
    token_logprobs: "Tensor"
    logprobs: "Tensor"
    gold: int = 0
    gold_bytes: int = 0
    lengths: Sequence[int] = ()
    token_entropies: "Tensor | None" = None


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


# The formulas.  Each is followed by the same on tensors, which takes a `TensorAnswer`.


def floored(logprob: float) -> float:
    """log((p + e) / (1 + e)) of a probability p with e = exp(FLOOR): log p far above the floor, `LOWEST` at p = 0."""
    return math.log(math.exp(min(0.0, logprob)) + math.exp(FLOOR)) - math.log1p(math.exp(FLOOR))


def floored_tensor(logprob: "Tensor") -> "Tensor":
    floor = logprob.new_tensor(FLOOR)
    return logprob.clamp(max=0).logaddexp(floor) - math.log1p(math.exp(FLOOR))


LOWEST = floored(-math.inf)


def log_softmax(logits: Sequence[float]) -> list[float]:
    """The logarithm of the softmax."""
    highest = max(logits)
    total = math.log(sum(math.exp(x - highest) for x in logits))
    return [x - highest - total for x in logits]


def answer_logprob(answer: Answer) -> float:
    """mean over the T tokens of the gold answer of log((p_t + e) / (1 + e)), e = exp(FLOOR), p_t the t-th one's
    probability."""
    return sum(map(floored, answer.token_logprobs)) / len(answer.token_logprobs)


def answer_logprob_tensor(answer: TensorAnswer) -> "Tensor":
    return floored_tensor(answer.token_logprobs).mean()


def choice_logprob(answer: Answer) -> float:
    """log((p + e) / (1 + e)), e = exp(FLOOR), p the gold choice in the softmax over the choices' log-likelihoods."""
    return floored(log_softmax(answer.logprobs)[answer.gold])


def choice_logprob_tensor(answer: TensorAnswer) -> "Tensor":
    return floored_tensor(answer.logprobs.log_softmax(0)[answer.gold])


def to_mean_length(lengths: Sequence[int]) -> list[float]:
    """For each choice the mean number of characters of the choices divided by its own."""
    mean = sum(lengths) / len(lengths)
    return [mean / max(1, length) for length in lengths]


def choice_logprob_norm(answer: Answer) -> float:
    """`choice_logprob` where each choice's log-likelihood counts per character, times the mean length of the choices.

    The most probable choice is then that of lm-eval's `acc_norm`, and choices of equal length give `choice_logprob`.
    """
    scaled = [x * f for x, f in zip(answer.logprobs, to_mean_length(answer.lengths), strict=True)]
    return floored(log_softmax(scaled)[answer.gold])


def choice_logprob_norm_tensor(answer: TensorAnswer) -> "Tensor":
    factors = answer.logprobs.new_tensor(to_mean_length(answer.lengths))  # (C,)
    return floored_tensor((answer.logprobs * factors).log_softmax(0)[answer.gold])


def gold_prob(answer: Answer) -> float:
    """The probability of the gold answer."""
    return math.exp(min(0.0, answer.gold_logprob))


def gold_prob_tensor(answer: TensorAnswer) -> "Tensor":
    return answer.gold_logprob.clamp(max=0).exp()


def bits_per_byte(answer: Answer) -> float:
    """The negative log-likelihood of the gold answer in bits for each byte of its text."""
    return -answer.gold_logprob / math.log(2) / max(1, answer.gold_bytes)


def bits_per_byte_tensor(answer: TensorAnswer) -> "Tensor":
    return -answer.gold_logprob / math.log(2) / max(1, answer.gold_bytes)


def margin(answer: Answer) -> float:
    """The gold choice's log-likelihood minus that of the best other choice, in nats: above 0 where `acc` is 1."""
    others = [x for k, x in enumerate(answer.logprobs) if k != answer.gold]
    right = answer.logprobs[answer.gold]
    return right - max(others, default=right)


def margin_tensor(answer: TensorAnswer) -> "Tensor":
    others = [x for k, x in enumerate(answer.logprobs.unbind()) if k != answer.gold]
    right = answer.logprobs[answer.gold]
    return right - max(others, default=right)


def brier(answer: Answer) -> float:
    """The squared error of the softmax over the choices (Brier 1950)."""
    return sum((math.exp(x) - (k == answer.gold)) ** 2 for k, x in enumerate(log_softmax(answer.logprobs)))


def brier_tensor(answer: TensorAnswer) -> "Tensor":
    error = answer.logprobs.softmax(0)
    return error.square().sum() + 1 - 2 * error[answer.gold]


def choice_entropy(answer: Answer) -> float:
    """-sum p log p in nats of the softmax p over the choices; needs no label (AdaMerging: Yang et al. 2024)."""
    return 0.0 - sum(math.exp(x) * x for x in log_softmax(answer.logprobs))


def choice_entropy_tensor(answer: TensorAnswer) -> "Tensor":
    logprobs = answer.logprobs.log_softmax(0)
    return -(logprobs.exp() * logprobs).sum()


def token_entropy(answer: Answer) -> float:
    """-sum p log p in nats of the distribution p of the answer's first token; needs no label (Yang et al. 2024)."""
    return answer.token_entropies[0]


def token_entropy_tensor(answer: TensorAnswer) -> "Tensor":
    assert answer.token_entropies is not None, "its `extra` asks for them"
    return answer.token_entropies[0]


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
    Metric("choice_logprob", "choices", True, LOWEST, 0.0, True, choice_logprob, differentiable=choice_logprob_tensor),
    Metric(
        "choice_logprob_norm", "choices", True, LOWEST, 0.0, True, choice_logprob_norm,
        differentiable=choice_logprob_norm_tensor,
    ),
    Metric("margin", "choices", True, None, None, True, margin, differentiable=margin_tensor),
    Metric("brier", "choices", False, 2.0, 0.0, True, brier, differentiable=brier_tensor),
    Metric("choice_entropy", "choices", False, None, 0.0, True, choice_entropy, differentiable=choice_entropy_tensor),
    Metric("answer_logprob", "gold", True, LOWEST, 0.0, True, answer_logprob, differentiable=answer_logprob_tensor),
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
CHOSEN: dict[str, dict[str, str]] = {
    "auto": {
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
