"""CMA-ES's normal distribution: the library's own, cheaper to draw from.  It imports scipy, which takes long."""

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray


class Distribution(CMA):  # type: ignore[misc]
    """The library's CMA-ES.  It multiplies B D out for every draw, O(D^3), and at a bound it takes up to 100 draws to
    find a point inside; here that is done once a generation, with the same result to the last bit."""

    factor: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None  # B (D, D) and B diag(D)

    def _sample_solution(self) -> NDArray[np.float64]:
        b, d = self._eigen_decomposition()
        if self.factor is None or self.factor[0] is not b:
            self.factor = b, np.ascontiguousarray(b * d)
        point: NDArray[np.float64] = self._mean + self._sigma * self.factor[1].dot(self._rng.randn(self._n_dim))
        return point
