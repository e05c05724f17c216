"""The type in which a live model computes: the candidate's own, or float32 where the processor is faster with it.

Many processors can store bfloat16 but have no arithmetic for it (x86 without avx512_bf16 or amx, most laptops): there a
product of two bfloat16 matrices takes up to sixty times as long as one in float32.  Every bfloat16 number is a float32
number too, so the model can hold the same weights in float32 and compute in float32.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from evomerge.device import TORCH_DTYPES
from evomerge.merge.recipe.recipe import Dtype

Seconds = dict[Dtype, float]
"""Type -> seconds that the same products of matrices take in it."""

ROWS = 64  # tokens in a product
WORK = 2**23  # multiplications of one timing: 60 ms on the slowest processor seen, 0.3 GFLOP/s in bfloat16
SHAPES = 3  # of the model's shapes of matrices, those with most weights
REPEATS = 5
ENOUGH = 0.1  # seconds in one type for one shape, after which timing stops
CLEARLY = 1.25  # float32 takes twice the memory, so it must be faster by this factor


def faster_type(dtype: Dtype, seconds: Mapping[Dtype, float]) -> Dtype:
    """The type to compute in: float32 if it is clearly faster than `dtype`, else `dtype`.

    seconds: from `measure`; empty if there is nothing to choose.
    """
    return "float32" if seconds and CLEARLY * seconds["float32"] < seconds[dtype] else dtype


def measure(dtype: Dtype, device: str, shapes: Iterable[tuple[int, ...]]) -> Seconds:
    """Time matrix products of a model's own sizes in `dtype` and in float32; this takes a second at most.

    device: the kind of device that will compute, `cpu` or `cuda`.
    shapes: of the model's tensors.

    Returns an empty dictionary if there is nothing to choose: for float32, on an accelerator, or without matrices.
    """
    if dtype == "float32" or device != "cpu":
        return {}
    total: Seconds = {"float32": 0.0, dtype: 0.0}
    weights = Counter[tuple[int, int]]()
    for shape in shapes:
        if len(shape) == 2:
            weights[shape[0], shape[1]] += shape[0] * shape[1]
    for (rows, columns), count in weights.most_common(SHAPES):
        best = product_seconds((rows, columns), list(total))
        for kind, seconds in best.items():
            total[kind] += seconds * count
    return total if weights else {}


@torch.inference_mode()
def product_seconds(shape: tuple[int, int], kinds: Iterable[Dtype]) -> Seconds:
    """The least seconds for one weight of a matrix in a product with ROWS tokens, by type.

    shape: of the matrix.  A large one is cut to WORK multiplications; the product of a small one is repeated.
    """
    inner = min(shape[1], WORK // ROWS // 16)
    outer = max(1, min(shape[0], WORK // ROWS // inner))
    times = max(1, min(64, WORK // (ROWS * inner * outer)))
    operands = {}
    for kind in kinds:
        torch_type = TORCH_DTYPES[kind]
        operands[kind] = torch.ones(ROWS, inner, dtype=torch_type), torch.ones(outer, inner, dtype=torch_type)
    best: Seconds = {}
    spent: Seconds = dict.fromkeys(operands, 0.0)
    for repeat in range(1 + REPEATS):  # the first of each warms up
        for kind, (x, weight) in operands.items():
            if repeat > 1 and spent[kind] > ENOUGH:
                continue
            started = time.perf_counter()
            for _ in range(times):
                torch.nn.functional.linear(x, weight)
            taken = time.perf_counter() - started
            spent[kind] += taken
            if repeat:
                best[kind] = min(taken, best.get(kind, taken))
    return {kind: seconds / (times * inner * outer) for kind, seconds in best.items()}
