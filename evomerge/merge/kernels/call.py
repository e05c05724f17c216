"""What one tensor's plan asks of the kernels `blend` and `sparse_blend`, and the answer in torch, piece by piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.elementwise import SparseForm, signed_word
from evomerge.merge.methods.plan import Blend, Plan, SparseBlend

INFINITE = float("inf")
PIECE = 1 << 15  # elements for one thread: every operand stays in its cache, and below torch's threading grain
PIECE_ON_ACCELERATOR = 1 << 24  # there a launch costs more than a pass over memory
Keys = tuple[int, Sequence[int]]
"""The 64-bit words of a tensor's random masks: the tensor's own (32 bits are used), and one per source."""


@dataclass(eq=False, slots=True)
class Memo:
    """What a launcher knows of the last call over the same tensors.

    key: the rest of what it depends on.  found: the call's kind and row.
    """

    key: tuple[Any, ...] = ()
    found: Any = None


@dataclass(eq=False, slots=True)
class Call:
    """A kernel's arguments but for the output.  N sources that count, all tensors of one shape.

    form: None for `blend`.  base: None for a blend of the tensors themselves.
    planes: per source what its mask needs, or none; they may be broadcast.
    numbers: N coefficients, or the 6 rows of `numbers`, one after the other.  words: the 5 rows of `words`, or none.
    memo: that of the tensors, where they outlive the call.
    """

    form: SparseForm | None
    base: Tensor | None
    sources: list[Tensor]
    numbers: list[float]
    words: list[int]
    planes: list[Tensor]
    memo: Memo | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the result is the only source."""
        return self.form is None and self.base is None and self.numbers == [1.0]

    def number_rows(self, device: torch.device) -> Tensor:
        """`numbers` as the kernels take them, (N,) or (6, N)."""
        found = tensor_of(self.numbers, np.float32, device)
        return found if self.form is None else found.view(6, -1)

    def word_rows(self, device: torch.device) -> Tensor:
        """`words`, (5, N); zeros where there are none."""
        return tensor_of(self.words or [0] * (5 * len(self.sources)), np.int32, device).view(5, -1)


def call_of(
    plan: Plan,
    base: Tensor,
    sources: Sequence[Tensor],
    planes: Sequence[Tensor] = (),
    keys: Keys = (0, ()),
    memo: Memo | None = None,
) -> Call | None:
    """The call that makes what `plan` wants; None if another kernel must.  Sources that cannot count are left out.

    A call without sources makes zeros.
    """
    if isinstance(plan, Blend):
        call = blend_call(plan, base, sources)
    elif isinstance(plan, SparseBlend):
        call = sparse_call(plan, base, sources, planes, keys)
    else:
        return None
    call.memo = memo
    return call


def blend_call(plan: Blend, base: Tensor, sources: Sequence[Tensor]) -> Call:
    terms = [(x, c) for x, c in zip(sources, plan.sources, strict=True) if c != 0.0]
    if plan.of_task_vectors:
        terms = [(x, c) for x, c in terms if x is not base]  # an adapter leaves this tensor alone
        if not terms:
            return copy_of(base)
    elif plan.base != 0.0:
        terms.insert(0, (base, plan.base))
    origin = base if plan.of_task_vectors else None
    return Call(None, origin, [x for x, _ in terms], [c for _, c in terms], [], [])


def copy_of(tensor: Tensor) -> Call:
    return Call(None, None, [tensor], [1.0], [], [])


form_of = cache(SparseForm)  # one object of each, which is found faster


def sparse_call(
    plan: SparseBlend, base: Tensor, sources: Sequence[Tensor], planes: Sequence[Tensor], keys: Keys
) -> Call:
    used = [i for i, x in enumerate(sources) if contributes(plan, i, x is base)]
    if not used:
        return copy_of(base)
    n = len(used)
    weights = chosen(plan.weights, used)
    numbers = [w * g for w, g in zip(weights, chosen(plan.gains, used), strict=True)] if plan.gains else [*weights]
    numbers += weights
    numbers += chosen(plan.floors, used) if plan.floors else [0.0] * n
    numbers += chosen(plan.ceilings, used) if plan.ceilings else [INFINITE] * n
    numbers += [a - 1.0 for a in chosen(plan.alone, used)] if plan.alone else [0.0] * n
    numbers += [plan.scale] * n
    form = form_of(plan.keep, plan.elect, plan.normalize, plan.alone is not None)
    found = [planes[i] for i in used] if planes else []
    return Call(form, base, [sources[i] for i in used], numbers, mask_words(plan, used, keys), found)


