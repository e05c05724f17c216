"""What the canary measures of a model; apart from it, so that a study is read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Signs:
    """What the canary measures of a model.

    entropy: the entropy of the next token in nats, averaged over all positions.
    sameness: the share of positions whose most probable next token is the most frequent one.
    repeats: whether every prompt was continued by an endless repetition.
    """

    entropy: float
    sameness: float
    repeats: bool = False
