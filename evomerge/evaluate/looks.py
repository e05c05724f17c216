"""Where a race looks at a candidate: as often as pays.

A look ends a batch early, so the more looks, the smaller the batches: they share less, and each forward costs something
beside its tokens.  What the pieces of an order cost is told by their batches and by two constants that were measured
(`benchmarks/racing_time.py`) and are not measured anew: batches decide on padding and padding on bits, so the same
search must look at the same places whenever it is started.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluate.racing import FEWEST
from evomerge.evaluate.workload import Workload

FORWARD, LOOK = 64.0, 32.0  # tokens that cost what a forward costs beside its own, and a look; on the dear side
ON_ACCELERATOR = 1 / 16  # the same for a forward there, as a part of the tokens that fill a batch
GROWTHS = (1.0, 1.4, 2.0)  # of one piece to the next: most candidates that are stopped are so early
PIECES = (40, 20, 10, 6, 4, 3, 2)
SURVIVE, MEAN = 0.2, 0.3  # candidates never stopped, and the share of the items after which the others are, on average


@dataclass(frozen=True)
class Cost:
    """In the time of a token.  forward: of a forward beside its tokens.  look: of a look."""

    forward: float = FORWARD
    look: float = LOOK

    @classmethod
    def on(cls, device: str, batch_tokens: int) -> "Cost":
        """What is usual on a kind of device where so many tokens fill a batch: an accelerator needs many to be busy."""
        return cls() if device == "cpu" else cls(ON_ACCELERATOR * batch_tokens)


def time_of(work: Workload, cost: Cost) -> float:
    """What scoring a workload costs without what its batches stand on, which is computed once however it is cut.

    A generation is taken to run to its limit, and half its rows to have left by then.
    """
    total = sum(cost.forward + batch.inputs.numel() for batch in work.batches)
    for made in work.generations:
        width = made.inputs.shape[1]
        total += sum(cost.forward + len(made.owner[rows]) * (width - first) for rows, first in made.parts)
        total += made.limit * (cost.forward + math.ceil(0.75 * len(made.owner)))
    return total


@dataclass(frozen=True)
class Looks:
    """ends: after how many items to look, the last of them all.

    costs: of scoring so many, with the looks, as a part of what scoring all of them at once costs.
    """

    ends: tuple[int, ...]
    costs: tuple[float, ...]


def cuts(count: int) -> Iterator[tuple[int, ...]]:
    """Ways to cut `count` items into pieces of at least FEWEST, alike or growing, by where each piece ends."""
    for growth in GROWTHS:
        for pieces in PIECES:
            shares = np.cumsum(growth ** np.arange(pieces))
            ends = [round(count * share) for share in shares / shares[-1]]
            if min(np.diff([0, *ends])) >= FEWEST:
                yield tuple(ends)


def place_looks(
    count: int, whole: Workload, pieces_of: Callable[[Sequence[int]], Sequence[Workload]], cost: Cost
) -> Looks:
    """The looks that are expected to cost least, or only the last one, which is none.

    count: of the items.  whole: all of them at once.  pieces_of: the pieces that end there, with their batches.
    A candidate is taken to be still in the race at the share x of the items with the chance
    SURVIVE + (1 - SURVIVE) exp(-x / MEAN).
    """
    at_once = time_of(whole, cost)
    best, least = Looks((count,), (1.0,)), at_once
    for ends in cuts(count):
        each = [time_of(work, cost) + cost.look for work in pieces_of(ends)]
        starts = np.array([0, *ends[:-1]]) / count
        expected = float(np.dot(each, SURVIVE + (1 - SURVIVE) * np.exp(-starts / MEAN)))
        if expected < least:
            best, least = Looks(ends, tuple((np.cumsum(each) / at_once).tolist())), expected
    return best
