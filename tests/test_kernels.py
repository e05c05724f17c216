"""Same bits everywhere: not chunks, threads nor memory layout may show, and masks and thresholds are what they say."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge import statistics
from evomerge.merge.bank import mask_key
from evomerge.merge.kernels import CHUNK, blend, random_mask, signed, sparse_blend
from evomerge.merge.plan import Blend, Plan, SparseBlend
from evomerge.merge.statistics import Magnitudes, dot, gram_matrix, kept_count

SUM = Blend((0.3, -0.7, 0.0), base=1.4)
ARITHMETIC = Blend((0.3, -0.7, 1.1), of_task_vectors=True)
TRIM = SparseBlend((0.3, 0.7, 1.1), (0.5, 0.2, 1.0), "top", (1.0, 1.0, 1.0), elect=True, normalize=True, scale=1.3)
DROP = SparseBlend((0.3, 0.7, 1.1), (0.5, 0.2, 0.9), "random", (2.0, 5.0, 1.1), elect=False, normalize=False, scale=0.9)
DROP_AND_ELECT = SparseBlend((0.3, -0.7, 1.1), (0.5, 0.2, 0.9), "random", (2.0, 5.0, 1.1), True, True, 0.9)
PLANS = {"sum": SUM, "arithmetic": ARITHMETIC, "trim": TRIM, "drop": DROP, "drop and elect": DROP_AND_ELECT}
KEYS = [mask_key(0, "tensor", source) for source in "abc"]

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
output_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def operands(*shape: int) -> tuple[Tensor, list[Tensor]]:
    """A base and three sources, of three types."""
    generator = torch.Generator().manual_seed(3)
    base, *sources = (torch.randn(shape, generator=generator) for _ in range(4))
    return base.bfloat16(), [sources[0], sources[1].bfloat16(), sources[2].half()]


def run(plan: Plan, base: Tensor, sources: Sequence[Tensor], dtype: torch.dtype, chunk: int = CHUNK) -> Tensor:
    out = torch.empty(base.shape, dtype=dtype)
    if isinstance(plan, Blend):
        blend(out, base, sources, plan, chunk)
    else:
        sparse_blend(out, base, sources, plan, [0.3, 0.9, 0.0], KEYS, chunk)
    return out


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- The kernels ---


@every_plan
@output_types
@pytest.mark.parametrize("chunk", [1, 7, 33, 128, 502, 503, 4097])
def test_bits_do_not_depend_on_the_chunk(plan: Plan, dtype: torch.dtype, chunk: int):
    base, sources = operands(503)
    assert torch.equal(run(plan, base, sources, dtype, chunk), run(plan, base, sources, dtype))


@every_plan
@output_types
def test_bits_do_not_depend_on_the_threads(plan: Plan, dtype: torch.dtype):
    base, sources = operands(150_001)  # in one chunk, so that torch does split it
    with threads(1):
        alone = run(plan, base, sources, dtype, chunk=1 << 20)
    with threads(2):
        together = run(plan, base, sources, dtype, chunk=1 << 20)
        in_chunks = run(plan, base, sources, dtype)
    assert torch.equal(alone, together)
    assert torch.equal(alone, in_chunks)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "inside a larger tensor": lambda x: torch.cat([x[:1], x, x[:1]])[1:-1],
}


@every_plan
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bits_do_not_depend_on_how_the_inputs_lie_in_memory(plan: Plan, layout: Callable[[Tensor], Tensor]):
    base, sources = operands(37, 53)
    moved = run(plan, layout(base), [layout(x) for x in sources], torch.float32, chunk=100)
    assert torch.equal(moved, run(plan, base, sources, torch.float32))


@every_plan
def test_an_empty_tensor_is_merged_into_an_empty_tensor(plan: Plan):
    base, sources = operands(0, 4)
    assert run(plan, base, sources, torch.float32).shape == (0, 4)


def test_a_source_that_does_not_count_is_not_read():
    base, sources = operands(10)
    sources[2] = torch.full_like(sources[2], torch.nan)
    assert run(SUM, base, sources, torch.float32).isfinite().all()


# --- Random masks ---


def mask(start: int, size: int, key: tuple[int, int], density: float) -> Tensor:
    return random_mask(start, size, key, density, torch.empty(2, size, dtype=torch.int32)).clone()


@pytest.mark.parametrize("density", [0.001, 0.1, 1 / 3, 0.5, 0.8, 0.999])
def test_a_mask_keeps_its_share(density: float):
    size = 400_000
    for key in (KEYS[0], (0, 0), (0xFFFFFFFF, 0xFFFFFFFF)):
        sigma = (size * density * (1 - density)) ** 0.5
        assert mask(0, size, key, density).sum().item() == pytest.approx(size * density, abs=5 * sigma)


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (1e-12, 0), (1.0, 10_000)])
def test_a_mask_keeps_nothing_at_zero_and_all_at_one(density: float, kept: int):
    assert mask(0, 10_000, KEYS[0], density).sum() == kept


def test_the_mask_of_a_lower_density_lies_inside_that_of_a_higher_one():
    nested = [mask(0, 50_000, KEYS[0], p) for p in (0.0, 0.1, 0.4, 0.5, 0.50001, 0.9, 1.0)]
    assert all((higher | ~lower).all() for lower, higher in pairwise(nested))


@given(
    start=st.one_of(st.integers(0, 2**34), st.integers(2**32 - 40, 2**32), st.integers(2**31 - 40, 2**31)),
    size=st.integers(1, 60),
    key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    density=st.floats(0, 1),
)
@settings(deadline=None)
def test_a_mask_is_the_hash_of_each_index(start: int, size: int, key: tuple[int, int], density: float):
    expected = [oracle.hashed(i, key) < round(density * 2**32) for i in range(start, start + size)]
    assert mask(start, size, key, density).tolist() == expected


@pytest.mark.parametrize("start", [0, 2**31 - 500, 2**32 - 500, 3 * 2**32 - 1])
@pytest.mark.parametrize("chunk", [1, 7, 499, 500, 1000])
def test_a_mask_does_not_depend_on_where_chunks_begin(start: int, chunk: int):
    whole = mask(start, 1000, KEYS[1], 0.5)
    parts = [mask(start + s, min(chunk, 1000 - s), KEYS[1], 0.5) for s in range(0, 1000, chunk)]
    assert torch.equal(torch.cat(parts), whole)


def test_elements_four_billion_apart_have_masks_of_their_own():
    assert association(mask(0, 100_000, KEYS[0], 0.5), mask(2**32, 100_000, KEYS[0], 0.5)) < 25


def association(x: Tensor, y: Tensor) -> float:
    """Chi-square (one degree of freedom) of the 2x2 table of two masks: beyond 25 they are not independent."""
    n = x.numel()
    table = torch.bincount(2 * x.long() + y.long(), minlength=4).double().view(2, 2)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / n
    return float(((table - expected) ** 2 / expected).sum())


def test_masks_of_tensors_sources_and_seeds_are_independent():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    cells = list(product((0, 1, 2), names, ("math", "code")))
    masks = [mask(0, 20_000, mask_key(seed, name, source), 0.5) for seed, name, source in cells]
    found = [association(x, y) for i, x in enumerate(masks) for y in masks[:i]]
    assert max(found) < 25  # 5 sigma each
    assert abs(sum(found) - len(found)) < 5 * (2 * len(found)) ** 0.5  # and together


def test_a_mask_has_no_pattern_along_the_tensor():
    m = mask(0, 200_000, KEYS[2], 0.5)
    assert max(association(m[:-lag], m[lag:]) for lag in (1, 2, 3, 16, 64, 4096)) < 25


def test_keys_are_fixed_for_all_time():
    """A change here would change the bytes of every dare recipe ever published."""
    assert mask_key(0, "lm_head.weight", "math") == (1847551259, 1545918443)
    bits = "".join(str(int(kept)) for kept in mask(2**32 - 16, 32, (1, 2), 0.5))
    assert bits == "00110110011111010111111100011011"


@given(word=st.integers(0, 2**32 - 1))
def test_a_signed_word_has_the_same_bits(word: int):
    assert signed(word) % 2**32 == word
    assert -(2**31) <= signed(word) < 2**31


# --- Thresholds ---

DENSITIES = [1e-9, 0.001, 0.1, 0.25, 0.333, 0.5, 0.7, 0.9, 0.999]


def kth_largest(source: Tensor, base: Tensor, density: float) -> float:
    sizes = (source.float() - base.float()).abs().flatten().sort(descending=True).values
    return float(sizes[kept_count(density, sizes.numel()) - 1])


def spread(size: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    noise = torch.randn(size, generator=generator)
    match kind:
        case "few values":
            return (2 * noise).round() / 2
        case "mostly zero":
            return noise * (noise > 1.5)
        case "many magnitudes":
            return noise * 10 ** (8 * torch.randn(size, generator=generator))
        case "one bin":
            return 1 + 1e-4 * noise.abs()
    return noise


@pytest.mark.parametrize("kind", ["normal", "few values", "mostly zero", "many magnitudes", "one bin"])
@pytest.mark.parametrize("size", [2, 3, 100, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_threshold_is_the_kth_largest_magnitude(kind: str, size: int, dtype: torch.dtype):
    limit = torch.finfo(dtype).max
    source, base = spread(size, kind).clamp(-limit, limit).to(dtype), (0.1 * spread(size, "few values")).to(dtype)
    magnitudes = Magnitudes(source, base)
    assert [magnitudes.threshold(p) for p in DENSITIES] == [kth_largest(source, base, p) for p in DENSITIES]


def test_a_threshold_sees_past_the_first_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "CHUNK", 1000)
    source, base = spread(5003, "normal"), torch.zeros(5003)
    source[-1] = 100.0
    magnitudes = Magnitudes(source, base)
    assert [magnitudes.threshold(p) for p in DENSITIES] == [kth_largest(source, base, p) for p in DENSITIES]


@pytest.mark.parametrize("density", [1.0, 0.999])
def test_a_trim_that_keeps_all_has_no_threshold(density: float):
    source = torch.tensor([[-3.0]])
    assert Magnitudes(source, torch.zeros(1, 1)).threshold(density) == 0.0


@given(density=st.floats(0, 1), elements=st.integers(1, 10**12))
def test_at_least_one_element_is_kept_and_at_most_all(density: float, elements: int):
    assert 1 <= kept_count(density, elements) <= elements


# --- Dot products ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gram_matrix_agrees_with_float64(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(61, 67, generator=generator).to(dtype) for _ in range(4)]
    rows = np.stack([t.double().numpy().ravel() for t in tensors])
    gram = gram_matrix(tensors)
    assert gram == pytest.approx(rows @ rows.T, rel=1e-12, abs=1e-10)
    assert np.array_equal(gram, gram.T)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(0, 40))
def test_a_dot_product_adds_up_in_one_fixed_order(data: st.DataObject, size: int):
    numbers = st.lists(st.floats(-1e6, 1e6, width=32), min_size=size, max_size=size)
    x, y = data.draw(numbers), data.draw(numbers)
    products = [a * b for a, b in zip(x, y, strict=True)]
    while len(products) > 1:
        half, odd = divmod(len(products), 2)
        products = [a + b for a, b in zip(products[:half], products[half + odd :], strict=True)] + products[half:][:odd]
    assert dot(torch.tensor(x), torch.tensor(y)) == (products[0] if products else 0.0)


def test_a_dot_product_does_not_depend_on_threads_or_layout():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(1031, 1021, generator=generator), torch.randn(1031, 1021, generator=generator)  # > one chunk
    with threads(1):
        alone = dot(x, y)
    with threads(2):
        assert dot(x, y) == alone
    assert dot(x.T.contiguous().T, y) == alone
    assert alone == pytest.approx(float((x.double() * y.double()).sum()), rel=1e-9)
