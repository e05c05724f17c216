"""CMA-ES over coefficients and choices together: CatCMA with margin (Hamano et al. 2025), on the `cmaes` library.

The coefficients have a Gaussian distribution as in CMA-ES, and each choice has a probability for every value, which
moves along its natural gradient.  The margin keeps every probability above a small one, so that no value of a choice is
ever given up.  The two are updated by the same ranks of a generation, and one enters the other nowhere; so where a
covariance of the coefficients costs too much, they have a separable CMA-ES of their own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass

Vector = NDArray[np.float64]
SETTLED = 1.5  # a choice whose other values have at most so many times their least probability is settled


class MixedCMA:
    """What CmaEsSampler needs of `cmaes.CMA`, for spaces with choices.

    Coordinates are C coefficients in the unit cube, and then the number of the value of each of K choices.

    mean: (C + K,) where it starts.
    sigma: the first step of the coefficients, and the probability with which a choice is drawn anew.
    counts: how many values each choice has, K of them.
    population: samples per generation.
    anywhere: whether every value of a choice has the same probability at first, wherever `mean` is.
    separable: whether the coefficients have a variance each and no covariance.

    Example:
        cma = MixedCMA(np.array([0.5, 2]), sigma=0.2, counts=[3], population=6)
        points = [cma.ask() for _ in range(6)]
        cma.tell([(point, float(point[0] + point[1])) for point in points])
    """

    def __init__(
        self,
        mean: Vector,
        sigma: float,
        counts: Sequence[int],
        population: int,
        anywhere: bool = False,
        separable: bool = False,
    ) -> None:
        from cmaes import CatCMAwM, SepCMA  # it imports scipy, see cmaes.py

        self.dim, self.counts = len(mean), np.array(counts)
        self.numbers = self.dim - len(counts)
        likely = np.zeros((len(counts), max(counts)))  # (K, most values)
        for k, count in enumerate(counts):
            likely[k, :count] = (1.0 if anywhere else sigma) / count
            if not anywhere:
                likely[k, int(mean[self.numbers + k])] += 1.0 - sigma
        start, cube = mean[: self.numbers].copy(), [[0.0, 1.0]] * self.numbers
        joint = bool(cube) and not separable
        self.apart: SepCMA | None = None  # of the coefficients, if they are separable
        if cube and separable:
            self.apart = SepCMA(start, sigma, np.array(cube), seed=0, population_size=population)
        self.cma: CatCMAwM = CatCMAwM(
            x_space=cube if joint else None,
            c_space=list(counts),
            population_size=population,
            mean=start if joint else None,
            sigma=sigma if joint else None,
            cov=np.eye(self.numbers) if joint else None,
            cat_param=likely,
            seed=0,
        )

    @property
    def population_size(self) -> int:
        return int(self.cma.population_size)

    @property
    def likely(self) -> Vector:
        """(K, most values) the probabilities; cmaes has no public name for them."""
        found: Vector = self.cma._q
        return found

    @property
    def mean(self) -> Vector:
        """(C + K,) the mean of the coefficients, and the most probable value of each choice."""
        middle = self.apart.mean if self.apart else self.cma._mean if self.numbers else np.zeros(0)
        return np.concatenate([middle, self.likely.argmax(axis=1).astype(float)])

    def reseed_rng(self, seed: int) -> None:
        """Draw the next sample with this seed."""
        self.cma.reseed_rng(seed)
        if self.apart:
            self.apart.reseed_rng(seed ^ 1)  # another one: of one seed, choices and first coefficients would depend

    def ask(self) -> Vector:
        """(C + K,) a sample."""
        drawn = self.cma.ask()
        assert drawn.c is not None, "there are choices"
        numbers = self.apart.ask() if self.apart else drawn.x
        values = drawn.c.argmax(axis=1).astype(float)
        return values if numbers is None else np.concatenate([numbers, values])

    def tell(self, generation: Sequence[tuple[Vector, float]]) -> None:
        """Update the distribution by the values of a generation, the lower the better."""
        told = []
        for at, value in generation:
            values = at[self.numbers :].astype(int)
            one_hot = np.arange(self.likely.shape[1]) == values[:, None]  # (K, most values)
            numbers = at[: self.numbers] if self.numbers and self.apart is None else None
            told.append((self.cma.Solution(x=numbers, c=one_hot, _v_raw=numbers), value))
        self.cma.tell(told)
        if self.apart:
            self.apart.tell([(at[: self.numbers], value) for at, value in generation])

    def should_stop(self) -> bool:
        """Whether the distribution has collapsed: every choice is settled, and so are the coefficients."""
        least = 1.0 - 0.73 ** (1.0 / len(self.counts))  # the margin: what all other values of a choice have together
        settled = bool((1.0 - self.likely.max(axis=1) <= SETTLED * least).all())
        return settled and (self.numbers == 0 or bool((self.apart or self.cma).should_stop()))
