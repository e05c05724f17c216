"""Same bits everywhere: not chunks, threads nor memory layout may show, and masks and thresholds are what they say."""

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge.kernels import compiled as compile_module
from evomerge.merge.kernels.compiled import Compiled, Variant
from evomerge.merge.kernels.compiler import FileCache
from evomerge.merge.kernels.derived import threads
from evomerge.merge.kernels.elementwise import SparseForm, signed_word
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.piecewise import piece_size
from evomerge.merge.kernels.random_masks import mask_key, mask_keys, random_mask
from evomerge.merge.measure import sums
from evomerge.merge.measure.gram import gram_matrix
from evomerge.merge.measure.magnitudes import Magnitudes
from evomerge.merge.measure.measurements import no_levels
from evomerge.merge.methods.density import chance, kept_count
from evomerge.merge.methods.plan import Blend, Chance, Clip, Plan, SliceBlend, SparseBlend

WEIGHTS = (0.3, -0.7, 1.1)
CHANCES = tuple(map(chance, (0.5, 0.2, 0.9)))
RANKED = (Chance(1 << 30, 1 << 22), Chance(1 << 28, 1 << 23), Chance(1, 0x00FFFFFF))
PLANS: dict[str, Plan] = {
    "sum": Blend((0.3, -0.7, 0.0), base=1.4),
    "arithmetic": Blend(WEIGHTS, of_task_vectors=True),
    "clip": Clip(0.4),
    "all": SparseBlend(WEIGHTS, elect="weighted", normalize=True),
    "trim": SparseBlend(WEIGHTS, "magnitude", floors=(0.3, 0.9, 0.0), elect="weighted", normalize=True, scale=1.3),
    "band": SparseBlend(WEIGHTS, "band", floors=(0.3, 0.1, 0.0), ceilings=(1.0, 2.0, float("inf"))),
    "drop": SparseBlend(WEIGHTS, "random", gains=(2.0, 5.0, 1.1), chances=CHANCES, scale=0.9),
    "drop and elect": SparseBlend(WEIGHTS, "random", gains=(2.0, 5.0, 1.1), chances=CHANCES, elect="weighted"),
    "rank": SparseBlend(WEIGHTS, "rank", chances=RANKED, elect="weighted", normalize=True),
    "variance": SparseBlend((0.2, 0.3, 0.5), "variance", floors=(0.7,) * 3, elect="plain", normalize=True),
    "alone": SparseBlend((1.0,) * 3, "magnitude", floors=(1.2,) * 3, alone=(1.1, 1.2, 1.3), normalize=True),
    "importance": SparseBlend((1.0,), "importance", floors=(0.5,)),
}
KEYS = mask_keys(0, "tensor", "abc")

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
output_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def operands(*shape: int) -> tuple[Tensor, list[Tensor]]:
    """A base and three sources, of three types."""
    generator = torch.Generator().manual_seed(3)
    base, *sources = (torch.randn(shape, generator=generator) for _ in range(4))
    return base.bfloat16(), [sources[0], sources[1].bfloat16(), sources[2].half()]


def run(
    plan: Plan,
    base: Tensor,
    sources: Sequence[Tensor],
    dtype: torch.dtype,
    piece: int | None = None,
    compiled: Compiled | None = None,
) -> Tensor:
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    planes: list[Tensor] = []
    if isinstance(plan, SparseBlend) and plan.keep == "rank":
        planes = [torch.arange(base.numel()).remainder(256).to(torch.uint8).view(base.shape)] * 3
    if isinstance(plan, SparseBlend) and plan.keep == "importance":
        planes = [
            torch.linspace(0.0, 2.0, max(1, base.shape[0]) if base.ndim > 1 else 1).view(-1, *[1] * (base.ndim - 1))
        ]
    if isinstance(plan, Clip) or (isinstance(plan, SparseBlend) and plan.keep == "importance"):
        sources = sources[:1]
    largest = execute(plan, out, Operands(base, sources, [x.to(base.device) for x in planes], KEYS), compiled, piece)
    assert torch.equal(largest.cpu(), out.float().abs().amax().cpu() if out.numel() else torch.zeros(()))
    return out


# --- The kernels ---


@every_plan
@output_types
@pytest.mark.parametrize("piece", [1, 7, 33, 128, 502, 503, 4097])
def test_bits_do_not_depend_on_the_pieces(plan: Plan, dtype: torch.dtype, piece: int):
    base, sources = operands(503)
    assert torch.equal(run(plan, base, sources, dtype, piece), run(plan, base, sources, dtype))


