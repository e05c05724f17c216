"""Measure whole tensors in one pass each: in C++ (`scan.cpp`) where that is compiled, else in torch, the same bits.

Why there are two of each pass: torch is the reference, and runs where there is no compiler and on accelerators.  C++ is
faster by these factors (one thread, three bfloat16 tensors of 90 MB, CPU seconds, least of five runs), and with several
threads by more, because torch's threads return to Python after every few operations and wait there for each other:

    Gram matrix of 3 tensors    2.1        sum of magnitudes               2.7
    histogram of magnitudes     2.7        the same, weighted by rank      5.0
    ranks in rows               9.4
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
from evomerge.merge.measure import gram, ranks, sums
from evomerge.merge.measure.magnitudes import Magnitudes, few_of
from evomerge.merge.methods.measured import Gram

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
    """Compile `scan.cpp` into a library.  file: in a folder of its own.  RuntimeError with the compiler's last line."""
    compiler = os.environ.get("CXX") or (
        "clang++" if sys.platform == "darwin" else "g++"
    )  # as torch's own compiler does
    vectors = VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", *vectors]
    run_compiler(["env", f"TMPDIR={file.parent}", compiler, *flags, str(SOURCE), "-o", str(file)])


class Scan:
    """Passes over tensors of one shape."""

    def __init__(self, library: Path | None = None) -> None:
        """library: a file of `compile_scan`; without it all passes run in torch.  OSError if it cannot be loaded."""
        self.library = None if library is None else ctypes.CDLL(str(library))
        for name, types in ARGUMENTS.items() if self.library else ():
            function = getattr(self.library, name)
            function.argtypes, function.restype = types, count if name == "count_sizes" else None

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the library can read these tensors."""
        return self.library is not None and all(
            x.device.type == "cpu" and x.is_contiguous() and x.dtype in TYPES and x.numel() for x in tensors
        )

    def magnitudes(self, base: Tensor, source: Tensor) -> Magnitudes:
        """The histogram of |source - base|."""
        n = base.numel()
        if self.library is None or not self.reads([base, source]):
            flat_base, flat = base.reshape(-1), source.reshape(-1)
            return Magnitudes.of(n, lambda part: (flat[part].float() - flat_base[part].float()).abs_(), base.device)
        counts = np.zeros(1 << 15, dtype=np.int64)
        odd = np.empty(few_of(n) + sums.CHUNK, dtype=np.int32)
        few = self.library.count_sizes(*pair(base, source), n, sums.CHUNK, counts.ctypes.data, odd.ctypes.data)
        return Magnitudes(n, counts, odd[:few] if few >= 0 else None)

    def levels(self, base: Tensor, source: Tensor) -> Tensor:
        """The rank of each |source - base| in its row; see `ranks.rank_levels`."""
        if self.library is None or not self.reads([base, source]):
            return ranks.rank_levels(source, base)
        rows = base.shape[0] if base.ndim > 1 else 1
        levels = torch.empty(base.shape, dtype=torch.uint8)
        self.library.rank_levels(*pair(base, source), rows, base.numel() // rows, levels.data_ptr())
        return levels

    def l1(self, base: Tensor, source: Tensor, levels: Tensor | None = None) -> tuple[float, float]:
        """The sum of |source - base|, and that of |source - base| (level + 1/2) / 256, 0 without levels."""
        n, found = base.numel(), np.zeros(2)
        if self.library is None or not self.reads([base, source]):
            flat_base, flat = base.reshape(-1), source.reshape(-1)
            flat_levels = None if levels is None else levels.reshape(-1)

            def terms(part: slice) -> Tensor:
                sizes = (flat[part].float() - flat_base[part].float()).abs_().double()
                if flat_levels is None:
                    return sizes[None]
                return torch.stack([sizes, sizes * ((flat_levels[part].double() + 0.5) / 256)])

            rows = 1 if levels is None else 2
            found[:rows] = sums.summed(n, terms, rows, base.device)
        else:
            ordered = None if levels is None else levels.contiguous()
            self.library.sum_sizes(
                *pair(base, source),
                None if ordered is None else ordered.data_ptr(),
                n,
                sums.LANES,
                sums.SEGMENT,
                found.ctypes.data,
            )
        return float(found[0]), float(found[1])

    def gram_matrix(self, tensors: Sequence[Tensor], origin: Tensor | None = None) -> Gram:
        """All pairwise dot products; see `gram.gram_matrix`."""
        if self.library is None or not self.reads([*tensors, *([] if origin is None else [origin])]):
            return gram.gram_matrix(tensors, origin)
        n = len(tensors)
        products = np.zeros((n, n))
        self.library.gram_matrix(
            n,
            (pointer * n)(*(x.data_ptr() for x in tensors)),
            (type_ * n)(*(TYPES[x.dtype] for x in tensors)),
            *((None, 0) if origin is None else (origin.data_ptr(), TYPES[origin.dtype])),
            tensors[0].numel(),
            sums.LANES,
            sums.SEGMENT,
            products.ctypes.data,
        )
        return products


def pair(base: Tensor, source: Tensor) -> tuple[int, int, int, int]:
    """The first four arguments of a pass over two tensors: addresses and types."""
    return base.data_ptr(), TYPES[base.dtype], source.data_ptr(), TYPES[source.dtype]
