"""`Call`: what the kernels `blend` and `sparse_blend` need for one tensor, made from a plan and its operands."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.kernels.elementwise import (
    ALONE,
    CEILING,
    DIVISOR,
    FLOOR,
    SCALE,
    WEIGHT,
    SparseForm,
)
from evomerge.merge.kernels.operands import Memo, Operands, in_row_order, number_tensor
from evomerge.merge.kernels.random_masks import mask_words
from evomerge.merge.methods.plan import Blend, Derived, SparseBlend

INFINITE = float("inf")
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Call:
    """The arguments of a kernel except the output.  N sources that count; all tensors are of one shape.

    form: what of a `SparseBlend` changes the code; None for `blend`.
    base: None for a blend of the tensors themselves.
    sources: N tensors; without any, the result is zeros.
    numbers: N coefficients, or the 6 rows of `numbers`, one after the other (`elementwise.py`).
    words: the 5 rows of `words`, or empty without a random mask.
    planes: per source what its mask needs, or empty; they may be broadcast.
    memo: that of the operands.
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
        """`numbers` as the kernels take them, (N,) or (6, N) float32."""
        found = number_tensor(self.numbers, np.float32, device)
        return found if self.form is None else found.view(6, -1)

    def word_rows(self, device: torch.device) -> Tensor:
        """`words` as the kernels take them, (5, N) int32; zeros without a random mask."""
        return number_tensor(self.words or [0] * (5 * len(self.sources)), np.int32, device).view(5, -1)


def call_of(plan: Blend | SparseBlend | Derived, operands: Operands) -> Call:
    """The call that computes a plan.  Sources that cannot count are left out."""
    if isinstance(plan, SparseBlend):
        call = sparse_call(plan, operands)
    elif isinstance(plan, Blend):
        call = blend_call(plan, operands)
    else:
        call = blend_call(Blend(plan.coefficients, base=1.0), operands)
    call.memo = operands.memo
    return call


def blend_call(plan: Blend, operands: Operands) -> Call:
    """The call of `blend`."""
    base = operands.base
    terms = [(x, c) for x, c in zip(operands.sources, plan.sources, strict=True) if c != 0.0]
    if plan.of_task_vectors:
        terms = [(x, c) for x, c in terms if x is not base]  # an adapter leaves this tensor alone
        if not terms:
            return copy_of(base)
    elif plan.base != 0.0:
        terms.insert(0, (base, plan.base))
    origin = base if plan.of_task_vectors else None
    return Call(None, origin, [x for x, _ in terms], [c for _, c in terms], [], [])


def copy_of(tensor: Tensor) -> Call:
    """The call that gives a tensor as it is."""
    return Call(None, None, [tensor], [1.0], [], [])


form_of = cache(SparseForm)  # one object for equal forms, which is found faster in a dictionary


def sparse_call(plan: SparseBlend, operands: Operands) -> Call:
    """The call of `sparse_blend`."""
    base, sources, planes = operands.base, operands.sources, operands.planes
    used = [i for i, x in enumerate(sources) if contributes(plan, i, x is base)]
    if not used:
        return copy_of(base)
    n = len(used)
    weights = chosen(plan.weights, used)
    rows = {
        WEIGHT: [w * g for w, g in zip(weights, chosen(plan.gains, used), strict=True)] if plan.gains else weights,
        DIVISOR: weights,
        FLOOR: chosen(plan.floors, used) if plan.floors else [0.0] * n,
        CEILING: chosen(plan.ceilings, used) if plan.ceilings else [INFINITE] * n,
        ALONE: [a - 1.0 for a in chosen(plan.alone, used)] if plan.alone else [0.0] * n,
        SCALE: [plan.scale] * n,
    }
    words: list[int] = []
    if plan.chances is not None:
        tensor_key, source_keys = operands.keys
        words = mask_words(chosen(plan.chances, used), (tensor_key, chosen(source_keys, used)))
    form = form_of(plan.keep, plan.elect, plan.normalize, plan.alone is not None)
    found = [planes[i] for i in used] if planes else []
    return Call(form, base, [sources[i] for i in used], in_row_order(rows), words, found)


def chosen(values: Sequence[T], used: Sequence[int]) -> Sequence[T]:
    """The values of the sources that count.  used: their numbers."""
    return values if len(used) == len(values) else [values[i] for i in used]


def contributes(plan: SparseBlend, source: int, is_base: bool) -> bool:
    """Whether a source can change anything.

    It cannot if it is the base itself (an adapter leaves the tensor alone), if its weight is 0 or no element is kept.
    But where the variance of all sources counts, every source does; and in a plain election a source of weight 0 has
    its vote.

    source: its number.  is_base: whether its tensor is the base's own object.
    """
    if plan.keep == "variance":
        return True
    if is_base or (plan.weights[source] == 0.0 and plan.elect != "plain"):
        return False
    chance = None if plan.chances is None else plan.chances[source]
    return chance is None or chance.low != 0 or chance.step != 0
