"""Run a plan's kernel on one tensor: compiled where that is at hand, else piece by piece; the bits are the same."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.call import (
    Call,
    Keys,
    call_of,
    low_word,
    mask_words,
    piece_size,
    piecewise,
    piecewise_call,
    tensor_of,
    with_high_word,
)
from evomerge.merge.kernels.compiled import Compiled, Variant
from evomerge.merge.methods.plan import Blend, Chance, Clip, Derived, FisherBlend, Plan, SliceBlend, SparseBlend

SLAB = 1 << 30  # elements of one kernel call at most: an int32 counts them


def execute(
    plan: Plan,
    out: Tensor,
    base: Tensor,
    sources: Sequence[Tensor],
    planes: Sequence[Tensor] = (),
    keys: Keys = (0, ()),
    compiled: Compiled | None = None,
    piece: int | None = None,
) -> Tensor:
    """Write what `plan` makes of base and sources to `out`; the largest |out| as a float32 scalar, NaN if any is.

    out, base, sources: tensors of one shape, any floating types; `out` is contiguous.  planes: per source the
    levels (`rank`) or row factors (`importance`) that the plan's mask needs.
    """
    if out.numel() == 0:
        return torch.zeros((), device=out.device)
    if piece is None:
        piece = piece_size(out.device)
    if isinstance(plan, SliceBlend):
        return slice_blend(plan, out, base, sources, piece)
    if isinstance(plan, Clip):
        limit = tensor_of([plan.limit], np.float32, out.device)
        flat, flat_base, source = out.view(-1), base.reshape(-1), sources[0].reshape(-1)
        return piecewise(lambda p: elementwise.clip(flat[p], flat_base[p], source[p], limit), out.numel(), piece)
    if isinstance(plan, FisherBlend):
        return fisher_blend(plan, out, base, sources, planes, piece)
    if isinstance(plan, Derived):
        plan = Blend(plan.coefficients, base=1.0)
    call = call_of(plan, base, sources, planes, keys)
    assert call is not None, f"no kernel makes {plan}"
    if compiled is not None and out.device.type == "cuda":
        return compiled.launcher.run([(out, call)])[0]
    fused = fused_call(call, out, compiled) if compiled is not None else None
    return piecewise_call(call, out, piece) if fused is None else fused


def fused_call(call: Call, out: Tensor, compiled: Compiled) -> Tensor | None:
    """The same as `piecewise_call` in one fused kernel; None if there is none for this call."""
    if call.is_copy or not call.sources:
        return None
    form, device, flat = call.form, out.device, out.view(-1)
    base, sources = (
        None if call.base is None else call.base.reshape(-1),
        same_type([x.reshape(-1) for x in call.sources]),
    )
    planes = [x.expand(out.shape).reshape(-1) for x in call.planes]
    if form is None:
        variant = Variant.of_blend(flat, base, sources)
    else:
        assert base is not None, "task vectors need a base"
        variant = Variant.of_sparse(flat, base, sources, planes, form)
    kernel = compiled.kernel(variant)
    if kernel is None:
        return None
    numbers, words = call.number_rows(device), call.word_rows(device)

    def run(parts: Sequence[Tensor], start: int) -> Tensor:
        mask = [] if form is None else [with_high_word(words, start), low_word(start, device)]
        return kernel([*parts, numbers, *mask])

    return slabs([flat, *([] if base is None else [base]), *sources, *planes], run)


def fisher_blend(
    plan: FisherBlend, out: Tensor, base: Tensor, sources: Sequence[Tensor], planes: Sequence[Tensor], piece: int
) -> Tensor:
    used = [i for i, w in enumerate(plan.weights) if w != 0.0]
    if not used:
        return elementwise.store(out, base)
    rows = [[plan.weights[i] for i in used], [plan.scales[i] for i in used], [plan.floor] * len(used)]
    numbers = tensor_of(rows, np.float32, out.device)
    flat, flat_base = out.view(-1), base.reshape(-1)
    operands, fishers = [sources[i].reshape(-1) for i in used], [planes[i].reshape(-1) for i in used]
    return piecewise(
        lambda p: elementwise.fisher_blend(
            flat[p], flat_base[p], [x[p] for x in operands], [f[p] for f in fishers], numbers
        ),
        out.numel(),
        piece,
    )


def random_mask(
    chance: Chance,
    start: int,
    size: int,
    keys: tuple[int, int],
    levels: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """1.0 where the elements start .. start + size - 1 are kept.  keys: the tensor's word and the source's.

    levels: the elements' ranks for a chance with a step.  device: where the mask is wanted, the levels' or the CPU by
    default.  Whoever needs a mask outside a merge asks here.
    """
    device = device or (torch.device("cpu") if levels is None else levels.device)
    plan = SparseBlend((1.0,), "rank", chances=(chance,))
    words = tensor_of(mask_words(plan, [0], (keys[0], [keys[1]])), np.int32, device).view(5, 1)
    words = with_high_word(words, start)
    index = torch.arange(size, dtype=torch.int32, device=device) + low_word(start, device)
    spread = elementwise.index_hash(index, words[elementwise.TENSOR_KEY, 0])
    hashed = elementwise.source_hash(spread, words[elementwise.KEY, 0], words[elementwise.FACTOR, 0])
    bound = words[elementwise.CHANCE, 0]
    if levels is not None:
        bound = bound + levels.int() * words[elementwise.STEP, 0]
    return elementwise.at_most(hashed, bound) * float(chance != Chance(0))


def same_type(operands: list[Tensor]) -> list[Tensor]:
    """Operands of one type, so that few variants are compiled; widening changes no value."""
    types = {x.dtype for x in operands}
    return operands if len(types) == 1 else [x.float() for x in operands]


def slabs(operands: Sequence[Tensor], call: Callable[[Sequence[Tensor], int], Tensor]) -> Tensor:
    """Run a fused kernel on as much of flat tensors as an int32 can count, and again.

    It takes for granted that their elements follow one another.
    """
    operands = [x.contiguous() for x in operands]
    elements = operands[0].numel()
    if elements <= SLAB:
        return call(operands, 0)
    return torch.stack([call([x[s : s + SLAB] for x in operands], s) for s in range(0, elements, SLAB)]).amax()


def slice_blend(plan: SliceBlend, out: Tensor, base: Tensor, sources: Sequence[Tensor], piece: int) -> Tensor:
    """`blend` with coefficients that differ along one axis: the same kernel on runs of whole slices."""
    terms = list(zip(sources, plan.sources, strict=True))
    if not plan.of_task_vectors and plan.base is not None:
        terms.insert(0, (base, plan.base))
    # A vector is one slice; everything else becomes (slices, rest), the slices in front.
    views = [x.reshape(1, -1) if x.ndim < 2 else x.movedim(plan.axis, 0) for x in (out, base, *(x for x, _ in terms))]
    target, origin, *operands = (v.flatten(1) if v.ndim > 2 else v for v in views)
    table = np.stack([c for _, c in terms]).astype(np.float32)
    coefficients = torch.from_numpy(table).to(out.device)[:, :, None]  # (N, slices, 1)
    rows = max(1, piece // max(1, target.shape[1]))
    found = []
    for start in range(0, target.shape[0], rows):
        part = slice(start, start + rows)
        found.append(
            elementwise.blend(
                target[part],
                origin[part] if plan.of_task_vectors else None,
                [x[part] for x in operands],
                coefficients[:, part],
            )
        )
    return torch.stack(found).amax()