@every_plan
@output_types
def test_bits_do_not_depend_on_the_threads(plan: Plan, dtype: torch.dtype):
    base, sources = operands(150_001)  # in one piece, so that torch does split it
    with threads(1):
        alone = run(plan, base, sources, dtype, piece=1 << 20)
    with threads(2):
        together = run(plan, base, sources, dtype, piece=1 << 20)
        in_pieces = run(plan, base, sources, dtype)
    assert torch.equal(alone, together)
    assert torch.equal(alone, in_pieces)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "inside a larger tensor": lambda x: torch.cat([x[:1], x, x[:1]])[1:-1],
}


@every_plan
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bits_do_not_depend_on_how_the_inputs_lie_in_memory(plan: Plan, layout: Callable[[Tensor], Tensor]):
    base, sources = operands(37, 53)
    moved = run(plan, layout(base), [layout(x) for x in sources], torch.float32, piece=100)
    assert torch.equal(moved, run(plan, base, sources, torch.float32))


@every_plan
def test_an_empty_tensor_is_merged_into_an_empty_tensor(plan: Plan):
    base, sources = operands(0, 4)
    assert run(plan, base, sources, torch.float32).shape == (0, 4)


def test_a_source_that_does_not_count_is_not_read():
    base, sources = operands(10)
    sources[2] = torch.full_like(sources[2], torch.nan)
    assert run(PLANS["sum"], base, sources, torch.float32).isfinite().all()


@pytest.mark.parametrize("name", [n for n, plan in PLANS.items() if isinstance(plan, SparseBlend)])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_mask_does_not_hide_a_broken_source(name: str, broken: float):
    base, sources = operands(2, 50)
    sources[0] = torch.full_like(sources[0], broken)
    out = torch.empty(2, 50)
    plan = PLANS[name]
    assert isinstance(plan, SparseBlend)
    count = len(plan.weights)
    planes = {"rank": [torch.zeros(2, 50, dtype=torch.uint8)] * 3, "importance": [torch.ones(2, 1)]}.get(plan.keep, [])
    assert not execute(plan, out, Operands(base, sources[:count], planes, KEYS)).isfinite()


def test_slices_have_coefficients_of_their_own():
    base, sources = operands(5, 7, 3)
    coefficients = np.linspace(-1, 1, 15).reshape(3, 5)
    out = run(SliceBlend(coefficients, None, axis=0, of_task_vectors=True), base, sources, torch.float32, piece=40)
    for row in range(5):
        plan = Blend(tuple(coefficients[:, row]), of_task_vectors=True)
        assert torch.equal(out[row], run(plan, base[row], [x[row] for x in sources], torch.float32))
    columns = np.linspace(-1, 1, 9).reshape(3, 3)
    out = run(SliceBlend(columns, np.linspace(0, 1, 3), axis=-1), base, sources, torch.float32)
    for column in range(3):
        plan = Blend(tuple(columns[:, column]), base=float(np.linspace(0, 1, 3)[column]) or 1e-45)
        part = run(plan, base[..., column], [x[..., column] for x in sources], torch.float32)
        assert torch.allclose(out[..., column], part, rtol=0, atol=1e-30)


# --- Compiled ---


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Kept with the tests' other things, because a compilation takes ten seconds."""
    lines: list[str] = []
    found = Compiled(Path(__file__).resolve().parent.parent / ".cache" / "kernels", lines.append)
    flat = torch.zeros(2).bfloat16()
    found.kernel(Variant.of(flat, flat, [flat] * 3))
    if found.reasons:
        pytest.skip(f"nothing can be compiled here: {lines}")
    return found


FUSED = [
    "sum",
    "arithmetic",
    "all",
    "trim",
    "band",
    "drop",
    "drop and elect",
    "rank",
    "variance",
    "alone",
    "importance",
]
COMPILED_BY_DEFAULT = ["arithmetic", "rank", "drop"]  # each costs ten seconds where it was never compiled before


def fused_name(name: str) -> object:
    return pytest.param(name, marks=() if name in COMPILED_BY_DEFAULT else pytest.mark.slow)


