"""The derivative of a loss by the numbers of a plan, from the gradient of the merged tensor: `by_numbers`.

Everything is computed piece by piece in float32, with the task vectors as the bank serves them, and added up in
float64.  G is the gradient, d_i = x_i - b the task vectors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.call import Call, contributes, sparse_call
from evomerge.merge.kernels.elementwise import ALONE, DIVISOR, SCALE, WEIGHT, added, agreement, equal, unit
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.piecewise import piece_size
from evomerge.merge.kernels.random_masks import low_word, with_high_word
from evomerge.merge.methods.plan import Clip, Derived, FisherBlend, SliceBlend, SparseBlend
from evomerge.sources.adapter.tensor_change import LowRank

Change = Tensor | LowRank | None
"""What makes a task vector: a source's tensor x_i, the product that is d_i itself, or None if d_i is 0."""


def by_numbers(
    plan: SliceBlend | SparseBlend | FisherBlend | Derived | Clip, gradient: Tensor, operands: Operands
) -> Tensor:
    """<G, dW/dn_j> for each of `chain.numbers(plan)`, (n,) float64 on the gradient's device; a `Blend` has `by_blend`.

    gradient: of the operands' shape, any floating type.
    operands: all sources, also those of weight 0; for `Derived` the matrices.
    """
    base, sources = operands.base, operands.sources
    match plan:
        case SliceBlend():
            return by_slices(plan, gradient, base, sources)
        case SparseBlend():
            return by_sparse(plan, gradient, operands)
        case FisherBlend():
            return by_fisher(plan, gradient, operands)
        case Derived():
            return pieces([gradient, *sources], lambda g, *parts: dots([(g, d) for d in parts]))
        case Clip():
            # At the limit and beyond it the element follows it.
            def piece(g: Tensor, b: Tensor, x: Tensor) -> Tensor:
                d = x - b
                return torch.dot(g, d.sign() * d.abs().ge(plan.limit)).double()[None]

            return pieces([gradient, base, sources[0]], piece)


def pieces(tensors: Sequence[Tensor], function: Callable[..., Tensor]) -> Tensor:
    """The sum of what a function returns for each piece of the flattened tensors in float32."""
    flat = [x.reshape(-1) for x in tensors]
    size = piece_size(flat[0].device)
    starts = range(0, max(1, flat[0].numel()), size)
    return torch.stack([function(*(x[s : s + size].float() for x in flat)) for s in starts]).sum(0)


