"""The merge methods once more, in float64, the obvious way, from the papers: what the package must agree with.

Each function returns the merged tensor and `size`, the sum of the absolute terms that were added up: float32
arithmetic may be off by a few units in the last place of that, and of nothing smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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


def drop_and_rescale(
    base: Tensor,
    sources: Sequence[Tensor],
    masks: Sequence[Tensor],
    chances: Sequence[Tensor],
    weights: Sequence[float],
    scale: float,
    normalize: bool,
    rescale: str,
    elect: bool,
) -> Merged | Elected:
    """Yu et al. 2024, Deep et al. 2024: drop at random, make up for it, then sum or elect as TIES.

    masks: what stays.  chances: with which probability it had to, per element.
    """
    whole = task_vectors(base, sources)
    vectors = [d.where(m, 0.0) for d, m in zip(whole, masks, strict=True)]
    gains = [1.0] * len(vectors)
    for i, (d, p) in enumerate(zip(whole, chances, strict=True)):
        kept = float((p * d).abs().sum() if rescale == "expected" else vectors[i].abs().sum())
        if rescale == "expected" and (p == p.flatten()[0]).all():
            gains[i] = 1 / float(p.flatten()[0]) if p.any() else 1.0
        elif rescale != "none" and min(kept, float(d.abs().sum())) >= 1e-7:
            gains[i] = float(d.abs().sum()) / kept
    if elect:
        return elect_and_merge(base, vectors, weights, gains, scale, normalize)
    divisor = (sum(weights) or 1.0) if normalize else 1.0
    return weighted_sum(base, vectors, [w * g for w, g in zip(weights, gains, strict=True)], scale / divisor)


def levels(base: Tensor, source: Tensor) -> Tensor:
    """Where each |x - b| stands in its row, floor(256 rank / n); equal ones in the order of their columns."""
    magnitude = (source.float() - base.float()).abs()
    rows = magnitude.reshape(magnitude.shape[0], -1) if magnitude.ndim > 1 else magnitude.reshape(1, -1)
    rank = rows.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank * 256 // max(1, rows.shape[1])).to(torch.uint8).reshape(base.shape)


def breadcrumbs(
    base: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    scale: float,
    normalize: bool,
    elect: bool,
) -> Merged | Elected:
    """Davari & Belilovsky 2023: drop the largest and the smallest, then sum or elect as TIES."""
    vectors = []
    for d, x, p, g in zip(task_vectors(base, sources), sources, density, gamma, strict=True):
        magnitude = (x.float() - base.float()).abs()
        n = magnitude.numel()
        smallest = max(0, n - int(p * n) - int(g * n))
        middle = magnitude.flatten().sort().values[smallest : smallest + int(p * n)]
        vectors.append(d.where(torch.isin(magnitude, middle), 0.0))
    if elect:
        return elect_and_merge(base, vectors, weights, [1.0] * len(vectors), scale, normalize)
    divisor = (sum(weights) or 1.0) if normalize else 1.0
    return weighted_sum(base, vectors, weights, scale / divisor)


def sce(base: Tensor, sources: Sequence[Tensor], variance: Tensor, share: float) -> Elected:
    """Wan et al. 2024: select by variance (the float32 one of the package), weigh by energy, erase the minority."""
    vectors = torch.stack(task_vectors(base, sources))  # (N, ...)
    if share < 1:
        k = int(np.float32(int((variance > 0).sum())) * np.float32(share))
        floor = variance.flatten().sort(descending=True).values[k - 1] if k else torch.nan
        vectors = vectors.where(variance >= floor, 0.0)
    squares = vectors.reshape(len(sources), -1).square().mean(1)
    equal = torch.full_like(squares, 1 / len(squares))
    weights = squares / squares.sum() if squares.sum() >= 1e-6 else equal
    weights = weights.where(weights >= 1e-6, 0.0).tolist()
    return elect_and_merge(base, list(vectors), weights, [1.0] * len(weights), 1.0, True, plain=True)


def arcee_fusion(base: Tensor, source: Tensor, divergences: Tensor) -> Merged:
    """Take over what is important, a float32: |d| times the row's divergence."""
    importance = (source.float() - base.float()).abs() * divergences
    ordered = importance.flatten().sort().values
    low, median, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    d = (source.double() - base.double()).where(importance >= median + 1.5 * (high - low), 0.0)
    return Merged(base.double() + d, base.double().abs() + d.abs(), 4)


def ram(base: Tensor, sources: Sequence[Tensor], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Merged:
    """arXiv 2601.13572: what one source alone changed is added whole (and a little more), the rest averaged."""
    vectors = torch.stack(task_vectors(base, sources))
    changed = (torch.stack([x.float() for x in sources]) - base.float()).abs() > torch.tensor(epsilon)
    count = changed.sum(0)
    change = torch.zeros_like(vectors[0])
    size = base.double().abs()
    for d, m in zip(vectors, changed, strict=True):
        alone, shared = m & (count == 1), m & (count > 1)
        more = min(alpha, int(shared.sum()) / int(alone.sum())) if alone.any() else 0.0
        term = d.where(alone, 0.0) * (1 + r * more) + d.where(shared, 0.0) / count.clamp(min=1)
        change, size = change + term, size + term.abs() + (d * r * more).abs().where(alone, 0.0)
    return Merged(base.double() + change, size, len(sources) + 7)


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
    plain: bool = False,
) -> Elected:
    """Per element, the values of the elected sign, divided by the weights of those that have it.

    plain: elected by the sum of the vectors, not of the values.
    """
    values = torch.stack([w * g * d for w, g, d in zip(weights, gains, vectors, strict=True)])  # (N, ...)
    column = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.ndim)  # (N, 1, ...)

    def merged(agreeing: Tensor) -> Merged:
        divisor = (column * agreeing).sum(0)
        divisor[divisor == 0] = 1.0
        change = scale * (values * agreeing).sum(0) / (divisor if normalize else 1.0)
        # 2^-100: what is lost where a value is too small for float32 grows when it is divided by a small weight.
        return Merged(base.double() + change, base.double().abs() + change.abs() + 2.0**-100, len(vectors) + 7)

    votes = torch.stack(list(vectors)) if plain else values
    total = votes.sum(0)
    doubt = (len(vectors) + 3) * UNIT * votes.abs().sum(0)
    return Elected(merged(values > 0), merged(values < 0), total > doubt, total < -doubt)


def hashed(index: int, key: tuple[int, int]) -> int:
    """The 32-bit hash of an element's index, in whole numbers of any length (C. Wellons' lowbias32, twice)."""
    h = index % 2**32
    for word in (key[0] ^ (index // 2**32 * 0x9E3779B9 % 2**32), key[1]):
        h ^= word
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x846CA68B % 2**32
        h ^= h >> 16
    return h
