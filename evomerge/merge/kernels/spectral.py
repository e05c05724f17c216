"""The matrices that `tsv` and `iso_c` blend, from the singular vectors of task vectors.

Everything is float64 on the CPU with one thread (`derived.py` sets it), so one machine always gives the same bits.  The
LAPACK of another machine may differ in the last bits of float64, and so, rarely, in the last bit of the result.

A singular value that is no larger than float32's rounding of the weights has arbitrary singular vectors (the task
vector of a LoRA has rank 16, its matrix a thousand rows).  They are left out; the papers' code keeps them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 2.0**-23
DEPENDENT = 1e-6  # a singular value below this share of the largest: the direction is a combination of the others


def task_vectors(base: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """x_i - base as float32 gives it, float64 on the CPU."""
    origin = base.cpu().float()
    return [(x.cpu().float() - origin).double() for x in sources]


def meaningful(values: Tensor, base: Tensor) -> int:
    """How many of the singular values are larger than rounding errors.

    values: in descending order.  base: (m, n).

    Rounding errors of relative size u in a matrix B have singular values of about u |B|_F / sqrt(min(m, n)).
    """
    size = float(torch.linalg.vector_norm(base.cpu().double())) / min(base.shape) ** 0.5
    return int((values > ROUNDING * (float(values[0]) + size)).sum())


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """P Q^T of the decomposition P S Q^T: the nearest matrix with orthonormal columns (orthogonal Procrustes).

    columns: (m, k).

    Columns that depend on each other (two equal sources) share the direction that they span; no arbitrary direction is
    added to it.
    """
    p, s, qt = torch.linalg.svd(columns, full_matrices=False)
    rank = int((s > DEPENDENT * s[0]).sum())
    nearest: Tensor = p[:, :rank] @ qt[:rank]
    return nearest


def singular_parts(base: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """The matrices D_i of `tsv`, one per source, (m, n) float32.  base, sources: (m, n)."""
    vectors = task_vectors(base, sources)
    if not all(d.isfinite().all() for d in vectors):
        return [d.sum().expand(d.shape).float() for d in vectors]  # the merged tensor is not finite
    most = max(1, min(base.shape) // len(sources))
    parts = []
    for d in vectors:
        u, s, vt = torch.linalg.svd(d, full_matrices=False)
        rank = min(most, meaningful(s, base))
        parts.append((u[:, :rank], s[:rank], vt[:rank]))
    ranks = [len(s) for _, s, _ in parts]
    if not sum(ranks):
        return [torch.zeros(base.shape) for _ in sources]
    us = torch.split(nearest_orthonormal(torch.cat([u for u, _, _ in parts], 1)), ranks, 1)
    vs = torch.split(nearest_orthonormal(torch.cat([vt for _, _, vt in parts]).T), ranks, 1)
    return [(u * s @ v.T).float() for u, (_, s, _), v in zip(us, parts, vs, strict=True)]


def isotropic(base: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """The matrix D of `iso_c` in a list, (m, n) float32.  base, sources: (m, n)."""
    total = sum(task_vectors(base, sources), torch.zeros(base.shape, dtype=torch.float64))
    if not total.isfinite().all():
        return [total.sum().expand(total.shape).float()]
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    rank = meaningful(s, base)
    return [(s[:rank].mean() * (u[:, :rank] @ vt[:rank])).float() if rank else torch.zeros(base.shape)]
