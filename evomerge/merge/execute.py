"""Run a plan's kernel on one tensor: compiled where that is at hand, else piece by piece; the bits are the same."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from evomerge.merge import kernels
from evomerge.merge.compiled import Compiled, Variant
from evomerge.merge.kernels import SparseForm, signed
from evomerge.merge.plan import Blend, Chance, Clip, Derived, FisherBlend, Plan, SliceBlend, SparseBlend

PIECE = 1 << 15  # elements for one thread: every operand stays in its cache, and below torch's threading grain
PIECE_ON_ACCELERATOR = 1 << 24  # there a launch costs more than a pass over memory
SLAB = 1 << 30  # elements of one kernel call at most: an int32 counts them

Keys = tuple[int, Sequence[int]]
"""The 64-bit words of a tensor's random masks: the tensor's own (32 bits are used), and one per source."""


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
        threads = torch.get_num_threads()
        piece = PIECE_ON_ACCELERATOR if out.device.type != "cpu" else PIECE if threads == 1 else 2 * PIECE * threads
    if isinstance(plan, SliceBlend):
        return slice_blend(plan, out, base, sources, piece)
    if isinstance(plan, Clip):
        limit = tensor_of([plan.limit], np.float32, out.device)
        flat, flat_base, source = out.view(-1), base.reshape(-1), sources[0].reshape(-1)
        return piecewise(lambda p: kernels.clip(flat[p], flat_base[p], source[p], limit), out.numel(), piece)
    if isinstance(plan, FisherBlend):
        return fisher_blend(plan, out, base, sources, planes, piece)
    if isinstance(plan, Derived):
        plan = Blend(plan.coefficients, base=1.0)
    if isinstance(plan, Blend):
        return blend(plan, out, base, sources, compiled, piece)
    return sparse_blend(plan, out, base, sources, planes, keys, compiled, piece)


def blend(
    plan: Blend, out: Tensor, base: Tensor, sources: Sequence[Tensor], compiled: Compiled | None, piece: int
) -> Tensor:
    terms = [(x, c) for x, c in zip(sources, plan.sources, strict=True) if c != 0.0]
    if plan.of_task_vectors:
        terms = [(x, c) for x, c in terms if x is not base]  # an adapter leaves this tensor alone
    if not plan.of_task_vectors and plan.base != 0.0:
        terms.insert(0, (base, plan.base))
    if not terms:
        return kernels.store(out, base if plan.of_task_vectors else torch.zeros_like(base))
    flat = out.view(-1)
    operands = [x.reshape(-1) for x, _ in terms]
    origin = base.reshape(-1) if plan.of_task_vectors else None
    coefficients = tensor_of([c for _, c in terms], np.float32, out.device)
    fused = None
    if compiled is not None:
        operands = same_type(operands)
        fused = compiled.kernel(Variant.of_blend(flat, origin, operands))
    if fused is not None:
        whole = [flat, *operands] if origin is None else [flat, origin, *operands]
        return slabs(whole, lambda parts, _: fused([*parts, coefficients]))
    return piecewise(
        lambda part: kernels.blend(
            flat[part], None if origin is None else origin[part], [x[part] for x in operands], coefficients
        ),
        out.numel(),
        piece,
    )


def fisher_blend(
    plan: FisherBlend, out: Tensor, base: Tensor, sources: Sequence[Tensor], planes: Sequence[Tensor], piece: int
) -> Tensor:
    used = [i for i, w in enumerate(plan.weights) if w != 0.0]
    if not used:
        return kernels.store(out, base)
    rows = [[plan.weights[i] for i in used], [plan.scales[i] for i in used], [plan.floor] * len(used)]
    numbers = tensor_of(rows, np.float32, out.device)
    flat, flat_base = out.view(-1), base.reshape(-1)
    operands, fishers = [sources[i].reshape(-1) for i in used], [planes[i].reshape(-1) for i in used]
    return piecewise(
        lambda p: kernels.fisher_blend(
            flat[p], flat_base[p], [x[p] for x in operands], [f[p] for f in fishers], numbers
        ),
        out.numel(),
        piece,
    )


def sparse_blend(
    plan: SparseBlend,
    out: Tensor,
    base: Tensor,
    sources: Sequence[Tensor],
    planes: Sequence[Tensor],
    keys: Keys,
    compiled: Compiled | None,
    piece: int,
) -> Tensor:
    count = len(sources)
    gains = plan.gains or (1.0,) * count
    used = [i for i in range(count) if contributes(plan, i, sources[i] is base)]
    if not used:
        return kernels.store(out, base)
    infinite = float("inf")
    floors, ceilings = plan.floors or (0.0,) * count, plan.ceilings or (infinite,) * count
    alone = plan.alone or (1.0,) * count
    rows = [[plan.weights[i] * gains[i] for i in used], [plan.weights[i] for i in used]]
    rows += [[values[i] for i in used] for values in (floors, ceilings)]
    rows += [[alone[i] - 1.0 for i in used], [plan.scale] * len(used)]
    numbers = tensor_of(rows, np.float32, out.device)
    words = tensor_of(mask_words(plan, used, keys), np.int32, out.device)
    form = SparseForm(plan.keep, plan.elect, plan.normalize, plan.alone is not None)
    flat, flat_base = out.view(-1), base.reshape(-1)
    operands, levels = [sources[i].reshape(-1) for i in used], [planes[i].reshape(-1) for i in used if planes]
    if plan.keep == "importance":  # one factor per row
        levels = [planes[i].expand(out.shape).reshape(-1) for i in used]
    fused = None
    if compiled is not None:
        operands = same_type(operands)
        fused = compiled.kernel(Variant.of_sparse(flat, flat_base, operands, levels, form))
    if fused is not None:
        return slabs(
            [flat, flat_base, *operands, *levels],
            lambda parts, start: fused(
                [*parts, numbers, with_high_word(words, start), low_word(start, out.device)],
            ),
        )
    return piecewise(
        lambda part: kernels.sparse_blend(
            flat[part],
            flat_base[part],
            [x[part] for x in operands],
            [x[part] for x in levels],
            numbers,
            with_high_word(words, part.start),
            low_word(part.start, out.device),
            form,
        ),
        out.numel(),
        piece,
    )


def contributes(plan: SparseBlend, source: int, is_base: bool) -> bool:
    """Whether a source can change anything: an adapter may leave the tensor alone, a weight or chance be 0.

    Where all variances count, every source does; in a plain election a source of no weight has its vote.
    """
    if plan.keep == "variance":
        return True
    never_kept = plan.chances is not None and plan.chances[source] == Chance(0)
    silent = plan.weights[source] == 0.0 and plan.elect != "plain"
    return not (is_base or never_kept or silent)


def mask_words(plan: SparseBlend, used: Sequence[int], keys: Keys) -> list[list[int]]:
    """The int32 rows of a random mask: keys, factors, chances less 1 as signed numbers, steps, tensor's key."""
    tensor_key, source_keys = keys
    if plan.chances is None:
        return [[0] * len(used)] * 5
    chances = [plan.chances[i] for i in used]
    return [
        [signed(source_keys[i]) for i in used],
        [signed(source_keys[i] >> 32 | 1) for i in used],
        [signed(c.low - 1 - 2**31) for c in chances],
        [signed(c.step) for c in chances],
        [signed(tensor_key)] * len(used),
    ]


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
    words = with_high_word(tensor_of(mask_words(plan, [0], (keys[0], [keys[1]])), np.int32, device), start)
    index = torch.arange(size, dtype=torch.int32, device=device) + low_word(start, device)
    spread = kernels.index_hash(index, words[kernels.TENSOR_KEY, 0])
    hashed = kernels.source_hash(spread, words[kernels.KEY, 0], words[kernels.FACTOR, 0])
    bound = words[kernels.CHANCE, 0]
    if levels is not None:
        bound = bound + levels.int() * words[kernels.STEP, 0]
    return kernels.at_most(hashed, bound) * float(chance != Chance(0))


def with_high_word(words: Tensor, start: int) -> Tensor:
    """Beyond 2^32 elements the upper word of the index changes the tensor's key."""
    high = start >> 32
    if high == 0:
        return words
    words = words.clone()
    words[kernels.TENSOR_KEY] ^= signed(high * 0x9E3779B9)
    return words


def low_word(start: int, device: torch.device) -> Tensor:
    return tensor_of([signed(start)], np.int32, device)


def tensor_of(numbers: object, dtype: type[np.generic], device: torch.device) -> Tensor:
    """A small tensor of plain numbers; `torch.tensor` takes three times as long, and a candidate makes hundreds."""
    return torch.from_numpy(np.array(numbers, dtype=dtype)).to(device)


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


def piecewise(call: Callable[[slice], Tensor], elements: int, piece: int) -> Tensor:
    """Run a kernel piece by piece."""
    found = [call(slice(s, min(s + piece, elements))) for s in range(0, elements, piece)]
    return found[0] if len(found) == 1 else torch.stack(found).amax()


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
            kernels.blend(
                target[part],
                origin[part] if plan.of_task_vectors else None,
                [x[part] for x in operands],
                coefficients[:, part],
            )
        )
    return torch.stack(found).amax()