def dots(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The inner products of vectors in float32, as (pairs,) float64."""
    return torch.stack([torch.dot(x, y) for x, y in pairs]).double()


def by_blend(gradient: Tensor, base: Tensor, changes: Sequence[Change], with_base: bool) -> Tensor:
    """<G, d_1> .. <G, d_N> and <G, b>, (N + 1,).

    with_base: whether <G, b> is needed; otherwise it is given as 0.
    """
    found = torch.zeros(len(changes) + 1, dtype=torch.float64, device=gradient.device)
    for i, change in enumerate(changes):
        if isinstance(change, LowRank):
            projected = change.left.float().mT @ gradient.float()  # (R, columns)
            found[i] = (projected * change.right.float()).sum().double() * change.scale
    streamed = [(i, x) for i, x in enumerate(changes) if isinstance(x, Tensor)]
    if streamed or with_base:

        def piece(g: Tensor, b: Tensor, *parts: Tensor) -> Tensor:
            return dots([*((g, x - b) for x in parts), *[(g, b)] * with_base])

        dense = pieces([gradient, base, *(x for _, x in streamed)], piece)
        found[[i for i, _ in streamed] + [len(changes)] * with_base] = dense
    return found


def by_slices(plan: SliceBlend, gradient: Tensor, base: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """The same as `by_blend` for each slice, (N + 1, S) flattened."""

    def slices(x: Tensor) -> Tensor:  # (S, elements of a slice); a vector is one slice
        return x.reshape(1, -1) if x.ndim < 2 else x.movedim(plan.axis, 0).flatten(1)

    g, origin, terms = slices(gradient), slices(base), [slices(x) for x in sources]
    rows = max(1, piece_size(g.device) // max(1, g.shape[1]))
    found = []
    for start in range(0, g.shape[0], rows):
        part = slice(start, start + rows)
        b, of_rows = origin[part].float(), g[part].float()
        factors = [*(x[part].float() - b for x in terms), b]
        found.append(torch.stack([(of_rows * d).sum(1) for d in factors]).double())
    return torch.cat(found, 1).reshape(-1)


def by_fisher(plan: FisherBlend, gradient: Tensor, operands: Operands) -> Tensor:
    """With h_i = max(s_i F_i, floor), v = sum_i w_i h_i d_i and D = sum_i w_i h_i:  <G, h_i (d_i - v / D) / D>."""
    count = len(plan.weights)

    def piece(g: Tensor, b: Tensor, *parts: Tensor) -> Tensor:
        deltas = [x - b for x in parts[:count]]
        shares = [torch.clamp(f * s, min=plan.floor) for f, s in zip(parts[count:], plan.scales, strict=True)]
        divisor = added([h * w for h, w in zip(shares, plan.weights, strict=True)])
        is_zero = equal(divisor, 0.0)
        per_unit = g / (divisor + is_zero)
        mean = added([d * h * w for d, h, w in zip(deltas, shares, plan.weights, strict=True)]) / (divisor + is_zero)
        mean *= 1.0 - is_zero
        return dots([(per_unit, h * (d - mean)) for d, h in zip(deltas, shares, strict=True)])

    return pieces([gradient, operands.base, *operands.sources, *operands.planes], piece)


def by_sparse(plan: SparseBlend, gradient: Tensor, operands: Operands) -> Tensor:
    """The derivative by weights, gains, factors `alone` and scale, with masks and elections as they are."""
    n, device = len(plan.weights), gradient.device
    found = torch.zeros(4, n, dtype=torch.float64, device=device)  # products w g, divisor, alone, scale
    used = [i for i, x in enumerate(operands.sources) if contributes(plan, i, x is operands.base)]
    if used:
        call = sparse_call(plan, operands)
        found[:, used] = by_call(call, gradient, operands.base)
    gains, weights = (
        torch.tensor(x or (1.0,) * n, dtype=torch.float64, device=device) for x in (plan.gains, plan.weights)
    )
    # The scale is the same number for all sources, and so is its derivative in `found`.
    scale = found[3, used[0]] if used else found[3, 0]
    return torch.cat([found[0] * gains + found[1], found[0] * weights, found[2], scale[None]])


def by_call(call: Call, gradient: Tensor, base: Tensor) -> Tensor:
    """The derivative by the rows WEIGHT, DIVISOR, ALONE and SCALE of a call's numbers, (4, N)."""
    form, device = call.form, gradient.device
    assert form is not None, "this call has no masks"
    numbers, words = call.number_rows(device), call.word_rows(device)
    signs = torch.copysign(torch.ones_like(numbers[WEIGHT]), numbers[WEIGHT])  # of w g; a product may be too small
    flat = [x.reshape(-1) for x in (gradient, base, *call.sources)]
    planes = [x.expand(gradient.shape).reshape(-1) for x in call.planes]
    count, size = len(call.sources), piece_size(device)
    total = torch.zeros(4, count, dtype=torch.float64, device=device)
    for start in range(0, gradient.numel(), size):
        part = slice(start, min(start + size, gradient.numel()))
        g, b, *sources = (x[part] for x in flat)
        g, b = g.float(), b.float()
        at = with_high_word(words, start), low_word(start, device)
        kept = elementwise.masked(b, sources, [x[part] for x in planes], numbers, *at, form)
        values = [d * numbers[WEIGHT, i] for i, d in enumerate(kept)]
        sign = unit(added(kept if form.elect == "plain" else values)) if form.elect else None
        agree = agreement([d * signs[i] for i, d in enumerate(kept)], sign)
        kept, values = ([x * a for x, a in zip(y, agree, strict=True)] for y in (kept, values))
        merged = added(values)
        alone = divisor = torch.zeros(())
        if form.normalize:
            divisor = added([a * numbers[DIVISOR, i] for i, a in enumerate(agree)])
            alone = equal(divisor, 1.0) if form.alone else torch.zeros_like(divisor)
            merged += alone * added([v * numbers[ALONE, i] for i, v in enumerate(values)])
            is_zero = equal(divisor, 0.0)
            merged /= divisor + is_zero
            per_unit = g * numbers[SCALE, 0] / (divisor + is_zero)
            through_divisor = -per_unit * merged * (1.0 - is_zero)
        else:
            per_unit, through_divisor = g * numbers[SCALE, 0], torch.zeros_like(g)
            alone = torch.zeros_like(g)
        pairs = [(per_unit, d * (1.0 + alone * numbers[ALONE, i])) for i, d in enumerate(kept)]
        pairs += [(through_divisor, a) for a in agree]
        pairs += [(per_unit, alone * v) for v in values]
        pairs += [(g, merged)] * count
        total += dots(pairs).view(4, count)
    return total
