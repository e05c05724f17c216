"""Singular vectors of task vectors: the matrices that `tsv` and `iso_c` blend.

Everything is float64 on the CPU, and the caller sees to one thread (`derived.py`), so the same machine gives the
same bits.  Another machine's LAPACK may differ in the last bits of float64, and so, rarely, in the last bit of the
result.

Singular vectors whose singular value is no more than float32's rounding of the weights (a LoRA has rank 16, its
matrix a thousand) point anywhere, as rounding has it.  They are left out; the papers' code lets them take part.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 2.0**-23
DEPENDENT = 1e-6  # a direction this short after concatenation is a copy of the others


def task_vectors(base: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """x_i - base as float32 gives it, float64 on the CPU."""
    origin = base.cpu().float()
    return [(x.cpu().float() - origin).double() for x in sources]


def meaningful(values: Tensor, base: Tensor) -> int:
    """How many of the singular values (descending) are more than rounding.

    Rounding errors of relative size u in a matrix B have singular values of about u |B|_F / sqrt(min(m, n)).
    """
    size = float(torch.linalg.vector_norm(base.cpu().double())) / min(base.shape) ** 0.5
    return int((values > ROUNDING * (float(values[0]) + size)).sum())


def nearest_orthonormal(columns: Tensor) -> Tensor:
    """P Q^T of the decomposition P S Q^T: the nearest matrix with orthonormal columns (orthogonal Procrustes).

    columns: (m, k).  Columns that depend on each other (two equal sources) share the direction that they span; it
    is not completed by an arbitrary one.
    """
    p, s, qt = torch.linalg.svd(columns, full_matrices=False)
    rank = int((s > DEPENDENT * s[0]).sum())
    nearest: Tensor = p[:, :rank] @ qt[:rank]
    return nearest


def singular_parts(base: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """The D_i of `tsv`, one per source.  base, sources and the results: (m, n); the results are float32."""
    vectors = task_vectors(base, sources)
    if not all(d.isfinite().all() for d in vectors):
        return [d.sum().expand(d.shape).float() for d in vectors]  # says of itself that it is broken
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
    """The D of `iso_c`, alone in a list.  base, sources and the result: (m, n); the result is float32."""
    total = sum(task_vectors(base, sources), torch.zeros(base.shape, dtype=torch.float64))
    if not total.isfinite().all():
        return [total.sum().expand(total.shape).float()]
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    rank = meaningful(s, base)
    return [(s[:rank].mean() * (u[:, :rank] @ vt[:rank])).float() if rank else torch.zeros(base.shape)]
