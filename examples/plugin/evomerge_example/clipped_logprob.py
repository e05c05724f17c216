"""clipped_logprob: the log-probability of the gold answer in nats, but never less than -5.

An item that every candidate gets badly wrong then counts 5 nats, not thirty, so it does not outweigh the others.
"""

from evomerge.evaluate.metrics import Answer, Metric

LOWEST = -5.0


def clipped_logprob(answer: Answer) -> float:
    """The value of one item."""
    return max(LOWEST, answer.gold_logprob)


METRIC = Metric(
    name="clipped_logprob",
    needs="gold",
    higher_is_better=True,
    worst=LOWEST,
    best=0.0,
    smooth=True,
    formula=clipped_logprob,
)
