"""Run the calls of many tensors on a CUDA device: one launch of a Triton kernel for all calls of one kind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.errors import first_line
from evomerge.merge.kernels.call import Call
from evomerge.merge.kernels.elementwise import SparseForm
from evomerge.merge.kernels.piecewise import piece_size, piecewise_call

ALIGNMENT = 16  # bytes that a thread reads at once
WARPS = 4
BLOCKS = {"blend": ((4, 2048), (8, 1024), (99, 512)), "sparse": ((2, 2048), (4, 1024), (8, 512), (99, 256))}
"""(number of sources up to, elements of a block): enough loads at the same time, and few enough values for the
registers."""
TYPES = {None, torch.float32, torch.bfloat16, torch.float16}  # None: no base
LONGEST_ROW = 1 << 30  # elements of a row, for which `importance` has one factor

Row = tuple[int, ...]
"""An entry of the kernels' `addresses`: see `triton_kernels.py`."""


@dataclass(frozen=True)
class Kind:
    """What is compiled into a kernel.

    form: None for `blend`.
    types: of out, base (None if there is none) and the N sources.
    aligned: whether all addresses and lengths are multiples of 16.
    """

    form: SparseForm | None
    types: tuple[torch.dtype | None, ...]
    aligned: bool

    @property
    def count(self) -> int:
        """The number of sources."""
        return len(self.types) - 2

    @property
    def block(self) -> int:
        """Elements of a block."""
        sizes = BLOCKS["blend" if self.form is None else "sparse"]
        return next(size for most, size in sizes if self.count <= most)

    def __str__(self) -> str:
        name = "blend" if self.form is None else f"sparse_blend ({self.form.keep})"
        return f"{name} of {self.count} sources"


@dataclass(frozen=True)
class Table:
    """Where the tensors of a launch are; on the device, and valid as long as they stay there.

    blocks: (B, 2) int32.  addresses: (T, 5 + 2 N) int64.
    """

    blocks: Tensor
    addresses: Tensor


class Launcher:
    """The Triton kernels of a device; a kind that Triton cannot compile is run by torch, piece by piece."""

    def __init__(self, log: Callable[[str], None]) -> None:
        """log: gets one line for each kind that cannot be compiled."""
        self.log = log
        self.tables: dict[Kind, tuple[tuple[Row, ...], Table]] = {}
        self.kinds: dict[Kind, Kind] = {}
        self.broken: set[Kind] = set()

    def run(self, jobs: Sequence[tuple[Tensor, Call]]) -> Tensor:
        """Write the result of each call to its output.

        jobs: T outputs, which are contiguous, and calls; all tensors are on one device.

        Returns the largest |out| of each, (T,) float32, NaN if any element is.  It does not wait for the device; memory
        that is freed may be used again by later work on the same stream.
        """
        device = jobs[0][0].device
        largest = torch.zeros(len(jobs), dtype=torch.int32, device=device)
        values = largest.view(torch.float32)
        groups: dict[int, tuple[Kind | None, list[tuple[int, Tensor, Call, Row]]]] = {}  # by the kind's identity
        for number, (out, call) in enumerate(jobs):
            call, kind, row = self.described(number, out, call)
            groups.setdefault(id(kind), (kind, []))[1].append((number, out, call, row))
        for kind, group in groups.values():
            if kind is not None and self.kernels is not None and kind not in self.broken:
                calls = [call for _, _, call, _ in group]
                if self.launched(kind, tuple(row for *_, row in group), calls, largest):
                    continue
            for number, out, call, _ in group:
                values[number] = piecewise_call(call, out, piece_size(device)) if out.numel() else 0.0
        return values

    def described(self, number: int, out: Tensor, call: Call) -> tuple[Call, Kind | None, Row]:
        """The call with contiguous operands, its kind (one object for equal kinds) and its row.

        The answer is remembered in the memo of operands that stay where they are.
        """
        key: tuple[Any, ...] = ()
        if call.memo is not None:
            where = number, out.data_ptr(), out.dtype, call.form, call.base is None
            key = (*where, *map(id, call.sources), *map(id, call.planes))
            if call.memo.key == key:
                return (call, *call.memo.found)
        whole = contiguous(call)
        kind, row = kind_and_row(number, out, whole)
        if kind is not None:
            kind = self.kinds.setdefault(kind, kind)
        if call.memo is not None and whole is call:
            call.memo.key, call.memo.found = key, (kind, row)
        return whole, kind, row

    def launched(self, kind: Kind, rows: tuple[Row, ...], calls: Sequence[Call], largest: Tensor) -> bool:
        """Launch the calls of one kind; False if its kernel cannot be compiled."""
        assert self.kernels is not None, "there is no Triton"
        table = self.table(kind, rows, largest.device)
        settings = uploaded(settings_of(calls), largest.device)
        try:
            with torch.cuda.device_of(largest):  # type: ignore[no-untyped-call]
                kernel, constants = kernel_of(self.kernels, kind)
                kernel[(len(table.blocks),)](
                    table.blocks,
                    table.addresses,
                    settings,
                    largest,
                    **constants,
                    num_warps=WARPS,
                    enable_fp_fusion=False,
                )
        except Exception as error:  # a compiler fails in many ways, and the merge must go on
            self.broken.add(kind)
            self.log(f"{kind} runs uncompiled on the device, which is slower ({one_line(error)})")
            return False
        return True

    def table(self, kind: Kind, rows: tuple[Row, ...], device: torch.device) -> Table:
        """The table of these rows; it is kept, because a search writes the same tensors again and again."""
        kept = self.tables.get(kind)
        if kept is None or kept[0] != rows:
            blocks = uploaded(blocks_of([row[0] for row in rows], kind.block), device)
            kept = self.tables[kind] = rows, Table(blocks, uploaded(np.array(rows, dtype=np.int64), device))
        return kept[1]

    @cached_property
    def kernels(self) -> ModuleType | None:
        """The module of the kernels; None without Triton."""
        try:
            from evomerge.merge.kernels import triton_kernels
        except ImportError as error:
            self.log(f"kernels run uncompiled on the device, tensor by tensor, which is slower ({one_line(error)})")
            return None
        return triton_kernels


