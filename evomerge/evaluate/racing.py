"""Racing: stop a candidate when the items seen so far show that its mean lies below the incumbent's.

The items of all tasks form one population.  The candidate's value is sum_i w_i s_i, the incumbent's is known in
full, and what is asked is the sign of Delta = sum_i w_i d_i with d_i the paired difference on item i.  Items are
drawn without replacement, item i with probability u_i / (sum of u over the items left): a random order that is drawn
once and is the same for every candidate.

After the k-th draw, with R_k the sum of u over the items left before it and a any guess of the differences that was
made before it,

    Z_k = R_k w_i (d_i - a_i) / u_i + sum_{left} w a + sum_{seen} w d          E[Z_k | past] = Delta

(Des Raj 1956; with a = 0 the weighted estimate of Shekhar, Xu, Lipton, Liang and Ramdas 2023, a being their control
variate).  No score exceeds its ceiling, so Z_k has an upper bound U_k that is known before the draw, and

    K_k = prod_j (1 - f_j Z_j / U_j),   0 <= f_j < 1 chosen before the draw

is a nonnegative supermartingale if Delta >= 0: by Ville's inequality it ever reaches 1 / alpha with a chance of at
most alpha, however often one looks (Waudby-Smith and Ramdas 2020, 2024).  The chance is over the random order.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.evaluate.metrics import find_metric

Vector = NDArray[np.float64]

ALPHA = 0.02
LOOKS = 40  # chunks: finer ones stop a little sooner, coarser ones make fuller batches
FEWEST = 8  # items of a chunk: fewer make poor batches and tell little
FLOOR = 0.3  # share of the draws that ignores how informative an item is: no u is tiny, whoever the incumbent is
CAP = 0.95  # items above this quantile of w (ceiling - incumbent) / u would make every bet small; see `bounded`
LARGEST_BET = 0.98  # one item at its ceiling then costs a factor of 50, not everything
PRIOR_ITEMS, PRIOR_MEAN, PRIOR_SQUARE = 4.0, 0.5, 0.05  # the first bets are bold: most candidates are worse
PREDICTORS = 32  # finished candidates that a prediction uses, the latest
RIDGE = 10.0  # the penalty of a prediction, as so many items of typical differences
ROUNDING = 1e-12  # of all that is at stake: a smaller bound or gap is not told from zero


@dataclass(frozen=True)
class Order:
    """One random order of all items.  items: (N,) their indices.  weights, draws: (N,) w and u, by index."""

    items: NDArray[np.intp]
    weights: Vector
    draws: Vector


@dataclass(frozen=True)
class Estimate:
    """A candidate's value from the share `fraction` of its items; `error` is the standard error before shrinking."""

    value: float
    fraction: float
    error: float


def item_weights(weights: Mapping[str, float], counts: Mapping[str, int]) -> Vector:
    """(N,) w of the items, task after task in the order of `counts`: the weighted mean of the tasks' means."""
    total = sum(weights[task] for task in counts)
    return np.concatenate([np.full(n, weights[task] / total / n) for task, n in counts.items()])


def ceiling(metric: str, baselines: NDArray[np.float64]) -> float:
    """The highest score that counts for an item of a task.

    baselines: (B, n) their scores.  A metric without a known top gets their highest score plus their range; the test
    is then about scores clipped to that.
    """
    known = find_metric(metric.split(",")[0])
    if known is not None and (best := known.score_bounds[1]) is not None:
        return best
    highest, lowest = float(baselines.max()), float(baselines.min())
    return highest + (highest - lowest or abs(highest) or 1.0)


def race_order(
    ids: Sequence[str], weights: Vector, seed: int, baselines: NDArray[np.float64] | None, ceiling: Vector
) -> Order:
    """The order of a study's items, from its seed and the items' ids.

    baselines: (B, N) their scores, which make informative items likely to come early; None draws by weight alone.
    Item i gets the key E_i / u_i with E_i exponential, a hash of seed and id; keys in ascending order are successive
    draws in proportion to u (Efraimidis and Spirakis 2006).
    """
    draws = weights if baselines is None else weights * informativeness(baselines, ceiling)
    keys = np.array([exponential(seed, i) for i in ids])
    keys = np.divide(keys, draws, out=np.full(len(keys), np.inf), where=draws > 0)  # those without weight come last
    return Order(np.argsort(keys, kind="stable"), weights, draws)


