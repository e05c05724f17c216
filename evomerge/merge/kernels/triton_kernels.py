"""`blend` and `sparse_blend` of `elementwise.py` for CUDA, in Triton: one launch for many tensors, the same bits.

Each program computes BLOCK elements of one tensor.  The table `blocks` says which, the table `addresses` where the
tensor lies in memory, and one row of `settings` holds its coefficients.  Both kernels must be compiled with
`enable_fp_fusion=False`; otherwise a multiplication and an addition are rounded together.

Shapes: B blocks, T tensors, N sources.
    blocks     (B, 2) int32: row of the tensor, number of the block in it
    addresses  (T, 5 + 2 N) int64: elements, out, base, elements of a row (for `importance`), the tensor's entry in
               `largest`, N sources, N planes; 0 where there is none
    settings   (T, N) or (T, 11 N) int32: the coefficients as the bits of float32; for `sparse_blend` the 6 rows of
               `numbers` and then the 5 rows of `words`, as `elementwise.py` names them
    largest    int32, zeros at first: the bits of the largest |out| as float32; those of NaN are the largest

Types are numbers (`TYPES`); those of the sources take two bits each, the first source's the lowest.
"""

import torch
import triton
import triton.language as tl

from evomerge.merge.kernels import elementwise

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HEAD = tl.constexpr(5)  # entries of a row of `addresses` before the sources
KEEPS = {"all": 0, "magnitude": 1, "band": 2, "random": 3, "rank": 4, "variance": 5, "importance": 6}
ELECTS = {None: 0, "weighted": 1, "plain": 2}
MAGNITUDE, BAND, RANDOM, RANK = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
VARIANCE, IMPORTANCE = tl.constexpr(5), tl.constexpr(6)
PLAIN = tl.constexpr(2)
WEIGHT, DIVISOR = tl.constexpr(elementwise.WEIGHT), tl.constexpr(elementwise.DIVISOR)
FLOOR, CEILING = tl.constexpr(elementwise.FLOOR), tl.constexpr(elementwise.CEILING)
ALONE_LESS_1, SCALE = tl.constexpr(elementwise.ALONE), tl.constexpr(elementwise.SCALE)
KEY, FACTOR = tl.constexpr(elementwise.KEY), tl.constexpr(elementwise.FACTOR)
CHANCE, STEP = tl.constexpr(elementwise.CHANCE), tl.constexpr(elementwise.STEP)
TENSOR_KEY = tl.constexpr(elementwise.TENSOR_KEY)


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer to elements of a type."""
    if TYPE == 0:
        p = address.to(tl.pointer_type(tl.float32))
    elif TYPE == 1:
        p = address.to(tl.pointer_type(tl.bfloat16))
    else:
        p = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def read(address, start, lanes, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """One block of a tensor in float32."""
    return tl.load(pointer(address, TYPE, ALIGNED) + start + lanes, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write(address, start, lanes, mask, value, largest, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Store one block, and raise `largest` to its largest magnitude."""
    if TYPE == 1:
        rounded = value.to(tl.bfloat16)
    elif TYPE == 2:
        rounded = value.to(tl.float16)
    else:
        rounded = value
    tl.store(pointer(address, TYPE, ALIGNED) + start + lanes, rounded, mask=mask)
    bits = rounded.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest, tl.max(tl.where(mask, bits, 0), axis=0), sem="relaxed")


