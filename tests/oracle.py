"""The merge methods once more, in float64, the obvious way, from the papers: what the package must agree with.

Each function returns the merged tensor and `size`, the sum of the absolute terms that were added up: float32
arithmetic may be off by a few units in the last place of that, and of nothing smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNIT = 2.0**-24  # half a unit in the last place of 1.0 in float32: the error of one rounding
LEAST = 2.0**-149  # the smallest float32: what one rounding near zero may lose


@dataclass(frozen=True)
class Merged:
    """exact: the merged tensor in float64.  size: the sum of absolute terms.  roundings: float32 ones on the way."""

    exact: Tensor
    size: Tensor
    roundings: int

    def allows(self, out: Tensor) -> Tensor:
        """Where `out` is what float32 arithmetic and one rounding to `out.dtype` may make of `exact`."""
        slack = self.roundings * (UNIT * self.size + 64 * LEAST)
        # Rounding keeps order: what lies between two numbers lies between them when all three are rounded.
        return ((self.exact - slack).to(out.dtype) <= out) & (out <= (self.exact + slack).to(out.dtype))


@dataclass(frozen=True)
class Elected:
    """One merge for each sign an element may elect, and where the weighted sum is clear enough to tell."""

    plus: Merged
    minus: Merged
    surely_plus: Tensor
    surely_minus: Tensor

    def allows(self, out: Tensor) -> Tensor:
        return (self.plus.allows(out) & ~self.surely_minus) | (self.minus.allows(out) & ~self.surely_plus)


def linear(sources: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Merged:
    """Wortsman et al. 2022: sum w x / sum w."""
    terms = torch.stack([w * x.double() for w, x in zip(weights, sources, strict=True)])
    divisor = (sum(weights) or 1.0) if normalize else 1.0
    return Merged(terms.sum(0) / divisor, terms.abs().sum(0) / abs(divisor), len(sources) + 3)


def slerp(first: Tensor, second: Tensor, t: float) -> Merged:
    """Shoemake 1985: (sin (1-t)a x + sin ta y) / sin a; the straight line where the cosine is beyond 0.9995."""
    x, y = first.double(), second.double()
    a, b = (1 - t), t
    if x.any() and y.any():
        cosine = cosine_of(first, second)
        if abs(cosine) <= 0.9995:
            angle = torch.tensor(cosine, dtype=torch.float64).acos()
            a, b = float(((1 - t) * angle).sin() / angle.sin()), float((t * angle).sin() / angle.sin())
    return Merged(a * x + b * y, (a * x).abs() + (b * y).abs(), 5)


def cosine_of(first: Tensor, second: Tensor) -> float:
    x, y = first.double().flatten(), second.double().flatten()
    return float((x / torch.linalg.vector_norm(x)) @ (y / torch.linalg.vector_norm(y)))


def task_arithmetic(
    base: Tensor, sources: Sequence[Tensor], weights: Sequence[float], scale: float, normalize: bool
) -> Merged:
    """Ilharco et al. 2023: b + scale sum w (x - b)."""
    divisor = (sum(weights) or 1.0) if normalize else 1.0
    return weighted_sum(base, task_vectors(base, sources), weights, scale / divisor)


def ties(
    base: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[float],
    density: Sequence[float],
    scale: float,
    normalize: bool,
) -> Elected:
    """Yadav et al. 2023: trim, elect sign, merge what agrees."""
    vectors = [
        d.where(largest(base, x, p), 0.0) for d, x, p in zip(task_vectors(base, sources), sources, density, strict=True)
    ]
    return elect_and_merge(base, vectors, weights, [1.0] * len(vectors), scale, normalize)


def dare(
    base: Tensor,
    sources: Sequence[Tensor],
    masks: Sequence[Tensor],
    weights: Sequence[float],
    density: Sequence[float],
    scale: float,
    normalize: bool,
    rescale: bool,
    elect: bool,
) -> Merged | Elected:
    """Yu et al. 2024: drop at random (`masks` says what stays), divide by the density, then sum or elect as TIES."""
    vectors = [d.where(m, 0.0) for d, m in zip(task_vectors(base, sources), masks, strict=True)]
    gains = [1 / p if rescale and p > 0 else 1.0 for p in density]
    if elect:
        return elect_and_merge(base, vectors, weights, gains, scale, normalize)
    divisor = (sum(weights) or 1.0) if normalize else 1.0
    return weighted_sum(base, vectors, [w * g for w, g in zip(weights, gains, strict=True)], scale / divisor)


def task_vectors(base: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() - base.double() for x in sources]


def weighted_sum(base: Tensor, vectors: Sequence[Tensor], weights: Sequence[float], scale: float) -> Merged:
    terms = torch.stack([scale * w * d for w, d in zip(weights, vectors, strict=True)])
    return Merged(base.double() + terms.sum(0), base.double().abs() + terms.abs().sum(0), len(vectors) + 5)


def largest(base: Tensor, source: Tensor, density: float) -> Tensor:
    """Where |x - b|, a float32, is among the floor(density n) largest, at least one; equal ones stay together."""
    magnitude = (source.float() - base.float()).abs()
    k = max(1, int(density * magnitude.numel()))
    return magnitude >= magnitude.flatten().sort(descending=True).values[k - 1]


def elect_and_merge(
    base: Tensor,
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    gains: Sequence[float],
    scale: float,
    normalize: bool,
) -> Elected:
    """Per element, the values of the elected sign, divided by the weights of those that have it."""
    values = torch.stack([w * g * d for w, g, d in zip(weights, gains, vectors, strict=True)])  # (N, ...)
    column = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.ndim)  # (N, 1, ...)

    def merged(agreeing: Tensor) -> Merged:
        divisor = (column * agreeing).sum(0)
        divisor[divisor == 0] = 1.0
        change = scale * (values * agreeing).sum(0) / (divisor if normalize else 1.0)
        return Merged(base.double() + change, base.double().abs() + change.abs(), len(vectors) + 7)

    total = values.sum(0)
    doubt = (len(vectors) + 3) * UNIT * values.abs().sum(0)
    return Elected(merged(values > 0), merged(values < 0), total > doubt, total < -doubt)


def rounded_vectors(base: Tensor, sources: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """Task vectors as float32 has them: singular vectors magnify the last bit."""
    return [(x.float() - base.float()).double().numpy() for x in sources]


def spectral(base: Tensor, parts: Sequence[NDArray[np.float64]], coefficients: Sequence[float]) -> Merged:
    terms = torch.stack([c * torch.from_numpy(d) for c, d in zip(coefficients, parts, strict=True)])
    return Merged(base.double() + terms.sum(0), base.double().abs() + terms.abs().sum(0), len(parts) + 5)


def tsv(base: Tensor, sources: Sequence[Tensor], weights: Sequence[float], scale: float) -> Merged:
    """Gargiulo et al. 2025: the top min(m, n) // N triplets of each task vector, U and V made orthonormal together."""
    k = min(base.shape) // len(sources)
    triplets = [np.linalg.svd(d, full_matrices=False) for d in rounded_vectors(base, sources)]

    def orthonormal(columns: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        p, _, qt = np.linalg.svd(np.hstack(columns), full_matrices=False)
        return np.asarray(p @ qt)

    u = orthonormal([u[:, :k] for u, _, _ in triplets])
    v = orthonormal([vt[:k].T for _, _, vt in triplets])
    columns = [slice(i * k, (i + 1) * k) for i in range(len(sources))]
    parts = [u[:, c] @ np.diag(s[:k]) @ v[:, c].T for c, (_, s, _) in zip(columns, triplets, strict=True)]
    return spectral(base, parts, [scale * w for w in weights])


def iso_c(base: Tensor, sources: Sequence[Tensor], scale: float) -> Merged:
    """Marczak et al. 2025: the singular values of the summed task vectors replaced by their mean."""
    u, s, vt = np.linalg.svd(sum(rounded_vectors(base, sources)), full_matrices=False)
    return spectral(base, [s.mean() * (u @ vt)], [scale])


def fisher(base: Tensor, sources: Sequence[Tensor], information: Sequence[Tensor]) -> Merged:
    """Matena & Raffel 2022: sum F x / sum F.  information: the F, weights and floor included."""
    f = torch.stack([x.double() for x in information])
    x = torch.stack([x.double() for x in sources])
    total = f.sum(0)
    exact = torch.where(total > 0, (f * x).sum(0) / total.where(total > 0, 1.0), base.double())
    size = base.double().abs() + torch.stack([d.abs() for d in task_vectors(base, sources)]).sum(0)
    return Merged(exact, size, 2 * len(sources) + 6)


def regmean(
    base: Tensor, sources: Sequence[Tensor], grams: Sequence[Tensor], weights: Sequence[float], alpha: float
) -> Merged:
    """Jin et al. 2023: W = (sum G)^-1 sum G W in (in, out) form.  sources: (out, in)."""
    scaled = [w * g.numpy() * (alpha + (1 - alpha) * np.eye(len(g))) for w, g in zip(weights, grams, strict=True)]
    right = sum(g @ x.double().numpy().T for g, x in zip(scaled, sources, strict=True))
    exact = torch.from_numpy(np.linalg.inv(sum(scaled)) @ right).T
    # The ridge and the inverse here cost a little beyond float32's own rounding.
    return Merged(exact, base.double().abs() + exact.abs(), 16)


def hashed(index: int, key: tuple[int, int]) -> int:
    """The 32-bit hash of an element's index, in whole numbers of any length (C. Wellons' lowbias32, twice)."""
    h = index % 2**32
    for word in (key[0] ^ (index // 2**32 * 0x9E3779B9 % 2**32), key[1]):
        h ^= word
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x846CA68B % 2**32
        h ^= h >> 16
    return h
