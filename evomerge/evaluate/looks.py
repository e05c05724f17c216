"""Where a race looks at a candidate: as often as pays, and never so often that a full evaluation costs 5% more.

A look ends a batch early, so the more looks, the smaller the batches, and a small one costs more per token.  What the
pieces of an order would cost is told by their batches, which are planned without a model, and by the times of a few,
measured once.  The places are then kept with the study: batches decide on padding, and padding on bits.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.evaluate.cache import KeysValues
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.loglikelihood import Batch, score_batches
from evomerge.evaluate.prefix import Tokens
from evomerge.evaluate.racing import FEWEST, LOOKS, Race
from evomerge.evaluate.workload import Workload

WORST = 1.05  # what a candidate that is never stopped may cost, as a multiple of scoring all its items at once
GROWTHS = (1.0, 1.4, 2.0)  # of one piece to the next: most candidates that are stopped are so early
SURVIVE, MEAN = 0.2, 0.3  # candidates never stopped, and the share of the items after which the others are, on average
REPEATS, ENOUGH = 5, 0.5  # timings of one kind, and seconds after which there are no more


@dataclass(frozen=True)
class Cost:
    """What was timed.  tokens, seconds: of forwards, padding too, the smallest first.  look: seconds of one look."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    look: float

    def forward(self, tokens: int) -> float:
        """Seconds of a forward: on straight lines between those that were timed, in proportion above."""
        if tokens > self.tokens[-1]:
            return self.seconds[-1] * tokens / self.tokens[-1]
        return float(np.interp(tokens, self.tokens, self.seconds))


def seconds_of(work: Workload, cost: Cost) -> float:
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
    at_once = seconds_of(whole, cost)
    best: tuple[int, ...] = (count,)
    least = at_once
    most = min(LOOKS, count // FEWEST)
    if cost.look > 0:
        most = int(min(most, (WORST - 1) * at_once / cost.look))
    for growth in GROWTHS:
        for ends in cuts(count, most, growth):
            each = [seconds_of(work, cost) + cost.look for work in pieces_of(ends)]
            if sum(each) <= WORST * at_once:
                starts = np.array([0, *ends[:-1]]) / count
                expected = float(np.dot(each, SURVIVE + (1 - SURVIVE) * np.exp(-starts / MEAN)))
                if expected < least:
                    best, least = ends, expected
                break
    return best


def measure_cost(model: Any, samples: Sequence[Sequence[Batch]], requests: int, race: Race) -> Cost:
    """Time forwards on a live model, and a look.

    samples: batches of several kinds; of each kind the one in the middle is timed.  requests: how many they belong to.
    race: any that has begun; it is driven to its end.
    """
    chosen = [sorted(batches, key=lambda b: b.inputs.numel())[len(batches) // 2] for batches in samples if batches]
    timed = sorted((batch.inputs.numel(), timed_batch(model, batch, requests)) for batch in chosen)
    seconds = np.maximum.accumulate([taken for _, taken in timed]).tolist()  # more tokens are not faster
    return Cost(tuple(tokens for tokens, _ in timed), tuple(seconds), timed_look(race))


def timed_batch(model: Any, batch: Batch, requests: int) -> float:
    """The least seconds of a batch, its trunk left out."""
    trunks: dict[Tokens, KeysValues] = {}
    score_batches(model, [batch], requests, Clock(), trunks)  # warms up
    taken: list[float] = []
    while not taken or (len(taken) < REPEATS and sum(taken) < ENOUGH):
        started = time.perf_counter()
        score_batches(model, [batch], requests, Clock(), trunks)
        taken.append(time.perf_counter() - started)
    return min(taken)


def timed_look(race: Race) -> float:
    """The median seconds of a look at a few items, from the present one to the end of a race."""
    taken = []
    step = max(1, (len(race.w) - len(race.d)) // REPEATS)
    while len(race.d) < len(race.w):
        started = time.perf_counter()
        race.observe(race.incumbent[len(race.d) : len(race.d) + step])
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))
