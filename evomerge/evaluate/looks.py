"""After how many items a race tests a candidate: its looks, as sequential analysis calls interim tests.

Before a test all its items must be scored, so more looks mean smaller batches: these share fewer prefixes, and each
forward has a fixed cost beside its tokens.  The cost of the chunks between the looks is computed from their batches and
from two constants, which were measured once (`benchmarks/racing_time.py`).  They are not measured again on each
machine, because the looks decide the batches, the batches the padding, and the padding the last bits of the scores: the
same search must have the same looks whenever it is started.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.evaluate.racing import FEWEST
from evomerge.evaluate.workload import Workload

FORWARD, LOOK = 64.0, 32.0  # the fixed cost of a forward and of a look in tokens; rather too high than too low
ON_ACCELERATOR = 1 / 16  # the fixed cost of a forward on an accelerator, as a share of the tokens that fill a batch
PYTHON_ITEM = 64.0  # the assumed cost of an item of a Python task in tokens; nobody knows what its function does
GROWTHS = (1.0, 1.4, 2.0)  # how much larger each chunk is than the one before: most stops come early
CHUNKS = (40, 20, 10, 6, 4, 3, 2)
SURVIVE, MEAN = 0.2, 0.3  # the share of candidates that are never stopped; the mean share of items seen by the others


@dataclass(frozen=True)
class Cost:
    """The fixed cost of a forward (beside its tokens) and of a look, in the cost of one token."""

    forward: float = FORWARD
    look: float = LOOK

    @classmethod
    def on(cls, device: str, batch_tokens: int) -> "Cost":
        """The usual costs on a kind of device (`cpu`, `cuda`).  batch_tokens: the token budget of a forward."""
        return cls() if device == "cpu" else cls(ON_ACCELERATOR * batch_tokens)


def time_of(work: Workload, cost: Cost) -> float:
    """The cost of a workload's batches in tokens, without its trunks, which are computed once for any chunks.

    A generation is assumed to run to its limit, while half of its rows finish evenly on the way.
    """
    total = sum(cost.forward + batch.inputs.numel() for batch in work.batches)
    for made in work.generations:
        width = made.inputs.shape[1]
        total += sum(cost.forward + len(made.owner[rows]) * (width - first) for rows, first in made.parts)
        total += made.limit * (cost.forward + math.ceil(0.75 * len(made.owner)))
    for part in work.by_task:
        total += sum(cost.forward + PYTHON_ITEM * len(places) for places in part.calls)
    return total


@dataclass(frozen=True)
class Looks:
    """The looks of a race.

    ends: after how many items the race tests, in ascending order; the last is the number of all items.
    costs: for each look, the cost of a race that stops there, as a share of the cost of scoring all items at once.
    """

    ends: tuple[int, ...]
    costs: tuple[float, ...]


def cuts(count: int) -> Iterator[tuple[int, ...]]:
    """Ways to cut `count` items into chunks of at least FEWEST items, of equal or growing sizes: where each ends."""
    for growth in GROWTHS:
        for chunks in CHUNKS:
            shares = np.cumsum(growth ** np.arange(chunks))
            ends = [round(count * share) for share in shares / shares[-1]]
            if min(np.diff([0, *ends])) >= FEWEST:
                yield tuple(ends)


def place_looks(
    count: int, whole: Workload, chunks_of: Callable[[Sequence[int]], Sequence[Workload]], cost: Cost
) -> Looks:
    """The looks with the least expected cost.  If no race is cheaper than scoring all items at once, only the last.

    count: the number of items.
    whole: all items at once, with batches.
    chunks_of: the chunks with these ends, with batches.
    cost: the fixed costs.

    The probability that a race has not stopped when the share x of the items is scored is assumed to be
    SURVIVE + (1 - SURVIVE) exp(-x / MEAN).
    """
    at_once = time_of(whole, cost)
    best, least = Looks((count,), (1.0,)), at_once
    for ends in cuts(count):
        each = [time_of(work, cost) + cost.look for work in chunks_of(ends)]
        starts = np.array([0, *ends[:-1]]) / count
        expected = float(np.dot(each, SURVIVE + (1 - SURVIVE) * np.exp(-starts / MEAN)))
        if expected < least:
            best, least = Looks(ends, tuple((np.cumsum(each) / at_once).tolist())), expected
    return best