@pytest.mark.parametrize("name", [fused_name(n) for n in FUSED])
@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 5000), spread=st.sampled_from([0.0, 10.0]))
def test_compiled_kernels_give_the_same_bits(compiled: Compiled, name: str, size: int, spread: float):
    rng = np.random.default_rng(size)

    def tensor() -> Tensor:
        noise = rng.normal(size=size) * 10 ** (spread * rng.normal(size=size))
        return torch.tensor(noise.clip(-1e30, 1e30)).bfloat16()

    base, sources = tensor(), [tensor() for _ in range(3)]
    eager = run(PLANS[name], base, sources, torch.bfloat16)
    with threads(2):
        assert torch.equal(run(PLANS[name], base, sources, torch.bfloat16, compiled=compiled), eager)
    assert torch.equal(run(PLANS[name], base, sources, torch.bfloat16, compiled=compiled), eager)
    assert not compiled.reasons


@pytest.mark.parametrize("name", [fused_name(n) for n in FUSED])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_compiled_kernels_do_not_care_how_the_inputs_lie_in_memory(
    compiled: Compiled, name: str, layout: Callable[[Tensor], Tensor]
):
    base, sources = operands(37, 53)
    sources = [x.bfloat16() for x in sources]
    moved = run(PLANS[name], layout(base), [layout(x) for x in sources], torch.bfloat16, compiled=compiled)
    assert torch.equal(moved, run(PLANS[name], base, sources, torch.bfloat16))


def test_compiled_kernels_take_planes_that_are_one_number(compiled: Compiled):
    """A source that drops at random among others that drop by rank has levels that nobody looks at."""
    base, sources = operands(300, 500)
    sources = [x.bfloat16() for x in sources]
    ranks = torch.arange(base.numel()).remainder(256).to(torch.uint8).view(base.shape)
    plan = SparseBlend(WEIGHTS, "rank", chances=(*RANKED[:2], CHANCES[2]), elect="weighted", normalize=True)
    outs = [torch.empty_like(base) for _ in range(2)]
    for out, kernels in zip(outs, (compiled, None), strict=True):
        execute(plan, out, Operands(base, sources, [ranks, ranks, no_levels(base)], KEYS), kernels)
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", [fused_name(n) for n in FUSED])
def test_compiled_kernels_work_on_vectors(compiled: Compiled, name: str):
    base, sources = operands(100)
    run(PLANS[name], base, [x.bfloat16() for x in sources], torch.bfloat16, compiled=compiled)
    for variant in compiled.loaded:
        with ZipFile(compiled.files.folder / variant.file_name) as package:
            (code,) = (package.read(n) for n in package.namelist() if n.endswith(".kernel.cpp"))
        assert b"at::vec::Vectorized" in code, f"torch's compiler found the kernel of {variant} not worth vectors"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("fused", [False, True])
def test_an_accelerator_gives_the_same_bits(compiled: Compiled, name: str, fused: bool):
    base, sources = operands(5003)
    base, sources = base.float(), [x.float() for x in sources]
    there = run(
        PLANS[name], base.cuda(), [x.cuda() for x in sources], torch.bfloat16, compiled=compiled if fused else None
    )
    assert torch.equal(there.cpu(), run(PLANS[name], base, sources, torch.bfloat16))


def test_denormals_survive_compiled_kernels(compiled: Compiled):
    tiny = torch.full((100,), 1e-39).bfloat16()
    base, sources = torch.zeros(100).bfloat16(), [tiny, tiny, tiny]
    plan = PLANS["arithmetic"]
    out = run(plan, base, sources, torch.bfloat16, compiled=compiled)
    assert torch.equal(out, run(plan, base, sources, torch.bfloat16))
    assert out.count_nonzero() == 100


@pytest.mark.slow
def test_operands_of_several_types_are_widened_for_compiled_kernels(compiled: Compiled):
    base, sources = operands(777)
    plan = Blend((0.3, -0.7, 1.1), of_task_vectors=True)
    assert torch.equal(
        run(plan, base, sources, torch.float32, compiled=compiled), run(plan, base, sources, torch.float32)
    )


@pytest.mark.parametrize("form", [None, SparseForm("rank", "weighted", True, False)])
def test_a_variant_survives_the_way_to_the_compiling_process(form: SparseForm | None):
    variant = Variant(torch.bfloat16, torch.float32, torch.float16, 3, torch.uint8 if form else None, form)
    assert Variant.from_json(variant.to_json()) == variant


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    lines: list[str] = []
    compiled = Compiled(tmp_path, lines.append)
    flat = torch.zeros(2)
    assert compiled.kernel(Variant.of(flat, None, [flat])) is None
    assert "/nowhere/g++" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_everything_works_and_the_log_says_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compile_module, "compile_apart", fail)
    lines: list[str] = []
    compiled = Compiled(tmp_path, lines.append)
    base, sources = operands(100)
    for _ in range(2):
        out = run(PLANS["trim"], base, sources, torch.float32, compiled=compiled)
    assert torch.equal(out, run(PLANS["trim"], base, sources, torch.float32))
    assert len(lines) == 1
    assert "uncompiled" in lines[0]
    assert "no C++ compiler" in lines[0]


