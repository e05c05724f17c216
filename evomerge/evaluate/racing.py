"""Racing: stop a candidate when the items seen so far show that its mean is below the incumbent's.

It is a sequential test by betting.  The items of all tasks are one population, drawn without replacement in a random
order that is fixed before the first race and is the same for every candidate.

    i       an item; k counts the draws
    N       the number of items of all tasks
    w_i     the weight of item i: the weighted mean of the tasks' means is sum_i w_i s_i
    s_i     the candidate's score on item i, the higher the better, clipped at the item's ceiling
    d_i     the candidate's score minus the incumbent's on item i
    Delta   sum_i w_i d_i, the difference of the two models' values: the question is whether it is below 0
    u_i     the draw weight: item i is drawn with probability u_i / (sum of u over the items left)
    R_k     the sum of u over the items that are left before draw k
    a_i     a guess of d_i that was made before draw k: the prediction from the items seen so far
    Z_k     an estimate of Delta by draw k
    U_k     an upper bound of Z_k that is known before draw k, since no score exceeds its ceiling
    f_k     the bet, chosen before draw k from the draws before it, 0 <= f_k < 1
    K_k     the capital after draw k
    alpha   the greatest probability that a candidate with Delta >= 0 is stopped

With item i drawn k-th,

    Z_k = R_k w_i (d_i - a_i) / u_i + sum_{left} w a + sum_{seen} w d          E[Z_k | past] = Delta

    K_k = prod_{j <= k} (1 - f_j Z_j / U_j)

Z is the estimate of Des Raj (1956); with a = 0 it is the weighted estimate of Shekhar, Xu, Lipton, Liang and Ramdas
(2023), whose control variate is a.  K is a nonnegative supermartingale if Delta >= 0.  So, by Ville's inequality, it
ever reaches 1 / alpha with a probability of at most alpha, however often it is tested (Waudby-Smith and Ramdas 2020,
2024).  The probability is over the random order.
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
LOOKS = 40  # chunks of even size: smaller chunks stop a little earlier, larger ones make fuller batches
FEWEST = 8  # items of a chunk: fewer make small batches and little evidence
FLOOR = 0.3  # the share of u that does not depend on how informative an item is, so that no u is close to 0
CAP = 0.95  # the quantile of w (ceiling - incumbent) / u that bounds every item's part in U; see `bounded`
LARGEST_BET = 0.98  # with it one item at its ceiling divides the capital by 50; with 1 the capital would be 0
PRIOR_ITEMS, PRIOR_MEAN, PRIOR_SQUARE = 4.0, 0.5, 0.05  # the first bets are large, since most candidates are worse
PREDICTORS = 32  # how many finished candidates a prediction uses, the latest ones
RIDGE = 10.0  # the penalty of a prediction: that of so many items with typical differences
ROUNDING = 1e-12  # the share of the sums' size below which a bound or a difference counts as 0


@dataclass(frozen=True)
class Order:
    """One random order of all items.

    items: (N,) the indices of the items in the order of the draws.
    weights, draws: (N,) w and u, by index.
    """

    items: NDArray[np.intp]
    weights: Vector
    draws: Vector


@dataclass(frozen=True)
class Estimate:
    """An estimate of a candidate's value.

    value: the estimate.
    fraction: the share of the items that were scored.
    error: the standard error of the estimate before it is shrunk.
    """

    value: float
    fraction: float
    error: float


def item_weights(weights: Mapping[str, float], counts: Mapping[str, int]) -> Vector:
    """The weights w of all items, (N,), one task after another in the order of `counts`.

    weights: of each task.  counts: the number of items of each task.
    """
    total = sum(weights[task] for task in counts)
    return np.concatenate([np.full(n, weights[task] / total / n) for task, n in counts.items()])


def ceiling(metric: str, baselines: NDArray[np.float64]) -> float:
    """The ceiling of a task's item scores: the bound of the metric if it has one (`metrics.py`).

    baselines: (baselines, items) their scores.  For a metric without a bound the ceiling is their highest score plus
    their range; the test is then about scores clipped at that.
    """
    known = find_metric(metric.split(",")[0])
    if known is not None and (best := known.score_bounds[1]) is not None:
        return best
    highest, lowest = float(baselines.max()), float(baselines.min())
    return highest + (highest - lowest or abs(highest) or 1.0)


def race_order(
    ids: Sequence[str], weights: Vector, seed: int, baselines: NDArray[np.float64] | None, ceiling: Vector
) -> Order:
    """The random order of a study's items.  Its randomness comes only from the seed and the items' ids.

    ids: of the N items.
    weights, ceiling: (N,).
    baselines: (baselines, N) their scores, with which informative items are likely to come early; None draws in
        proportion to the weights.

    Item i gets the key E_i / u_i, where E_i is exponential and a hash of seed and id.  The items by ascending key are
    successive draws in proportion to u (Efraimidis and Spirakis 2006).
    """
    draws = weights if baselines is None else weights * informativeness(baselines, ceiling)
    keys = np.array([exponential(seed, i) for i in ids])
    keys = np.divide(keys, draws, out=np.full(len(keys), np.inf), where=draws > 0)  # items without weight come last
    return Order(np.argsort(keys, kind="stable"), weights, draws)


def informativeness(baselines: NDArray[np.float64], ceiling: Vector) -> Vector:
    """How informative each item is, (N,), with mean 1: how far the baselines are below its ceiling, mixed with FLOOR.

    baselines: (baselines, N) their scores.
    """
    gap = np.maximum(0.0, ceiling - baselines).mean(axis=0)
    mean = gap.mean()
    return FLOOR + (1 - FLOOR) * gap / mean if mean > 0 else np.ones(len(gap))


def exponential(seed: int, name: str) -> float:
    """An exponential random number that depends only on seed and name."""
    number = int.from_bytes(hashlib.sha256(f"race\0{seed}\0{name}".encode()).digest()[:8], "big")
    return -math.log((number + 1) / (2**64 + 1))


def chunks(order: Order, size: int | None = None) -> list[NDArray[np.intp]]:
    """The order in chunks of `size` items (default: LOOKS chunks, of FEWEST items at least)."""
    size = size or max(FEWEST, -(-len(order.items) // LOOKS))
    return [order.items[k : k + size] for k in range(0, len(order.items), size)]


class Race:
    """The test of one candidate against the incumbent.

    order: the order of the items.
    incumbent: (N,) the incumbent's item scores.
    ceiling: (N,) the highest score that counts for each item; higher scores are clipped.
    history: (C, N) the scores of other candidates that were evaluated in full.  The differences are predicted from
        them (ridge regression on the items seen).  A poor prediction makes the test slower, never invalid.
    alpha: see the module.
    """

    def __init__(
        self,
        order: Order,
        incumbent: Vector,
        ceiling: Vector,
        history: NDArray[np.float64] | None = None,
        alpha: float = ALPHA,
    ) -> None:
        at = order.items  # from here on all arrays are in the order of the draws
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
        self.scores = np.empty(0)  # (seen,) not clipped
        self.d = np.empty(0)  # (seen,) clipped
        self.capital = 0.0  # log K
        self.moments = PRIOR_ITEMS * np.array([PRIOR_MEAN, PRIOR_SQUARE])  # sums of -x and x^2, x = Z / U
        self.stopped = False

    def observe(self, scores: Vector) -> bool:
        """Take the scores of the next items of the order, (n,); whether the candidate is to be stopped.

        ValueError if a score is not finite or there are more scores than items.
        """
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
        # Even with all items left at their ceilings the candidate would be worse.
        beaten = after + tail_sums(self.w * self.bound)[seen + 1 : last + 1] < -tiny
        lost = (after < -tiny) & (beaten | (capital >= self.threshold))
        self.capital = float(capital[-1]) if count else self.capital
        self.stopped = bool(lost.any()) and last < len(self.w)
        return self.stopped

    def predict(self) -> Vector:
        """The differences of all items, (N,), predicted by ridge regression on those of finished candidates."""
        seen, scale = len(self.d), float(np.mean(self.gaps**2)) if self.gaps.size else 0.0
        if not seen or not scale:
            return np.zeros(len(self.w))
        known = self.gaps[:, :seen]
        gram = known @ known.T + RIDGE * scale * np.eye(len(known))
        found: Vector = np.linalg.solve(gram, known @ self.d) @ self.gaps
        return found

    def bounded(self, guess: Vector) -> Vector:
        """Guesses a, (N,), raised where a residual w (d - a) / u could otherwise exceed the cap.

        One item with a large possible gain and a small u would make U large for all draws and every bet small.  A
        higher guess for that item lowers U; it adds some variance.
        """
        most = np.divide(self.cap, self.ratio, out=np.full(len(guess), np.inf), where=self.ratio > 0)
        allowed: Vector = np.maximum(np.minimum(guess, self.bound), self.bound - most)
        return allowed

    def bets(self, x: Vector) -> Vector:
        """The bets f of the new draws, (n,): the mean of -Z / U over its mean square in the draws before, with a prior.

        x: (n,) Z / U of the new draws; values below -1 count as -1 in the bets, and in full in K.
        Source: the approximate Kelly bet of Waudby-Smith and Ramdas (2024).
        """
        x = np.maximum(x, -1.0)
        sums = np.cumsum(np.vstack([self.moments, np.stack([-x, x * x], axis=1)]), axis=0)  # (n + 1, 2), before each
        self.moments = sums[-1]
        fractions: Vector = np.clip(sums[:-1, 0] / sums[:-1, 1], 0.0, LARGEST_BET)
        return fractions

    def estimate(self) -> Estimate:
        """The estimate of the candidate's value, for the sampler.

        Delta's estimate is shrunk like a normal mean with a normal prior (Efron and Morris 1975),

            Delta' = (tau^2 Delta + error^2 m) / (tau^2 + error^2),

        with m and tau^2 the mean and variance of the history's differences from the incumbent.  With fewer than
        three of them, m = 0 and tau^2 = max(0, Delta^2 - error^2).  An estimate is never above the incumbent's value,
        because a stopped candidate is below it.  After the last item the value is exact.
        """
        total, seen = len(self.w), len(self.d)
        if seen == total:
            return Estimate(math.fsum(self.w * self.scores), 1.0, 0.0)
        delta, error = self.difference()
        gaps = self.gaps @ self.w  # (C,)
        if len(gaps) >= 3:
            mean, variance = float(gaps.mean()), float(gaps.var(ddof=1))
        else:
            mean, variance = 0.0, max(0.0, delta**2 - error**2)
        if error > 0:
            delta = mean + (delta - mean) * variance / (variance + error**2)
        return Estimate(self.value + min(0.0, delta), seen / total, error)

    def difference(self) -> tuple[float, float]:
        """The estimate of Delta from the items seen, and its standard error (with one item: the size of the estimate).

        It is the mean of the Z_k with weights 1 / ((N - k)(N - k + 1)), where a is the prediction from all items seen.
        Without a history a = 0, and the estimate is unbiased for a fixed number of items; with equal u it is the mean
        of the differences.  With a history it is a regression estimate (Sarndal, Swensson and Wretman 1992), which is
        nearly unbiased.
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
    """The sums from each index to the end, (n + 1,); the last one is 0."""
    return np.append(np.cumsum(x[::-1])[::-1], 0.0)
