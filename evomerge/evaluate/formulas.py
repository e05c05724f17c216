"""The formulas of metrics: the value of one item from what the model answered.

Each is followed by the same on tensors, which takes a `TensorAnswer` and is differentiated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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


def answer_weakest(answer: Answer) -> float:
    """(mean + lowest) / 2 over the T tokens of the gold answer of log((p_t + e) / (1 + e)), see `answer_logprob`.

    One wrong token makes an answer wrong, so the weakest one counts for half.
    """
    values = [floored(x) for x in answer.token_logprobs]
    return (sum(values) / len(values) + min(values)) / 2


def answer_weakest_tensor(answer: TensorAnswer) -> "Tensor":
    values = floored_tensor(answer.token_logprobs)
    return (values.mean() + values.min()) / 2


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