def chosen(values: tuple[float, ...], used: Sequence[int]) -> Sequence[float]:
    """The values of the sources that count."""
    return values if len(used) == len(values) else [values[i] for i in used]


def contributes(plan: SparseBlend, source: int, is_base: bool) -> bool:
    """Whether a source can change anything: an adapter may leave the tensor alone, a weight or chance be 0.

    Where all variances count, every source does; in a plain election a source of no weight has its vote.
    """
    if plan.keep == "variance":
        return True
    if is_base or (plan.weights[source] == 0.0 and plan.elect != "plain"):
        return False
    chance = None if plan.chances is None else plan.chances[source]
    return chance is None or chance.low != 0 or chance.step != 0


def mask_words(plan: SparseBlend, used: Sequence[int], keys: Keys) -> list[int]:
    """The int32 rows of a random mask: keys, factors, chances less 1 as signed numbers, steps, tensor's key."""
    if plan.chances is None:
        return []
    tensor_key, source_keys = keys
    fixed, last = key_words(tensor_key, tuple([source_keys[i] for i in used]))
    chances = [plan.chances[i] for i in used]
    return [*fixed, *[signed_word(c.low - 1 - 2**31) for c in chances], *[signed_word(c.step) for c in chances], *last]


@lru_cache(maxsize=65536)
def key_words(tensor_key: int, source_keys: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The rows of `mask_words` that depend on the keys alone: keys and factors, tensor's key."""
    words = [signed_word(k) for k in source_keys] + [signed_word(k >> 32 | 1) for k in source_keys]
    return words, [signed_word(tensor_key)] * len(source_keys)


def piece_size(device: torch.device) -> int:
    """Elements of a piece.  A power of two, so that no piece lies on both sides of the 2^32-th element."""
    if device.type != "cpu":
        return PIECE_ON_ACCELERATOR
    threads = torch.get_num_threads()
    return PIECE if threads == 1 else 2 * PIECE << (threads - 1).bit_length()


def piecewise_call(call: Call, out: Tensor, piece: int) -> Tensor:
    """Write what a call makes to `out`, contiguous; the largest |out| as a float32 scalar, NaN if any is."""
    if not call.sources:
        return out.zero_().new_zeros((), dtype=torch.float32)
    if call.is_copy:
        return elementwise.store(out, call.sources[0])
    device, form = out.device, call.form
    flat, base = out.view(-1), None if call.base is None else call.base.reshape(-1)
    sources = [x.reshape(-1) for x in call.sources]
    numbers = call.number_rows(device)
    if form is None:
        return piecewise(
            lambda p: elementwise.blend(flat[p], None if base is None else base[p], [x[p] for x in sources], numbers),
            flat.numel(),
            piece,
        )
    assert base is not None, "task vectors need a base"
    words, planes = call.word_rows(device), [x.expand(out.shape).reshape(-1) for x in call.planes]
    return piecewise(
        lambda p: elementwise.sparse_blend(
            flat[p],
            base[p],
            [x[p] for x in sources],
            [x[p] for x in planes],
            numbers,
            with_high_word(words, p.start),
            low_word(p.start, device),
            form,
        ),
        flat.numel(),
        piece,
    )


def piecewise(call: Callable[[slice], Tensor], elements: int, piece: int) -> Tensor:
    """Run a kernel piece by piece."""
    found = [call(slice(s, min(s + piece, elements))) for s in range(0, elements, piece)]
    return found[0] if len(found) == 1 else torch.stack(found).amax()


def with_high_word(words: Tensor, start: int) -> Tensor:
    """Beyond 2^32 elements the upper word of the index changes the tensor's key."""
    high = start >> 32
    if high == 0:
        return words
    words = words.clone()
    words[elementwise.TENSOR_KEY] ^= signed_word(high * 0x9E3779B9)
    return words


def low_word(start: int, device: torch.device) -> Tensor:
    return tensor_of([signed_word(start)], np.int32, device)


def tensor_of(numbers: object, dtype: type[np.generic], device: torch.device) -> Tensor:
    """A small tensor of plain numbers; `torch.tensor` takes three times as long, and a candidate makes hundreds."""
    return torch.from_numpy(np.array(numbers, dtype=dtype)).to(device)