def informativeness(baselines: NDArray[np.float64], ceiling: Vector) -> Vector:
    """(N,) how much an item can tell, mean 1: what the baselines leave to be gained on it, mixed with FLOOR."""
    room = np.maximum(0.0, ceiling - baselines).mean(axis=0)
    mean = room.mean()
    return FLOOR + (1 - FLOOR) * room / mean if mean > 0 else np.ones(len(room))


def exponential(seed: int, name: str) -> float:
    """An exponential variable that is a function of seed and name alone."""
    number = int.from_bytes(hashlib.sha256(f"race\0{seed}\0{name}".encode()).digest()[:8], "big")
    return -math.log((number + 1) / (2**64 + 1))


def chunks(order: Order, size: int | None = None) -> list[NDArray[np.intp]]:
    """The order in pieces of `size` items (default: LOOKS pieces, of FEWEST items at least); one look after each."""
    size = size or max(FEWEST, -(-len(order.items) // LOOKS))
    return [order.items[k : k + size] for k in range(0, len(order.items), size)]


class Race:
    """One candidate against the incumbent.

    incumbent: (N,) its item scores.  ceiling: (N,) the highest score an item can have; higher ones count as that.
    history: (H, N) scores of other candidates that were evaluated in full.  They predict the differences (ridge
    regression on the items seen) and tell how candidates vary.  A poor prediction costs time, never validity.
    """

    def __init__(
        self,
        order: Order,
        incumbent: Vector,
        ceiling: Vector,
        history: NDArray[np.float64] | None = None,
        alpha: float = ALPHA,
    ) -> None:
        at = order.items  # from here on everything stands in the order of the race
        self.w, u = order.weights[at], order.draws[at]
        self.ceiling = ceiling[at]
        self.incumbent = np.minimum(incumbent[at], self.ceiling)
        self.value = float(order.weights @ incumbent)
        self.ratio = np.divide(self.w, u, out=np.zeros_like(u), where=u > 0)
        self.left = tail_sums(u)  # (N + 1,) R
        self.bound = self.ceiling - self.incumbent
        self.cap = float(np.quantile(self.ratio * self.bound, CAP))
        recent = np.empty((0, len(at))) if history is None else history[-PREDICTORS:, at]
        self.gaps = np.minimum(recent, self.ceiling) - self.incumbent
        self.threshold = -math.log(alpha)
        self.scores = np.empty(0)  # (seen,) as they came
        self.d = np.empty(0)  # (seen,) differences, clipped
        self.capital = 0.0  # log K
        self.moments = PRIOR_ITEMS * np.array([PRIOR_MEAN, PRIOR_SQUARE])  # sums of -x and x^2, x = Z / U
        self.stopped = False

    def observe(self, scores: Vector) -> bool:
        """Take the scores of the next items of the order; whether the candidate is to be stopped."""
        seen, last = len(self.d), len(self.d) + len(scores)
        if last > len(self.w) or not np.isfinite(scores).all():
            raise ValueError(f"items {seen} to {last} of {len(self.w)}: one finite score for each of the next items")
        guess = self.bounded(self.predict())[seen:]  # (N - seen,)
        new, count = slice(seen, last), len(scores)
        d = np.minimum(scores, self.ceiling[new]) - self.incumbent[new]
        after = math.fsum(self.w[:seen] * self.d) + np.cumsum(self.w[new] * d)  # (n,) sum of w d, this item's included
        rest = tail_sums(self.w[seen:] * guess)[:count] + after - self.w[new] * d
        highest = np.maximum.accumulate((self.ratio[seen:] * (self.bound[seen:] - guess))[::-1])[::-1]
        z = self.left[new] * self.ratio[new] * (d - guess[:count]) + rest
        top = self.left[new] * highest[:count] + rest
        self.scores, self.d = np.concatenate([self.scores, scores]), np.concatenate([self.d, d])
        tiny = ROUNDING * (self.w @ self.bound + np.cumsum(self.w[:last] * np.abs(self.d))[seen:])  # (n,)
        x = np.minimum(1.0, np.divide(z, top, out=np.zeros_like(z), where=top > tiny))
        capital = self.capital + np.cumsum(np.log1p(-self.bets(x) * x))
        beaten = after + tail_sums(self.w * self.bound)[seen + 1 : last + 1] < -tiny  # whatever the items left say
        lost = (after < -tiny) & (beaten | (capital >= self.threshold))
        self.capital = float(capital[-1]) if count else self.capital
        self.stopped = bool(lost.any()) and last < len(self.w)
        return self.stopped

    def predict(self) -> Vector:
        """(N,) differences of all items, by ridge regression of those seen on those of the finished candidates."""
        seen, scale = len(self.d), float(np.mean(self.gaps**2)) if self.gaps.size else 0.0
        if not seen or not scale:
            return np.zeros(len(self.w))
        known = self.gaps[:, :seen]
        gram = known @ known.T + RIDGE * scale * np.eye(len(known))
        found: Vector = np.linalg.solve(gram, known @ self.d) @ self.gaps
        return found

    def bounded(self, guess: Vector) -> Vector:
        """Guesses (N,) for which no residual w (d - a) / u can exceed the cap.

        An item with much to gain and a small u sets the bound for all.  A guess that credits it beforehand with all of
        that gain but the cap lowers the bound, for the price of some variance.
        """
        room = np.divide(self.cap, self.ratio, out=np.full(len(guess), np.inf), where=self.ratio > 0)
        allowed: Vector = np.maximum(np.minimum(guess, self.bound), self.bound - room)
        return allowed

    def bets(self, x: Vector) -> Vector:
        """(n,) f for each of the new draws from the draws before it: mean over mean square of -Z / U, with a prior.

        The approximate Kelly bet of Waudby-Smith and Ramdas (2024).  Outliers count as -1 here and in full in K.
        """
        x = np.maximum(x, -1.0)
        sums = np.cumsum(np.vstack([self.moments, np.stack([-x, x * x], axis=1)]), axis=0)  # (n + 1, 2), before each
        self.moments = sums[-1]
        fractions: Vector = np.clip(sums[:-1, 0] / sums[:-1, 1], 0.0, LARGEST_BET)
        return fractions

    def estimate(self) -> Estimate:
        """The candidate's value, for the sampler to learn from.

        Delta's estimate is shrunk as a normal mean is by a normal prior (Efron and Morris 1975),

            Delta' = (tau^2 Delta + error^2 m) / (tau^2 + error^2),

        with m and tau^2 the mean and variance of the history's differences from the incumbent.  With fewer than
        three of them, m = 0 and tau^2 = max(0, Delta^2 - error^2).  No estimate is above the incumbent's value: a
        stopped candidate is below it.  After the last item the value is exact.
        """
        total, seen = len(self.w), len(self.d)
        if seen == total:
            return Estimate(math.fsum(self.w * self.scores), 1.0, 0.0)
        delta, error = self.difference()
        gaps = self.gaps @ self.w  # (H,)
        if len(gaps) >= 3:
            mean, variance = float(gaps.mean()), float(gaps.var(ddof=1))
        else:
            mean, variance = 0.0, max(0.0, delta**2 - error**2)
        if error > 0:
            delta = mean + (delta - mean) * variance / (variance + error**2)
        return Estimate(self.value + min(0.0, delta), seen / total, error)

    def difference(self) -> tuple[float, float]:
        """Delta's estimate from the items seen and its standard error (with one item, the estimate itself).

        The mean of Z_k with weights 1 / ((N - k)(N - k + 1)), where a is the prediction from all items seen.  Without a
        history a = 0, and the estimate is unbiased at any fixed number of items, the plain mean of the differences if
        all u are equal.  With one it is a regression estimate (Sarndal, Swensson and Wretman 1992), nearly unbiased.
        """
        total, seen = len(self.w), len(self.d)
        guess = self.predict()
        gained = self.w[:seen] * self.d
        rest = tail_sums(self.w * guess)[:seen] + np.cumsum(gained) - gained
        z = self.left[:seen] * self.ratio[:seen] * (self.d - guess[:seen]) + rest
        k = np.arange(1, seen + 1)
        share = 1 / ((total - k) * (total - k + 1.0))
        share /= share.sum()
        delta = float(share @ z)
        if seen < 2:
            return delta, abs(delta)
        return delta, math.sqrt(float(share**2 @ (z - delta) ** 2) * seen / (seen - 1))


def tail_sums(x: Vector) -> Vector:
    """(n + 1,) sums from each place to the end."""
    return np.append(np.cumsum(x[::-1])[::-1], 0.0)
