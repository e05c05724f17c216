"""What planners ask of whole tensors, measured in one pass each: in C++ where that is compiled, else in torch.

torch counts a histogram with one thread and returns to Python after every few operations, where two threads wait for
each other.  The passes of `scan.cpp` give the same bits and keep a core busy for a whole tensor.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evomerge.merge.kernels.compiler import run_compiler
from evomerge.merge.measure import reductions
from evomerge.merge.measure.reductions import Magnitudes
from evomerge.merge.methods.plan import Gram

SOURCE = Path(__file__).with_name("scan.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
VECTORS = {"AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"], "AVX2": ["-mavx2"]}

pointer, type_, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
PAIR = [pointer, type_, pointer, type_]  # base, source
ARGUMENTS = {
    "count_sizes": [*PAIR, count, count, pointer, pointer],
    "rank_levels": [*PAIR, count, count, pointer],
    "sum_sizes": [*PAIR, pointer, count, count, count, pointer],
    "gram_matrix": [count, pointer, pointer, pointer, type_, count, count, count, pointer],
}


def compile_scan(file: Path) -> None:
    """Compile `scan.cpp` into a library.  RuntimeError with the compiler's last word."""
    compiler = os.environ.get("CXX") or (
        "clang++" if sys.platform == "darwin" else "g++"
    )  # as torch's own compiler does
    vectors = VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", *vectors]
    run_compiler([compiler, *flags, str(SOURCE), "-o", str(file)])


class Scan:
    """Passes over tensors of one shape."""

    def __init__(self, library: Path | None = None) -> None:
        """library: what `compile_scan` made.  OSError if it cannot be loaded."""
        self.library = None if library is None else ctypes.CDLL(str(library))
        for name, types in ARGUMENTS.items() if self.library else ():
            function = getattr(self.library, name)
            function.argtypes, function.restype = types, count if name == "count_sizes" else None

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the library can."""
        return self.library is not None and all(
            x.device.type == "cpu" and x.is_contiguous() and x.dtype in TYPES and x.numel() for x in tensors
        )

    def magnitudes(self, base: Tensor, source: Tensor) -> Magnitudes:
        """Of |source - base|."""
        n = base.numel()
        if self.library is None or not self.reads([base, source]):
            flat_base, flat = base.reshape(-1), source.reshape(-1)
            return Magnitudes.of(n, lambda part: (flat[part].float() - flat_base[part].float()).abs_(), base.device)
        counts = np.zeros(1 << 15, dtype=np.int64)
        odd = np.empty(reductions.few_of(n) + reductions.CHUNK, dtype=np.int32)
        few = self.library.count_sizes(*pair(base, source), n, reductions.CHUNK, counts.ctypes.data, odd.ctypes.data)
        return Magnitudes(n, counts, odd[:few] if few >= 0 else None)

    def levels(self, base: Tensor, source: Tensor) -> Tensor:
        """`reductions.rank_levels`."""
        if self.library is None or not self.reads([base, source]):
            return reductions.rank_levels(source, base)
        rows = base.shape[0] if base.ndim > 1 else 1
        levels = torch.empty(base.shape, dtype=torch.uint8)
        self.library.rank_levels(*pair(base, source), rows, base.numel() // rows, levels.data_ptr())
        return levels

    def l1(self, base: Tensor, source: Tensor, levels: Tensor | None = None) -> tuple[float, float]:
        """The sum of |source - base|, and with levels that of |source - base| (level + 1/2) / 256."""
        n, sums = base.numel(), np.zeros(2)
        if self.library is None or not self.reads([base, source]):
            flat_base, flat = base.reshape(-1), source.reshape(-1)
            flat_levels = None if levels is None else levels.reshape(-1)

            def terms(part: slice) -> Tensor:
                sizes = (flat[part].float() - flat_base[part].float()).abs_().double()
                if flat_levels is None:
                    return sizes[None]
                return torch.stack([sizes, sizes * ((flat_levels[part].double() + 0.5) / 256)])

            rows = 1 if levels is None else 2
            sums[:rows] = reductions.summed(n, terms, rows, base.device)
        else:
            ranks = None if levels is None else levels.contiguous()
            self.library.sum_sizes(
                *pair(base, source),
                None if ranks is None else ranks.data_ptr(),
                n,
                reductions.LANES,
                reductions.SEGMENT,
                sums.ctypes.data,
            )
        return float(sums[0]), float(sums[1])

    def gram_matrix(self, tensors: Sequence[Tensor], origin: Tensor | None = None) -> Gram:
        """`reductions.gram_matrix`."""
        if self.library is None or not self.reads([*tensors, *([] if origin is None else [origin])]):
            return reductions.gram_matrix(tensors, origin)
        n = len(tensors)
        gram = np.zeros((n, n))
        self.library.gram_matrix(
            n,
            (pointer * n)(*(x.data_ptr() for x in tensors)),
            (type_ * n)(*(TYPES[x.dtype] for x in tensors)),
            *((None, 0) if origin is None else (origin.data_ptr(), TYPES[origin.dtype])),
            tensors[0].numel(),
            reductions.LANES,
            reductions.SEGMENT,
            gram.ctypes.data,
        )
        return gram


def pair(base: Tensor, source: Tensor) -> tuple[int, int, int, int]:
    return base.data_ptr(), TYPES[base.dtype], source.data_ptr(), TYPES[source.dtype]
