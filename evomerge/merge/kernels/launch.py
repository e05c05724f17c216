"""Run the calls of many tensors on a CUDA device, those of one kind in one launch (`triton_kernels.py`)."""

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
from evomerge.merge.kernels.call import Call, piece_size, piecewise_call
from evomerge.merge.kernels.elementwise import SparseForm

ALIGNMENT = 16  # bytes that a thread reads at once
WARPS = 4
BLOCKS = {"blend": ((4, 2048), (8, 1024), (99, 512)), "sparse": ((2, 2048), (4, 1024), (8, 512), (99, 256))}
"""Elements of a block for up to so many sources: enough loads under way, and few enough numbers for the registers."""
TAKEN = {None, torch.float32, torch.bfloat16, torch.float16}
LONGEST_ROW = 1 << 30  # elements of a row of which `importance` has one factor

Row = tuple[int, ...]
"""An entry of the kernels' `addresses`: elements, out, base, elements of a row, number, N sources, N planes."""


@dataclass(frozen=True)
class Kind:
    """What is compiled into a kernel.

    types: of out, base (None where there is none) and the sources.  aligned: whether all addresses and lengths are
    multiples of 16.
    """

    form: SparseForm | None
    types: tuple[torch.dtype | None, ...]
    aligned: bool

    @property
    def count(self) -> int:
        """How many sources there are."""
        return len(self.types) - 2

    @property
    def block(self) -> int:
        sizes = BLOCKS["blend" if self.form is None else "sparse"]
        return next(size for most, size in sizes if self.count <= most)

    def __str__(self) -> str:
        name = "blend" if self.form is None else f"sparse_blend ({self.form.keep})"
        return f"{name} of {self.count} sources"


@dataclass(frozen=True)
class Table:
    """What stays while the tensors lie where they are; on the device.

    blocks: (B, 2) int32.  addresses: (T, 5 + 2 N) int64.
    """

    blocks: Tensor
    addresses: Tensor


class Launcher:
    """The Triton kernels, and torch's own piece by piece for a kind that Triton cannot compile; `log` is told once."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.tables: dict[Kind, tuple[tuple[Row, ...], Table]] = {}
        self.kinds: dict[Kind, Kind] = {}
        self.broken: set[Kind] = set()

    def run(self, jobs: Sequence[tuple[Tensor, Call]]) -> Tensor:
        """Write what each call makes to its output, contiguous; the largest |out| of each, float32, NaN if any is.

        All tensors are on one device.  Nothing waits for it; its memory may be freed and used again on the same stream.
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
        """The call in one piece, its kind (one object for equal ones) and row; remembered with tensors that stay."""
        key: tuple[Any, ...] = ()
        if call.memo is not None:
            where = number, out.data_ptr(), out.dtype, call.form, call.base is None
            key = (*where, *map(id, call.sources), *map(id, call.planes))
            if call.memo.key == key:
                return (call, *call.memo.found)
        whole = in_one_piece(call)
        kind, row = described(number, out, whole)
        if kind is not None:
            kind = self.kinds.setdefault(kind, kind)
        if call.memo is not None and whole is call:
            call.memo.key, call.memo.found = key, (kind, row)
        return whole, kind, row

    def launched(self, kind: Kind, rows: tuple[Row, ...], calls: Sequence[Call], largest: Tensor) -> bool:
        """Launch the calls of one kind; False where its kernel cannot be compiled."""
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
        except Exception as error:  # a compiler fails in many ways, and none may cost the merge
            self.broken.add(kind)
            self.log(f"{kind} runs uncompiled on the device, which is slower ({last_word(error)})")
            return False
        return True

    def table(self, kind: Kind, rows: tuple[Row, ...], device: torch.device) -> Table:
        """The table for these rows; kept, because a search writes the same tensors again and again."""
        kept = self.tables.get(kind)
        if kept is None or kept[0] != rows:
            blocks = uploaded(blocks_of([row[0] for row in rows], kind.block), device)
            kept = self.tables[kind] = rows, Table(blocks, uploaded(np.array(rows, dtype=np.int64), device))
        return kept[1]

    @cached_property
    def kernels(self) -> ModuleType | None:
        """The module of the kernels, None without Triton."""
        try:
            from evomerge.merge.kernels import triton_kernels
        except ImportError as error:
            self.log(f"kernels run uncompiled on the device, tensor by tensor, which is slower ({last_word(error)})")
            return None
        return triton_kernels


def in_one_piece(call: Call) -> Call:
    """The same call, the elements of every operand one after the other.  Planes that are one number stay so."""
    tensors = [*call.sources, *call.planes] if call.base is None else [call.base, *call.sources, *call.planes]
    if all(x.is_contiguous() for x in tensors):
        return call
    return replace(
        call,
        base=None if call.base is None else call.base.contiguous(),
        sources=[x.contiguous() for x in call.sources],
        planes=[x.contiguous() if any(x.stride()) else x for x in call.planes],
    )


def described(number: int, out: Tensor, call: Call) -> tuple[Kind | None, Row]:
    """A call's kind, None if the Triton kernels cannot take it, and its row.

    number: which entry of `largest` is the call's.
    """
    form, base, elements, width = call.form, call.base, out.numel(), 1
    planes = [0] * len(call.sources)  # none, or one that nobody looks at
    if form is not None and form.keep == "importance":
        width = elements // max(1, call.planes[0].numel())
        planes = [x.data_ptr() for x in call.planes]
    elif call.planes:
        planes = [x.data_ptr() if any(x.stride()) else 0 for x in call.planes]
    addresses = [out.data_ptr(), 0 if base is None else base.data_ptr(), *(x.data_ptr() for x in call.sources)]
    aligned = not any(x % ALIGNMENT for x in (elements, *addresses, *planes))
    kind = Kind(form, (out.dtype, None if base is None else base.dtype, *(x.dtype for x in call.sources)), aligned)
    row = (elements, *addresses[:2], width, number, *addresses[2:], *planes)
    takes = elements > 0 and call.sources and width <= LONGEST_ROW and TAKEN.issuperset(kind.types)
    return kind if takes else None, row


def kernel_of(module: ModuleType, kind: Kind) -> tuple[Any, dict[str, Any]]:
    """A kind's kernel and its constants."""
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
    """Row and number of every block of these tensors, (B, 2)."""
    counts = -(-np.array(elements) // block)
    first = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(first, counts)
    return np.stack([np.repeat(np.arange(len(counts)), counts), numbers], axis=1).astype(np.int32)


def settings_of(calls: Sequence[Call]) -> NDArray[np.int32]:
    """The coefficients of calls of one kind, (T, N) or (T, 11 N): numbers as the bits of float32, then words."""
    numbers = np.array([call.numbers for call in calls], dtype=np.float32).view(np.int32)
    if calls[0].form is None:
        return numbers
    none = [0] * (5 * len(calls[0].sources))
    words = np.array([call.words or none for call in calls], dtype=np.int32)
    return np.concatenate([numbers, words], axis=1)


def uploaded(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; the copy begins now, and nothing waits for it."""
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def last_word(error: Exception) -> str:
    """An exception with its type, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
