"""The merge methods once more, in float64, the obvious way, from the papers: what the package must agree with.

Each function returns the merged tensor and `size`, the sum of the absolute terms that were added up: float32
arithmetic may be off by a few units in the last place of that, and of nothing smaller.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

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


def checkpoint_average(sources: Sequence[Tensor], decay: float, by_position: bool) -> Merged:
    """Kaddour 2022 and others: sum w x / sum w with w = decay^(places before the last), or w = 1, 2, ..., k."""
    last = len(sources) - 1
    weights = [i + 1.0 if by_position else decay ** (last - i) for i in range(len(sources))]
    return linear(sources, weights, normalize=True)


def slerp(models: Sequence[Tensor], t: float) -> Merged:
    """Shoemake 1985: (sin (1-t)a x + sin ta y) / sin a; the straight line where the cosine is beyond 0.9995.

    Each further model is merged into the result so far.
    """
    found, size = models[0].double(), models[0].double().abs()
    for model in models[1:]:
        y = model.double()
        a, b = (1 - t), t
        if found.any() and y.any():
            cosine = cosine_of(found, y)
            if abs(cosine) <= 0.9995:
                angle = torch.tensor(cosine, dtype=torch.float64).acos()
                a, b = float(((1 - t) * angle).sin() / angle.sin()), float((t * angle).sin() / angle.sin())
        found, size = a * found + b * y, abs(a) * size + (b * y).abs()
    return Merged(found, size, len(models) + 3)


def cosine_of(first: Tensor, second: Tensor) -> float:
    x, y = first.double().flatten(), second.double().flatten()
    return float((x / torch.linalg.vector_norm(x)) @ (y / torch.linalg.vector_norm(y)))


def nuslerp(
    base: Tensor | None, sources: Sequence[Tensor], weights: Sequence[float], flatten: bool, row_wise: bool
) -> Merged:
    """slerp at t = w2 / (w1 + w2) from one task vector (without a base: source) to the other, slice by slice.

    Each further one is merged into the result so far, which has the weight of all in it.
    """
    origin = torch.zeros_like(sources[0]).double() if base is None else base.double()

    def arcs(*vectors: Tensor) -> tuple[Tensor, Tensor]:
        found, size = vectors[0], vectors[0].abs()
        for k, y in enumerate(vectors[1:], 1):
            total = sum(weights[: k + 1])
            t = weights[k] / total if total else 0.5
            cosine = (direction(found, 1e-7) * direction(y, 1e-7)).sum().clamp(-1, 1)
            a, b = 1 - t, t
            if 1 - cosine**2 > 2**-24:
                angle = cosine.acos()
                a, b = float(((1 - t) * angle).sin() / angle.sin()), float((t * angle).sin() / angle.sin())
            found, size = a * found + b * y, abs(a) * size + (b * y).abs()
        return found, size

    axis = None if flatten else -1 if row_wise else 0
    found, size = by_slice(arcs, [x.double() - origin for x in sources], axis)
    return Merged(origin + found, origin.abs() + size, len(sources) + 6)


def multislerp(
    base: Tensor | None, sources: Sequence[Tensor], weights: Sequence[float], normalize: bool, eps: float
) -> Merged:
    """Goddard: log map at the weighted mean direction, weighted mean of the tangents, exp map, mean length."""
    if len(sources) == 1:
        return Merged(sources[0].double(), sources[0].double().abs(), 1)
    origin = torch.zeros_like(sources[0]).double() if base is None else base.double()
    vectors = [x.double() - origin for x in sources]
    weights = [w / (sum(weights) or 1.0) for w in weights] if normalize else weights
    lengths = [torch.linalg.vector_norm(d) for d in vectors]
    units = [d / (length + eps) if d.any() else d for d, length in zip(vectors, lengths, strict=True)]
    terms = torch.stack([w * u for w, u in zip(weights, units, strict=True)])
    mean = terms.sum(0)
    size = torch.linalg.vector_norm(mean)
    if size <= max(eps, 2**-22 * sum(map(abs, weights))):
        terms = torch.stack([w * d for w, d in zip(weights, vectors, strict=True)])
        return Merged(origin + terms.sum(0), origin.abs() + terms.abs().sum(0), len(sources) + 6)
    centre = mean / size
    tangents = [u - (u * centre).sum() * centre for u in units]
    tangent = sum(w * v for w, v in zip(weights, tangents, strict=True))
    step = torch.linalg.vector_norm(torch.as_tensor(tangent)) + eps
    found = centre * step.cos() + tangent * (step.sin() / step if step > 0 else 1.0)
    scale = sum(w * length for w, length in zip(weights, lengths, strict=True))
    unsure = 1 + (2**-14 * sum(map(abs, weights)) / size) ** 2  # |m|^2 is a difference of numbers near 1
    lost = 2**-26 * sum(abs(w) * length for w, length in zip(weights, lengths, strict=True))  # lengths that cancel
    change = (abs(scale) + lost) / size * unsure * terms.abs().sum(0)
    return Merged(origin + scale * found, origin.abs() + change, len(sources) + 6)


def karcher(sources: Sequence[Tensor], max_iter: int, tol: float) -> Merged:
    """Karcher 1977: walk along the mean of the logarithms until it vanishes; then the mean length."""
    vectors = [x.double() for x in sources]
    if len(vectors) == 1:
        return Merged(vectors[0], vectors[0].abs(), 1)
    lengths = [torch.linalg.vector_norm(x) for x in vectors]
    units = [x / length for x, length in zip(vectors, lengths, strict=True) if length > tol]
    if not units:
        return Merged(torch.zeros_like(vectors[0]), torch.zeros_like(vectors[0]), 0)
    mean = torch.stack(units).mean(0)
    size = torch.linalg.vector_norm(mean)
    centre = units[0] if size < tol else mean / size
    reach = torch.stack(units).abs().mean(0) / (1.0 if size < tol else size)  # |coefficients| times |units|
    for _ in range(max_iter):
        tangent, spread = torch.zeros_like(centre), torch.zeros_like(centre)
        for u in units:
            cosine = (u * centre).sum().clamp(-1, 1)
            angle = cosine.acos()
            if tol <= angle <= math.pi - tol:
                pull = angle / angle.sin() / len(units)
                tangent += pull * (u - cosine * centre)
                spread += pull * (u.abs() + cosine.abs() * reach)
        step = torch.linalg.vector_norm(tangent)
        if step < tol:
            break
        centre = step.cos() * centre + step.sin() / step * tangent
        centre /= torch.linalg.vector_norm(centre)
        reach = step.cos().abs() * reach + step.sin().abs() / step * spread
    length = torch.stack(lengths).mean()
    return Merged(length * centre, length * reach, len(sources) + 3)


def model_stock(base: Tensor, sources: Sequence[Tensor], filter_wise: bool) -> Merged:
    """Jang et al. 2024: t mean(x) + (1 - t) b, t = N c / (1 + (N - 1) c), c the mean cosine of pairs."""
    count = len(sources)

    def changes(*vectors: Tensor) -> list[Tensor]:
        cosines = []
        for x, y in combinations(vectors, 2):
            lengths = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
            cosines.append(((x * y).sum() / lengths.clamp(min=1e-6)).clamp(-1, 1))
        c = torch.stack(cosines).mean()
        t = 0.0 if abs(1 + (count - 1) * c) < 1e-6 else count * c / (1 + (count - 1) * c)
        change = t * sum(vectors) / count
        size = (abs(t) + 2**-24) * sum(d.abs() for d in vectors) / count  # cosines that cancel leave 2^-48 of a term
        return [torch.as_tensor(change), torch.as_tensor(size)]

    change, size = by_slice(changes, task_vectors(base, sources), 0 if filter_wise else None)
    return Merged(base.double() + change, base.double().abs() + size, count + 5)


def passthrough(source: Tensor, scale: float) -> Merged:
    return Merged(scale * source.double(), (scale * source.double()).abs(), 2)


def nearswap(base: Tensor, sources: Sequence[Tensor], t: float) -> Merged:
    """alchemonaut 2024: interpolate with the weight t / |x - b|, at most 1; b is the result so far."""
    b, size = base.double(), base.double().abs()
    for source in sources:
        x = source.double()
        weight = torch.where((x - b).abs() > t, t / (x - b).abs(), 1.0)
        size = torch.maximum(size, b.abs() + (x - b).abs().clamp(max=t))
        b = weight * x + (1 - weight) * b
    return Merged(b, size, 4 * len(sources))


def direction(x: Tensor, least: float) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp(min=least)


def by_slice(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], axis: int | None
) -> tuple[Tensor, ...]:
    """What `function` makes of whole tensors, or put together again from their slices along an axis."""
    if axis is None or tensors[0].ndim < 2:
        return tuple(function(*tensors))
    found = [function(*parts) for parts in zip(*(x.unbind(axis) for x in tensors), strict=True)]
    return tuple(torch.stack(parts, axis) for parts in zip(*found, strict=True))


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
    """Where each |x - b|, cut to a bfloat16, stands in its row, floor(256 rank / n); equal ones by their columns."""
    magnitude = (source.float() - base.float()).abs().view(torch.int32) >> 16
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

    A value that is 0 in float32 has no sign, although its exact product may: its weight is not in the divisor.
    """
    values = torch.stack([w * g * d for w, g, d in zip(weights, gains, vectors, strict=True)])  # (N, ...)
    pairs = zip(weights, gains, vectors, strict=True)
    signs = torch.stack([torch.tensor(w * g, dtype=torch.float32) * d.float() for w, g, d in pairs])
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
    return Elected(merged(signs > 0), merged(signs < 0), total > doubt, total < -doubt)


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


def hashed(index: int, keys: tuple[int, int]) -> int:
    """The hash of an element's index as a signed 32-bit number plus 2^31, in whole numbers of any length: C. Wellons'
    lowbias32 under the tensor's key, times the source's factor."""
    h = index % 2**32 ^ keys[0] % 2**32 ^ (index // 2**32 * 0x9E3779B9 % 2**32)
    h = (h ^ h >> 16) * 0x7FEB352D % 2**32
    h = (h ^ h >> 15) * 0x846CA68B % 2**32
    key, factor = keys[1] % 2**32, keys[1] // 2**32 | 1
    return ((h ^ h >> 16 ^ key) * factor + 2**31) % 2**32
