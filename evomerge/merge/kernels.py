"""The two kernels: `blend` and `sparse_blend`.  Chunked, in place, float32 throughout, rounded once to the output.

Every multiply and add is rounded by itself, in one fixed order over the sources, and no sum runs over elements,
so the result does not depend on chunk size, thread count or device.
"""

from collections.abc import Sequence

import torch

from evomerge.merge.plan import Blend, SparseBlend

CHUNK = 1 << 15  # elements: every operand stays in the second-level cache, and below torch's threading grain
SIGN_BIT = -(2**31)


def blend(
    out: torch.Tensor, base: torch.Tensor, sources: Sequence[torch.Tensor], plan: Blend, chunk: int = CHUNK
) -> None:
    """out = base * b + sum_i c_i x_i, or base + sum_i c_i (x_i - base); see `Blend`.

    out, base, sources: tensors of one shape, any floating type; `out` is contiguous and written in place.
    """
    terms = [(x, c) for x, c in zip(sources, plan.sources, strict=True) if c != 0.0]
    if plan.base != 0.0 and not plan.of_task_vectors:
        terms.insert(0, (base, plan.base))
    chunk = chunk if out.numel() > 4 * chunk else max(1, out.numel())  # a small tensor goes in one piece
    flat_out, flat_base = out.view(-1), base.reshape(-1)
    flat_terms = [(x.reshape(-1), c) for x, c in terms]
    total, term, origin = torch.empty((3, min(chunk, out.numel())), dtype=torch.float32, device=out.device)
    for start in range(0, out.numel(), chunk):
        part = slice(start, min(start + chunk, out.numel()))
        size = part.stop - part.start
        acc, work, b = total[:size], term[:size], origin[:size]
        acc.zero_()
        if plan.of_task_vectors:
            b.copy_(flat_base[part])
        for x, c in flat_terms:
            if plan.of_task_vectors and x.dtype == torch.float32:
                torch.sub(x[part], b, out=work)
            elif plan.of_task_vectors:
                work.copy_(x[part]).sub_(b)
            else:
                work.copy_(x[part])
            acc.add_(work.mul_(c))
        if plan.of_task_vectors:
            acc.add_(b)
        flat_out[part].copy_(acc)


def sparse_blend(
    out: torch.Tensor,
    base: torch.Tensor,
    sources: Sequence[torch.Tensor],
    plan: SparseBlend,
    thresholds: Sequence[float],
    keys: Sequence[tuple[int, int]],
    chunk: int = CHUNK,
) -> None:
    """Mask, elect, blend; see `SparseBlend`.

    out, base, sources: tensors of one shape, any floating type; `out` is contiguous and written in place.
    thresholds: for `keep="top"`, the least magnitude that source i keeps.
    keys: for `keep="random"`, two 32-bit numbers per source that make its mask its own.
    """
    n = len(sources)
    flat_out, flat_base = out.view(-1), base.reshape(-1)
    flat_sources = [x.reshape(-1) for x in sources]
    width = min(chunk, out.numel())
    buffers = torch.empty((n + 4, width), dtype=torch.float32, device=out.device)
    bits = torch.empty((2, width), dtype=torch.int32, device=out.device)
    for start in range(0, out.numel(), chunk):
        part = slice(start, min(start + chunk, out.numel()))
        size = part.stop - part.start
        values = buffers[:n, :size]  # (N, size) weighted, masked task vectors
        b, total, divisor, work = buffers[n:, :size]
        b.copy_(flat_base[part])
        for i, x in enumerate(flat_sources):
            v = values[i].copy_(x[part]).sub_(b)
            if plan.keep == "top":
                dropped = torch.abs(v, out=work) < thresholds[i]  # a NaN stays, so that the merge is refused
            else:
                dropped = random_mask(start, size, keys[i], plan.density[i], bits).logical_not_()
            v.masked_fill_(dropped, 0.0).mul_(plan.weights[i] * plan.gains[i])
        total.zero_()
        for v in values:
            total.add_(v)
        if plan.elect:
            positive = total >= 0
            total.zero_()
            divisor.zero_()
            for i, v in enumerate(values):
                against = torch.where(positive, v <= 0, v >= 0)  # zeros are of no sign
                total.add_(v.masked_fill_(against, 0.0))
                if plan.normalize:
                    divisor.add_(work.fill_(plan.weights[i]).masked_fill_(against, 0.0))
            if plan.normalize:
                total.div_(divisor.masked_fill_(divisor == 0, 1.0))
        flat_out[part].copy_(total.mul_(plan.scale).add_(b))


def random_mask(start: int, size: int, key: tuple[int, int], density: float, bits: torch.Tensor) -> torch.Tensor:
    """Which of the elements start .. start + size - 1 are kept, each with probability `density`.

    A counter-based generator: the element's index goes through two rounds of a 32-bit mixer (the `lowbias32`
    constants of C. Wellons, 2018) keyed by `key`, and the hash is compared with density * 2^32 as an integer.
    The mask of a lower density is therefore inside that of a higher one.  bits: (2, >= size) int32 scratch.
    """
    kept_below = min(2**32, round(density * 2**32))
    if kept_below == 0:
        return torch.zeros(size, dtype=torch.bool, device=bits.device)
    low, high = start & 0xFFFFFFFF, start >> 32
    if low + size > 2**32:  # the index's low word wraps inside this chunk: two halves
        first = 2**32 - low
        halves = [(start, first), (start + first, size - first)]
        return torch.cat([random_mask(s, count, key, density, bits) for s, count in halves])
    h, shifted = bits[0, :size], bits[1, :size]
    torch.arange(size, dtype=torch.int32, device=bits.device, out=h)
    h.add_(signed(low))
    for word in (key[0] ^ (high * 0x9E3779B9 & 0xFFFFFFFF), key[1]):
        h.bitwise_xor_(signed(word))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            torch.bitwise_right_shift(h, shift, out=shifted).bitwise_and_((1 << (32 - shift)) - 1)
            h.bitwise_xor_(shifted)
            if factor != 1:
                h.mul_(signed(factor))
    # Unsigned h < kept_below, in signed arithmetic: flip the top bit of both sides.
    return h.bitwise_xor_(SIGN_BIT) <= kept_below - 1 + SIGN_BIT


def signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits."""
    return word - 2**32 if word >= 2**31 else word