@triton.jit
def tensor_role(blocks, addresses, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """What this program computes: row, the row's addresses, first element, lanes, and which lanes are elements."""
    block = tl.program_id(0).to(tl.int64) * 2
    row = tl.load(blocks + block)
    start = tl.load(blocks + block + 1).to(tl.int64) * BLOCK
    entries = addresses + row * WIDTH
    count = tl.load(entries)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    lanes = tl.arange(0, BLOCK)
    return row, entries, start, lanes, lanes < tl.minimum(count - start, BLOCK).to(tl.int32)


@triton.jit
def blend(
    blocks,
    addresses,
    settings,
    largest,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    SOURCES: tl.constexpr,
    N: tl.constexpr,
    OF_TASK_VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`elementwise.blend`; OF_TASK_VECTORS says whether there is an origin."""
    row, entries, start, lanes, mask = tensor_role(blocks, addresses, HEAD + 2 * N, ALIGNED, BLOCK)
    if OF_TASK_VECTORS:
        origin = read(tl.load(entries + 2), start, lanes, mask, BASE, ALIGNED)
    for i in tl.static_range(N):
        term = read(tl.load(entries + HEAD + i), start, lanes, mask, (SOURCES >> (2 * i)) & 3, ALIGNED)
        if OF_TASK_VECTORS:
            term = term - origin
        term = term * tl.load(settings + row * N + i).to(tl.float32, bitcast=True)
        if i == 0:
            total = term
        else:
            total = total + term
    if OF_TASK_VECTORS:
        total = total + origin
    write(tl.load(entries + 1), start, lanes, mask, total, largest + tl.load(entries + 4), OUT, ALIGNED)


@triton.jit
def added(terms, N: tl.constexpr):
    """The sum from the first term to the last."""
    total = terms[0]
    for i in tl.static_range(1, N):
        total = total + terms[i]
    return total


@triton.jit
def folded(h, BY: tl.constexpr):
    """h ^ (h >> BY) of uint32."""
    return h ^ (h >> BY)


@triton.jit
def index_hash(start, lanes, key):
    """The lowbias32 hash of the elements' indices under the tensor's key, uint32.

    No block lies on both sides of the 2^32-th element.
    """
    high = (start >> 32).to(tl.uint32) * 0x9E3779B9
    h = (start & 0xFFFFFFFF).to(tl.uint32) + lanes.to(tl.uint32)
    h = folded(h ^ (key.to(tl.uint32, bitcast=True) ^ high), 16) * 0x7FEB352D
    h = folded(h, 15) * 0x846CA68B
    return folded(h, 16)


@triton.jit
def sparse_blend(
    blocks,
    addresses,
    settings,
    largest,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    SOURCES: tl.constexpr,
    N: tl.constexpr,
    KEEP: tl.constexpr,
    ELECT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`elementwise.sparse_blend`."""
    row, entries, start, lanes, mask = tensor_role(blocks, addresses, HEAD + 2 * N, ALIGNED, BLOCK)
    numbers = settings + row * (11 * N)
    words = numbers + 6 * N
    base = read(tl.load(entries + 2), start, lanes, mask, BASE, ALIGNED)
    deltas = ()
    for i in tl.static_range(N):
        x = read(tl.load(entries + HEAD + i), start, lanes, mask, (SOURCES >> (2 * i)) & 3, ALIGNED)
        deltas = deltas + (x - base,)
    if KEEP == RANDOM or KEEP == RANK:
        spread = index_hash(start, lanes, tl.load(words + TENSOR_KEY * N))
    if KEEP == VARIANCE:
        count = tl.full([BLOCK], N, tl.float32)
        mean = tl.div_rn(added(deltas, N), count)
        squares = ()
        for i in tl.static_range(N):
            squares = squares + ((deltas[i] - mean) * (deltas[i] - mean),)
        common = tl.div_rn(added(squares, N), count) >= tl.load(numbers + FLOOR * N).to(tl.float32, bitcast=True)
    kept = ()
    for i in tl.static_range(N):
        d = deltas[i]
        floor = tl.load(numbers + FLOOR * N + i).to(tl.float32, bitcast=True)
        if KEEP == MAGNITUDE:
            d = d * (tl.abs(d) >= floor).to(tl.float32)
        elif KEEP == BAND:
            ceiling = tl.load(numbers + CEILING * N + i).to(tl.float32, bitcast=True)
            d = d * ((tl.abs(d) >= floor) & (tl.abs(d) <= ceiling)).to(tl.float32)
        elif KEEP == VARIANCE:
            d = d * common.to(tl.float32)
        elif KEEP == IMPORTANCE:  # one factor for each row
            length = tl.load(entries + 3)
            first = start // length
            rows = first + ((start - first * length).to(tl.int32) + lanes) // length.to(tl.int32)
            factors = tl.load(entries + HEAD + N + i).to(tl.pointer_type(tl.float32))
            d = d * (tl.abs(d) * tl.load(factors + rows, mask=mask, other=0.0) >= floor).to(tl.float32)
        elif KEEP == RANDOM or KEEP == RANK:
            hashed = spread ^ tl.load(words + KEY * N + i).to(tl.uint32, bitcast=True)
            hashed = hashed * tl.load(words + FACTOR * N + i).to(tl.uint32, bitcast=True)
            chance = tl.load(words + CHANCE * N + i)
            if KEEP == RANK:  # a source without a step in its chance has no plane
                plane = tl.load(entries + HEAD + N + i)
                levels = plane.to(tl.pointer_type(tl.uint8))
                if ALIGNED:
                    levels = tl.multiple_of(levels, 16)
                level = tl.load(levels + start + lanes, mask=mask & (plane != 0), other=0).to(tl.int32)
                chance = chance + level * tl.load(words + STEP * N + i)
            d = d * (hashed.to(tl.int32, bitcast=True) <= chance).to(tl.float32)
        kept = kept + (d,)
    values = ()
    for i in tl.static_range(N):
        values = values + (kept[i] * tl.load(numbers + WEIGHT * N + i).to(tl.float32, bitcast=True),)
    if ELECT:
        if ELECT == PLAIN:
            direction = added(kept, N)
        else:
            direction = added(values, N)
        sign = tl.where(direction < 0.0, -1.0, 1.0)
    agree = ()
    for i in tl.static_range(N):
        if ELECT:  # a zero agrees with neither sign
            agree = agree + ((values[i] * sign > 0.0).to(tl.float32),)
        elif NORMALIZE:
            agree = agree + ((values[i] != 0.0).to(tl.float32),)
    if ELECT:
        agreed = ()
        for i in tl.static_range(N):
            agreed = agreed + (values[i] * agree[i],)
        values = agreed
    total = added(values, N)
    if NORMALIZE:
        counted = ()
        for i in tl.static_range(N):
            counted = counted + (agree[i] * tl.load(numbers + DIVISOR * N + i).to(tl.float32, bitcast=True),)
        divisor = added(counted, N)
        if ALONE:
            extras = ()
            for i in tl.static_range(N):
                extras = extras + (values[i] * tl.load(numbers + ALONE_LESS_1 * N + i).to(tl.float32, bitcast=True),)
            total = total + added(extras, N) * (divisor == 1.0).to(tl.float32)
        total = tl.div_rn(total, (divisor == 0.0).to(tl.float32) + divisor)
    total = total * tl.load(numbers + SCALE * N).to(tl.float32, bitcast=True) + base
    write(tl.load(entries + 1), start, lanes, mask, total, largest + tl.load(entries + 4), OUT, ALIGNED)
