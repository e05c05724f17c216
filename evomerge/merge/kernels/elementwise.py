"""The arithmetic of all plans: elementwise float32 kernels, each multiplication and addition rounded separately.

They are plain PyTorch on whole operands.  `piecewise.py` runs them piece by piece and `compiled.py` fuses them; since
no sum runs over elements, and all have a fixed order, the bits depend neither on that nor on threads or device.

Each kernel writes to `out`, rounded once to its type, and returns the largest |out| as float32, NaN if any element is:
so no second pass has to find out whether the result is finite.

A mask is a tensor of 0.0 and 1.0.  torch computes with those ten times faster than with booleans when nothing is
fused, and a NaN that is multiplied by 0.0 remains a NaN, so that a source that is not finite is never hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.merge.methods.plan import Elect, Keep

# Rows of `sparse_blend`'s `numbers`: weight times gain, weight in the divisor, least and largest magnitude to keep,
# `alone` less 1, scale.
WEIGHT, DIVISOR, FLOOR, CEILING, ALONE, SCALE = range(6)
# Rows of `sparse_blend`'s `words`: a source's key and odd factor, its chance less 1 as a signed number, the step of the
# chance by rank, the tensor's key.
KEY, FACTOR, CHANCE, STEP, TENSOR_KEY = range(5)
FISHER_WEIGHT, FISHER_SCALE, FISHER_FLOOR = range(3)  # rows of `fisher_blend`'s `numbers`
LANES = 64  # a multiple of the numbers in a vector of any CPU


@dataclass(frozen=True)
class SparseForm:
    """What of a `SparseBlend` changes the code and not only its numbers."""

    keep: Keep
    elect: Elect
    normalize: bool
    alone: bool


def store(out: Tensor, total: Tensor) -> Tensor:
    """Round `total` (float32) into `out`; the largest |out|."""
    out.copy_(total)
    return total.abs().amax().to(out.dtype).float()  # rounding keeps the order


def blend(out: Tensor, origin: Tensor | None, terms: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """out = sum_i c_i x_i, or with an origin: origin + sum_i c_i (x_i - origin).

    out, origin, terms: one shape, any floating types.
    coefficients: (N,) float32, or (N, S, 1) for tensors of shape (S, elements of a slice).
    """
    if origin is not None:
        origin = origin.float()
    total = None
    for i, x in enumerate(terms):
        term = (x.float() if origin is None else x.float() - origin) * coefficients[i]
        total = term if total is None else total.add_(term)
    assert total is not None, "nothing to blend"
    return store(out, total if origin is None else total.add_(origin))


def clip(out: Tensor, base: Tensor, source: Tensor, limit: Tensor) -> Tensor:
    """out = base + clamp(source - base, -limit, limit).  limit: (1,) float32.

    Clamping is not linear in the task vector, so no blend or mask expresses it.  An infinite source gives NaN; clamping
    alone would hide it.
    """
    b = base.float()
    d = source.float() - b
    return store(out, torch.minimum(torch.maximum(d, -limit), limit) + d * 0.0 + b)


def fisher_blend(
    out: Tensor, base: Tensor, sources: Sequence[Tensor], fishers: Sequence[Tensor], numbers: Tensor
) -> Tensor:
    """A mean with weights per element; see `FisherBlend`.

    out, base, sources, fishers: one shape, any floating types.
    numbers: (3, N) float32; the rows are named above.

    Here the coefficients are tensors, and their sum divides.
    """
    b = base.float()
    weights = [
        torch.maximum(f.float() * numbers[FISHER_SCALE, i], numbers[FISHER_FLOOR, i]) * numbers[FISHER_WEIGHT, i]
        for i, f in enumerate(fishers)
    ]
    total = added([(x.float() - b) * w for x, w in zip(sources, weights, strict=True)])
    divisor = added(weights)
    return store(out, total / (divisor + divisor.eq(0.0).float()) + b)


def sparse_blend(
    out: Tensor,
    base: Tensor,
    sources: Sequence[Tensor],
    planes: Sequence[Tensor],
    numbers: Tensor,
    words: Tensor,
    start: Tensor,
    form: SparseForm,
) -> Tensor:
    """Mask, elect, blend; see `SparseBlend`.

    out, base, sources: one shape, any floating types.
    planes: per source the uint8 levels for `rank`, or one float32 factor per element (or row) for `importance`.
    numbers: (6, N) float32, and words: (5, N) int32; their rows are named above.
    start: (1,) int32, the index of the first element in the whole tensor, modulo 2^32.
    form: what of the plan changes the code.
    """
    b = base.float()
    kept = masked(b, sources, planes, numbers, words, start, form)
    plain = added(kept) if form.elect == "plain" else None
    values = [d.mul_(numbers[WEIGHT, i]) for i, d in enumerate(kept)]
    if form.elect:
        agree = agreement(values, unit(added(values) if plain is None else plain))
        values = [v.mul_(a) for v, a in zip(values, agree, strict=True)]
    elif form.normalize:
        agree = agreement(values, None)
    total = added(values)
    if form.normalize:
        divisor = added([a.mul_(numbers[DIVISOR, i]) for i, a in enumerate(agree)])
        if form.alone:
            extra = added([v.mul_(numbers[ALONE, i]) for i, v in enumerate(values)])
            total = total.add_(extra.mul_(equal(divisor, 1.0)))
        total = total.div_(equal(divisor, 0.0).add_(divisor))
    return store(out, total.mul_(numbers[SCALE, 0]).add_(b))


def masked(
    base: Tensor,
    sources: Sequence[Tensor],
    planes: Sequence[Tensor],
    numbers: Tensor,
    words: Tensor,
    start: Tensor,
    form: SparseForm,
) -> list[Tensor]:
    """The task vectors in float32, with 0 where the masks of `sparse_blend` drop an element.

    base: float32.  The other arguments are those of `sparse_blend`.
    """
    deltas = [x.float() - base for x in sources]
    if form.keep == "random" or form.keep == "rank":
        spread = index_hash(indices(base) + start, words[TENSOR_KEY, 0])
    if form.keep == "variance":
        common = at_least(variance(deltas), numbers[FLOOR, 0])
    kept = []
    for i, d in enumerate(deltas):
        if form.keep == "all":
            kept.append(d)
            continue
        if form.keep == "variance":
            mask = common
        elif form.keep == "magnitude":
            mask = at_least(d.abs(), numbers[FLOOR, i])
        elif form.keep == "band":
            mask = at_least(d.abs(), numbers[FLOOR, i]) * at_most(d.abs(), numbers[CEILING, i])
        elif form.keep == "importance":
            mask = at_least(d.abs() * planes[i], numbers[FLOOR, i])
        elif form.keep == "random":
            mask = at_most(source_hash(spread, words[KEY, i], words[FACTOR, i]), words[CHANCE, i])
        else:
            chance = torch.addcmul(words[CHANCE, i], planes[i].int(), words[STEP, i])
            mask = at_most(source_hash(spread, words[KEY, i], words[FACTOR, i]), chance)
        kept.append(d.mul_(mask))
    return kept


def agreement(values: Sequence[Tensor], sign: Tensor | None) -> list[Tensor]:
    """Where each value takes part in a sum: it has the elected sign, or without an election it is not 0."""
    if sign is None:
        return [equal(v, 0.0).mul_(-1.0).add_(1.0) for v in values]
    return [above(v * sign, 0.0) for v in values]  # a zero agrees with neither sign


# Where a kernel runs piece by piece nothing is fused, and overwriting a tensor is faster than allocating a new one.
# Comparisons give 1.0 and 0.0.


def at_least(x: Tensor, bound: Tensor | float) -> Tensor:
    """Where x >= bound.  It may overwrite x."""
    return (x >= bound).float() if torch.compiler.is_compiling() else x.ge_(bound).float()


def at_most(x: Tensor, bound: Tensor) -> Tensor:
    """Where x <= bound.  It may overwrite x."""
    return (x <= bound).float() if torch.compiler.is_compiling() else x.le_(bound).float()


def above(x: Tensor, bound: Tensor | float) -> Tensor:
    """Where x > bound.  It may overwrite x."""
    return (x > bound).float() if torch.compiler.is_compiling() else x.gt_(bound).float()


def equal(x: Tensor, value: float) -> Tensor:
    """Where x == value."""
    return (x == value).float() if torch.compiler.is_compiling() else x.clone().eq_(value)


def unit(x: Tensor) -> Tensor:
    """1.0 with the sign of x; either sign where x is 0 or NaN.  It may overwrite x."""
    if torch.compiler.is_compiling():  # there copysign would be a function call for each vector
        return torch.where(x < 0.0, -1.0, 1.0)
    return torch.copysign(torch.ones((), device=x.device), x, out=x)


def added(terms: Sequence[Tensor]) -> Tensor:
    """The sum from the first term to the last, in a new tensor."""
    if len(terms) == 1:
        return terms[0].clone()
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total.add_(term)
    return total


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """The variance of the task vectors across the sources, element by element (divided by N)."""
    count = float(len(deltas))
    mean = added(deltas) / count
    return added([(d - mean) * (d - mean) for d in deltas]) / count


# Random masks are a counter-based generator.  The element's index is mixed with the tensor's key once, and then with
# each source's key; the constants are those of lowbias32 (C. Wellons, 2018).  The hash is compared as a signed integer,
# so the mask of a lower chance lies inside that of a higher one.


def indices(like: Tensor) -> Tensor:
    """0, 1, 2 ... as int32, of a tensor's shape."""
    n = like.numel()
    if not (torch.compiler.is_compiling() and like.device.type == "cpu"):
        return torch.arange(n, dtype=torch.int32, device=like.device).view(like.shape)
    # Torch's compiler builds a vector of indices number by number, which takes a quarter of the kernel's instructions.
    # So the indices are a multiple of LANES plus a vector that is loaded.
    lanes = torch.tensor(range(LANES), dtype=torch.int32)
    index = torch.arange(n)
    return (index // LANES * LANES).int() + lanes[index % LANES]


def index_hash(index: Tensor, key: Tensor) -> Tensor:
    """The lowbias32 hash of 32-bit indices under a tensor's key.  int32 stands for uint32."""
    h = folded(index ^ key, 16).mul_(signed_word(0x7FEB352D))
    h = folded(h, 15).mul_(signed_word(0x846CA68B))
    return folded(h, 16)


def source_hash(spread: Tensor, key: Tensor, factor: Tensor) -> Tensor:
    """The hash of an element for one source: (spread ^ key) * factor.

    spread: `index_hash` of the elements.  factor: odd.

    The upper bits of a product depend on all bits of the word, and they decide a comparison; the words of two sources
    are as independent as two numbers of a multiplicative generator.
    """
    return (spread ^ key).mul_(factor)


def folded(h: Tensor, by: int) -> Tensor:
    """h ^ (h >> by) with a logical shift; torch's is arithmetic."""
    return (h >> by).bitwise_and_((1 << (32 - by)) - 1).bitwise_xor_(h)


def signed_word(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