def test_a_variant_that_cannot_be_compiled_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried: list[int] = []

    def compile_apart(variant: Variant, _: Path) -> None:
        tried.append(variant.count)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compile_module, "compile_apart", compile_apart)
    flat = torch.zeros(100)
    compiled = Compiled(tmp_path, lambda _: None)
    for count in (1, 2, 1):
        assert compiled.kernel(Variant.of(flat, None, [flat] * count)) is None
    assert tried == [1, 2]


def test_each_compilation_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The compiler's default one is shared: of two compilations at once each may pack half of the other's files."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nfor file; do :; done\ntouch "$TORCHINDUCTOR_CACHE_DIR/x"\necho "$_" > "$file"\n')
    program.write_text('#!/bin/sh\nfor file; do :; done\necho "$TORCHINDUCTOR_CACHE_DIR" > "$file"\n')
    program.chmod(0o700)
    monkeypatch.setattr(compile_module.sys, "executable", str(program))
    variant = Variant.of(torch.zeros(1), None, [torch.zeros(1)])
    kept = FileCache(tmp_path / "cache" / "kernels", print)
    files = [kept.file(name, lambda file: compile_module.compile_apart(variant, file)) for name in "ab"]
    used = [Path(file.read_text().strip()) for file in files]
    assert used[0] != used[1]
    assert [folder.parent for folder in used] == [kept.folder] * 2
    assert not any(folder == Path() or folder.exists() for folder in used)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 48])
def test_no_piece_lies_on_both_sides_of_the_highest_index(count: int):
    """The upper word of an element's index is taken once for a piece."""
    with threads(count):
        assert 2**32 % piece_size(torch.device("cpu")) == 0


# --- Random masks ---

ONE = (KEYS[0], KEYS[1][0])


def mask(start: int, size: int, keys: tuple[int, int], density: float) -> Tensor:
    return random_mask(chance(density), start, size, keys).bool()


@pytest.mark.parametrize("density", [0.001, 0.1, 1 / 3, 0.5, 0.8, 0.999])
def test_a_mask_keeps_its_share(density: float):
    size = 400_000
    for keys in (ONE, (0, 0), (2**32 - 1, 2**64 - 1)):
        sigma = (size * density * (1 - density)) ** 0.5
        assert mask(0, size, keys, density).sum().item() == pytest.approx(size * density, abs=5 * sigma)


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (1e-12, 0), (1.0, 10_000)])
def test_a_mask_keeps_nothing_at_zero_and_all_at_one(density: float, kept: int):
    assert mask(0, 10_000, ONE, density).sum() == kept


def test_the_mask_of_a_lower_density_lies_inside_that_of_a_higher_one():
    nested = [mask(0, 50_000, ONE, p) for p in (0.0, 0.1, 0.4, 0.5, 0.50001, 0.9, 1.0)]
    assert all((higher | ~lower).all() for lower, higher in pairwise(nested))


