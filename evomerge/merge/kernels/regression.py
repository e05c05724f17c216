"""The closed-form linear regression of `regmean`.

It is computed in float64 on the CPU with one thread.  The LAPACK of another machine may differ in the last bits of
float64, and so, rarely, in the last bit of the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.merge.kernels.spectral import task_vectors

RIDGE = 1e-8  # of the mean diagonal; where no input was ever other than 0, it makes the result the weighted mean


def regression_mean(
    base: Tensor,
    sources: Sequence[Tensor],
    grams: Sequence[Tensor],
    weights: Sequence[float],
    alpha: float,
    transposed: bool,
) -> Tensor:
    """What `regmean` adds to the base, float32:  [sum_i w_i G_i]^-1 sum_i w_i G_i (W_i - W_0) in (in, out) form.

    base, sources: W_0 and W_i, (out, in), or (in, out) if `transposed` (GPT-2's Conv1D).
    grams: G_i, (in, in); their elements off the diagonal are multiplied by `alpha`.
    weights: w_i.

    The base may be subtracted because the sum of the w_i G_i is the matrix that is inverted.
    EvomergeError if this matrix is not positive definite.
    """
    vectors = [d if transposed else d.T for d in task_vectors(base, sources)]  # (in, out)
    size = grams[0].shape[0]
    diagonal = sum(float(g.diagonal().double().mean()) * w for g, w in zip(grams, weights, strict=True))
    ridge = RIDGE * diagonal / sum(weights) if diagonal > 0 else 1.0
    left = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(vectors[0].shape, dtype=torch.float64)
    for d, gram, weight in zip(vectors, grams, weights, strict=True):
        if weight == 0.0:
            continue
        g = alpha * gram.cpu().double()
        g.diagonal().copy_(gram.diagonal().double() + ridge)
        left += weight * g
        right += weight * (g @ d)
    factor, failed = torch.linalg.cholesky_ex(left)
    if failed:
        raise EvomergeError(
            "regmean: the Gram matrices of the statistics files are not positive semidefinite; gather them again with "
            "`evomerge statistics --kind regmean`"
        )
    solved = torch.cholesky_solve(right, factor)  # (in, out)
    return (solved if transposed else solved.T).float().contiguous()
