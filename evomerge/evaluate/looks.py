"""Where a race looks at a candidate: as often as pays, and never so often that a full evaluation costs 5% more.

A look ends a batch early, so the more looks, the smaller the batches, and a small one costs more per token.  What the
pieces of an order would cost is told by their batches and by what a forward and a look cost beside their tokens.  That
was measured once (`benchmarks/racing_time.py`) and is not measured anew: batches decide on padding and padding on
bits, so the same search must look at the same places whenever it is started.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluate.racing import FEWEST, LOOKS
from evomerge.evaluate.workload import Workload

WORST = 1.05  # what a candidate that is never stopped may cost, as a multiple of scoring all its items at once
GROWTHS = (1.0, 1.4, 2.0)  # of one piece to the next: most candidates that are stopped are so early
SURVIVE, MEAN = 0.2, 0.3  # candidates never stopped, and the share of the items after which the others are, on average


@dataclass(frozen=True)
class Cost:
    """What scoring costs, in any unit of time.

    tokens, times: of forwards, padding too, the smallest first.  look: of one look.
    """

    tokens: tuple[int, ...]
    times: tuple[float, ...]
    look: float

    def forward(self, tokens: int) -> float:
        """The time of a forward: on straight lines between those that are known, in proportion above."""
        if tokens > self.tokens[-1]:
            return self.times[-1] * tokens / self.tokens[-1]
        return float(np.interp(tokens, self.tokens, self.times))


# In tokens' times: 12 looks on the tiny family's 880 items cost 18% more; larger models have dearer tokens.
USUAL = Cost((0, 1 << 20), (64.0, 64.0 + (1 << 20)), 32.0)


def time_of(work: Workload, cost: Cost) -> float:
    """What scoring a workload costs without what its batches stand on, which is computed once however it is cut.

    A generation is taken to run to its limit, and half its rows to have left by then.
    """
    total = sum(cost.forward(batch.inputs.numel()) for batch in work.batches)
    for made in work.generations:
        width = made.inputs.shape[1]
        total += sum(cost.forward(len(made.owner[rows]) * (width - first)) for rows, first in made.parts)
        total += made.limit * cost.forward(math.ceil(0.75 * len(made.owner)))
    return total


def cuts(count: int, most: int, growth: float) -> Iterator[tuple[int, ...]]:
    """Ways to cut `count` items into at most `most` pieces, each `growth` times the one before: where each piece ends.
    The finest comes first."""
    pieces = most
    while pieces > 1:
        shares = np.cumsum(growth ** np.arange(pieces))
        ends = [round(count * share) for share in shares / shares[-1]]
        if min(np.diff([0, *ends])) >= FEWEST:
            yield tuple(ends)
        pieces = min(pieces - 1, math.ceil(pieces / 1.3))


def place_looks(
    count: int, whole: Workload, pieces_of: Callable[[Sequence[int]], Sequence[Workload]], cost: Cost
) -> tuple[int, ...]:
    """After how many items to look, the last of them all; only that one if looking does not pay.

    count: of the items.  whole: all of them at once.  pieces_of: the pieces that end there, with their batches.
    Of the cuts that keep to `WORST`, the finest for each growth, the one with the least expected cost, where a
    candidate is still in the race at the share x of the items with the chance SURVIVE + (1 - SURVIVE) exp(-x / MEAN).
    """
    at_once = time_of(whole, cost)
    best: tuple[int, ...] = (count,)
    least = at_once
    most = min(LOOKS, count // FEWEST)
    if cost.look > 0:
        most = int(min(most, (WORST - 1) * at_once / cost.look))
    for growth in GROWTHS:
        for ends in cuts(count, most, growth):
            each = [time_of(work, cost) + cost.look for work in pieces_of(ends)]
            if sum(each) <= WORST * at_once:
                starts = np.array([0, *ends[:-1]]) / count
                expected = float(np.dot(each, SURVIVE + (1 - SURVIVE) * np.exp(-starts / MEAN)))
                if expected < least:
                    best, least = ends, expected
                break
    return best