def contiguous(call: Call) -> Call:
    """The same call with contiguous operands.  A plane that is one number in memory stays so."""
    tensors = [*call.sources, *call.planes] if call.base is None else [call.base, *call.sources, *call.planes]
    if all(x.is_contiguous() for x in tensors):
        return call
    return replace(
        call,
        base=None if call.base is None else call.base.contiguous(),
        sources=[x.contiguous() for x in call.sources],
        planes=[x.contiguous() if any(x.stride()) else x for x in call.planes],
    )


def kind_and_row(number: int, out: Tensor, call: Call) -> tuple[Kind | None, Row]:
    """A call's kind, None if the Triton kernels cannot run it, and its row.

    number: the call's entry in `largest`.
    """
    form, base, elements, width = call.form, call.base, out.numel(), 1
    planes = [0] * len(call.sources)  # 0: there is none, or the kernel does not read it
    if form is not None and form.keep == "importance":
        width = elements // max(1, call.planes[0].numel())
        planes = [x.data_ptr() for x in call.planes]
    elif call.planes:
        planes = [x.data_ptr() if any(x.stride()) else 0 for x in call.planes]
    addresses = [out.data_ptr(), 0 if base is None else base.data_ptr(), *(x.data_ptr() for x in call.sources)]
    aligned = not any(x % ALIGNMENT for x in (elements, *addresses, *planes))
    kind = Kind(form, (out.dtype, None if base is None else base.dtype, *(x.dtype for x in call.sources)), aligned)
    row = (elements, *addresses[:2], width, number, *addresses[2:], *planes)
    can_run = elements > 0 and call.sources and width <= LONGEST_ROW and TYPES.issuperset(kind.types)
    return kind if can_run else None, row


def kernel_of(module: ModuleType, kind: Kind) -> tuple[Any, dict[str, Any]]:
    """A kind's kernel in the module `triton_kernels`, and its constants by name."""
    out, base, *sources = (0 if t is None else module.TYPES[t] for t in kind.types)
    constants = {
        "OUT": out,
        "BASE": base,
        "SOURCES": sum(code << (2 * i) for i, code in enumerate(sources)),
        "N": kind.count,
        "ALIGNED": kind.aligned,
        "BLOCK": kind.block,
    }
    if kind.form is None:
        return module.blend, constants | {"OF_TASK_VECTORS": kind.types[1] is not None}
    form = {
        "KEEP": module.KEEPS[kind.form.keep],
        "ELECT": module.ELECTS[kind.form.elect],
        "NORMALIZE": kind.form.normalize,
        "ALONE": kind.form.alone,
    }
    return module.sparse_blend, constants | form


def blocks_of(elements: Sequence[int], block: int) -> NDArray[np.int32]:
    """Row and number of every block of tensors with so many elements, (B, 2)."""
    counts = -(-np.array(elements) // block)
    first = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(first, counts)
    return np.stack([np.repeat(np.arange(len(counts)), counts), numbers], axis=1).astype(np.int32)


def settings_of(calls: Sequence[Call]) -> NDArray[np.int32]:
    """The coefficients of T calls of one kind, (T, N) or (T, 11 N): the bits of `numbers`, then `words`."""
    numbers = np.array([call.numbers for call in calls], dtype=np.float32).view(np.int32)
    if calls[0].form is None:
        return numbers
    none = [0] * (5 * len(calls[0].sources))
    words = np.array([call.words or none for call in calls], dtype=np.int32)
    return np.concatenate([numbers, words], axis=1)


def uploaded(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device.  The copy begins now; this function does not wait for it."""
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def one_line(error: Exception) -> str:
    """An exception with its type, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