@given(
    start=st.one_of(st.integers(0, 2**34).map(lambda n: n // 64 * 64), st.integers(2**31 - 40, 2**31)),
    size=st.integers(1, 60),
    keys=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    density=st.floats(0, 1),
)
@settings(deadline=None)
def test_a_mask_is_the_hash_of_each_index(start: int, size: int, keys: tuple[int, int], density: float):
    expected = [oracle.hashed(i, keys) < round(density * 2**32) for i in range(start, start + size)]
    assert mask(start, size, keys, density).tolist() == expected


def test_elements_four_billion_apart_have_masks_of_their_own():
    assert association(mask(0, 100_000, ONE, 0.5), mask(2**32, 100_000, ONE, 0.5)) < 25


def association(x: Tensor, y: Tensor) -> float:
    """Chi-square (one degree of freedom) of the 2x2 table of two masks: beyond 25 they are not independent."""
    n = x.numel()
    table = torch.bincount(2 * x.long() + y.long(), minlength=4).double().view(2, 2)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / n
    return float(((table - expected) ** 2 / expected).sum())


def key(seed: int, tensor: str, source: str) -> tuple[int, int]:
    return mask_key(seed, tensor), mask_key(seed, tensor, source)


def test_masks_of_tensors_sources_and_seeds_are_independent():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    cells = list(product((0, 1, 2), names, ("math", "code")))
    masks = [mask(0, 20_000, key(*cell), 0.5) for cell in cells]
    found = [association(x, y) for i, x in enumerate(masks) for y in masks[:i]]
    assert max(found) < 25  # 5 sigma each
    assert abs(sum(found) - len(found)) < 5 * (2 * len(found)) ** 0.5  # and together


def test_masks_of_many_sources_of_one_tensor_are_independent():
    """They share the hash of the index."""
    masks = [mask(0, 20_000, key(0, "tensor", f"source {i}"), 0.5) for i in range(40)]
    found = [association(x, y) for i, x in enumerate(masks) for y in masks[:i]]
    assert max(found) < 25
    assert abs(sum(found) - len(found)) < 5 * (2 * len(found)) ** 0.5


def test_a_mask_has_no_pattern_along_the_tensor():
    m = mask(0, 200_000, ONE, 0.5)
    assert max(association(m[:-lag], m[lag:]) for lag in (1, 2, 3, 16, 64, 4096)) < 25


def test_keys_are_fixed_for_all_time():
    """A change here would change the bytes of every dare recipe ever published."""
    assert key(0, "lm_head.weight", "math") == (8278897801609075770, 6639669156815791387)
    bits = "".join(str(int(kept)) for kept in mask(2**32, 32, (1, 2**33 + 2), 0.5))
    assert bits == "10100011001101000101100111100011"


@given(word=st.integers(0, 2**32 - 1))
def test_a_signed_word_has_the_same_bits(word: int):
    assert signed_word(word) % 2**32 == word
    assert -(2**31) <= signed_word(word) < 2**31


# --- Thresholds ---

DENSITIES = [1e-9, 0.001, 0.1, 0.25, 0.333, 0.5, 0.7, 0.9, 0.999]


def task_vector(source: Tensor, base: Tensor) -> Callable[[slice], Tensor]:
    return lambda part: (source[part].float() - base[part].float()).abs()


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
    sizes = task_vector(source, base)
    magnitudes = Magnitudes.of(base.numel(), sizes)
    assert [magnitudes.kth(kept_count(p, base.numel()), sizes) for p in DENSITIES] == [
        kth_largest(source, base, p) for p in DENSITIES
    ]


def test_a_threshold_sees_past_the_first_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "CHUNK", 1000)
    source, base = spread(5003, "normal"), torch.zeros(5003)
    source[-1] = 100.0
    sizes = task_vector(source, base)
    magnitudes = Magnitudes.of(base.numel(), sizes)
    assert [magnitudes.kth(kept_count(p, base.numel()), sizes) for p in DENSITIES] == [
        kth_largest(source, base, p) for p in DENSITIES
    ]


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


@pytest.mark.parametrize(("lanes", "segment"), [(1, 4), (3, 7), (8, 8), (1 << 15, 1 << 22)])
def test_a_gram_matrix_adds_up_lane_by_lane(monkeypatch: pytest.MonkeyPatch, lanes: int, segment: int):
    monkeypatch.setattr(sums, "LANES", lanes)
    monkeypatch.setattr(sums, "SEGMENT", segment)
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for begin in range(0, 30, segment):
        part = [float(v) ** 2 for v in x[begin : begin + segment].double()]
        added = [sum(part[lane::lanes]) for lane in range(min(lanes, len(part)))]
        while len(added) > 1:
            half, odd = divmod(len(added), 2)
            added = [a + b for a, b in zip(added[:half], added[half + odd :], strict=True)] + added[half:][:odd]
        expected += added[0]
    assert gram_matrix([x])[0, 0] == expected


def test_a_gram_matrix_does_not_depend_on_threads_or_layout():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(1031, 1021, generator=generator), torch.randn(1031, 1021, generator=generator)
    with threads(1):
        alone = gram_matrix([x, y])
    with threads(2):
        assert np.array_equal(gram_matrix([x, y]), alone)
    assert np.array_equal(gram_matrix([x.T.contiguous().T, y]), alone)
    assert alone[0, 1] == pytest.approx(float((x.double() * y.double()).sum()), rel=1e-9)
