"""What planners ask of tensors, against the obvious float64; and that random masks by rank keep what they promise."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merge.kernels import elementwise
from evomerge.merge.kernels.derived import threads
from evomerge.merge.kernels.random_masks import mask_keys, random_mask
from evomerge.merge.loose_tensors import measure_loose
from evomerge.merge.measure import sums
from evomerge.merge.measure.divergence import divergences
from evomerge.merge.measure.magnitudes import Magnitudes
from evomerge.merge.measure.measurements import Measurements
from evomerge.merge.measure.ranks import rank_levels
from evomerge.merge.methods.breadcrumbs import band
from evomerge.merge.methods.della import rank_chance
from evomerge.merge.methods.density import chance
from evomerge.merge.methods.plan import Chance, SparseBlend
from evomerge.merge.methods.rescale import EXPECTED, L1, NONE, gain

SHAPES: list[tuple[int, ...]] = [(), (1,), (257,), (31, 40), (5, 6, 7), (3, 2, 2, 5), (0,), (4, 0), (0, 0)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def measure(base: Tensor, *sources: Tensor, seed: int = 0) -> Measurements:
    return measure_loose(base, sources, mask_keys(seed, "tensor", [str(1 + k) for k in range(len(sources))]))


def tensors(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """A base and sources near it, a third of whose elements are the base's."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.1 * torch.randn(shape, generator=generator)
    found = [base]
    for _ in range(count):
        change = 0.01 * torch.randn(shape, generator=generator)
        found.append(base + change * (torch.rand(shape, generator=generator) > 1 / 3))
    return [x.to(dtype) for x in found]


def deltas(base: Tensor, sources: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.float() - base.float() for x in sources])


# --- Magnitudes ---

sizes_of = {
    "noise": lambda n, rng: rng.normal(size=n),
    "bfloat16": lambda n, rng: torch.tensor(rng.normal(size=n)).bfloat16().double().numpy(),
    "few values": lambda n, rng: rng.integers(-3, 4, size=n) / 7,
    "few odd ones": lambda n, rng: np.where(rng.random(n) < 0.002, rng.normal(size=n), rng.integers(-3, 4, size=n)),
    "zeros": lambda n, rng: np.zeros(n),
    "many orders": lambda n, rng: rng.normal(size=n) * 10.0 ** rng.integers(-44, 30, size=n),
    "one bin": lambda n, rng: 1 + rng.random(n) / 300,
}


@pytest.mark.parametrize("kind", sizes_of)
@pytest.mark.parametrize("n", [1, 2, 500, 40_000])
@pytest.mark.parametrize("chunk", [333, 1 << 17])
def test_the_kth_largest_is_the_kth_of_a_sort(kind: str, n: int, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sums, "CHUNK", chunk)
    values = torch.tensor(sizes_of[kind](n, np.random.default_rng(n)), dtype=torch.float32).abs()
    ordered = values.sort(descending=True).values
    found = Magnitudes.of(n, lambda part: values[part])
    for k in {1, 2, n // 3, n // 2, n - 1, n} - {0}:
        if k <= n:
            assert found.kth(k, lambda part: values[part]) == ordered[k - 1].item()
    assert found.zeros(lambda part: values[part]) == int((values == 0).sum())


@given(st.lists(st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, 2.0**-149, 2.0**-127, torch.inf]), min_size=1))
@settings(deadline=None)
@example([2.0**-149, 0.0])
def test_every_rank_of_any_list_is_that_of_a_sort(numbers: list[float]):
    values = torch.tensor(numbers, dtype=torch.float32)
    found = Magnitudes.of(len(values), lambda part: values[part])
    ranks = [found.kth(k + 1, lambda part: values[part]) for k in range(len(values))]
    assert ranks == values.sort(descending=True).values.tolist()
    assert found.zeros(lambda part: values[part]) == numbers.count(0.0)


def test_sizes_that_are_not_numbers_rank_first_whatever_their_sign():
    values = torch.tensor([1.0, torch.nan, -torch.nan, torch.inf])
    found = Magnitudes.of(4, lambda part: values[part])
    assert np.isnan(found.kth(1, lambda part: values[part]))
    assert found.kth(3, lambda part: values[part]) == torch.inf
    assert found.kth(4, lambda part: values[part]) == 1.0


# --- Sums, ranks, variances ---


@every_shape
@every_type
def test_levels_are_the_ranks_of_a_stable_sort(shape: tuple[int, ...], dtype: torch.dtype):
    base, source = tensors(shape, 1, dtype)
    levels = rank_levels(source, base)
    assert levels.shape == base.shape
    assert levels.dtype == torch.uint8
    if base.numel():
        assert torch.equal(levels, oracle.levels(base, source))


def test_a_row_of_any_length_has_levels():
    base, source = tensors((2, 70_000), 1)
    assert torch.equal(rank_levels(source, base), oracle.levels(base, source))


def test_levels_do_not_depend_on_how_many_rows_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch):
    base, source = tensors((37, 50), 1, torch.bfloat16)
    whole = rank_levels(source, base)
    monkeypatch.setattr(sums, "CHUNK", 120)
    assert torch.equal(rank_levels(source, base), whole)


@every_shape
@every_type
def test_measurements_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype):
    base, *sources = tensors(shape, 3, dtype)
    measured, d = measure(base, *sources), deltas(base, sources).double()
    n = max(1, base.numel())
    for i in range(3):
        assert measured.l1(i) == pytest.approx(float(d[i].abs().sum()))
        ranks = (rank_levels(sources[i], base).double() + 0.5) / 256
        assert measured.rank_weighted_l1(i) == pytest.approx(float((d[i].abs() * ranks).sum()))
        for p in (Chance(2**31), rank_chance(0.4, 0.3)):
            assert measured.mask is not None
            mask = measured.mask(i, p, slice(0, base.numel())).reshape(shape)
            assert measured.l1(i, p) == pytest.approx(float((d[i].abs() * mask).sum()))
    assert measured.mean_squares(0.0) == pytest.approx([float(x.square().sum()) / n for x in d])
    moved = d.abs() > np.float32(1e-3)
    alone = moved & (moved.sum(0) == 1)
    assert measured.changed(1e-3) == tuple(
        (int(a.sum()), int((m & ~a).sum())) for m, a in zip(moved, alone, strict=True)
    )


@every_shape
@pytest.mark.parametrize("share", [0.0, 0.001, 0.29, 0.5, 1.0])
def test_the_variance_floor_selects_its_share_of_the_elements_that_vary(shape: tuple[int, ...], share: float):
    base, *sources = tensors(shape, 3)
    measured = measure(base, *sources)
    d = deltas(base, sources).double()
    exact = (d - d.mean(0)).square().mean(0).flatten().sort(descending=True).values
    k = int(np.float32(int((exact > 1e-30).sum())) * np.float32(share))
    floor = measured.variance(share)
    if k == 0:
        assert floor is None
    else:
        assert floor == pytest.approx(float(exact[k - 1]), rel=1e-5)
        kept = elementwise.variance(list(d.float())) >= floor
        assert int(kept.sum()) == k
        assert measured.mean_squares(floor) == pytest.approx(
            (d.double() * kept).reshape(3, -1).square().mean(1).tolist(), rel=1e-6
        )


def test_one_source_varies_nowhere():
    base, source = tensors((100,), 1)
    assert measure(base, source).variance(0.9) is None


@every_shape
@every_type
def test_divergences_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype):
    base, source = tensors(shape, 1, dtype)
    found = divergences(source, base)
    assert found.shape == ((*shape[:-1], 1) if shape else ())
    if base.numel():
        p, q = source.double().softmax(-1) + 1e-8, base.double().softmax(-1) + 1e-8
        exact = (p * (p / q).log()).sum(-1)
        assert found.flatten().tolist() == pytest.approx(exact.flatten().tolist(), rel=1e-6, abs=1e-15)


def test_a_shift_of_a_whole_row_is_no_divergence():
    base = torch.linspace(-1, 1, 64).reshape(4, 16)
    found = divergences(base + 0.25, base)
    assert ((found >= 0) & (found < 1e-12)).all()
    assert measure(base, base + 0.25).importance() >= 0.0


@pytest.mark.parametrize("shape", [(1,), (2,), (257,), (31, 40), (5, 6, 7), ()], ids=str)
@every_type
def test_importance_is_median_and_quartiles_of_a_sort(shape: tuple[int, ...], dtype: torch.dtype):
    base, source = tensors(shape, 1, dtype)
    scores = ((source.float() - base.float()).abs() * divergences(source, base)).flatten().sort().values
    low, median, high = (scores[int(q * (len(scores) - 1))] for q in (0.25, 0.5, 0.75))
    assert measure(base, source).importance() == float(median + 1.5 * (high - low))


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.3, 0.3), (0.9, 0.5), (0.2, 0.0), (0.01, 0.999)])
def test_a_band_keeps_the_counts_of_breadcrumbs(density: float, gamma: float):
    base, source = torch.zeros(1000), torch.randperm(1000, generator=torch.Generator().manual_seed(1)) + 1.0
    low, high = band(density, gamma, measure(base, source), 0)
    kept = source[(source >= low) & (source <= high)].sort().values
    top = min(int(gamma * 1000), 1000 - int(density * 1000))
    assert kept.tolist() == list(range(1001 - top - int(density * 1000), 1001 - top))


def test_a_source_that_is_the_base_is_not_measured():
    base, source = tensors((8, 9), 1)
    measured = measure(base, base, source)
    assert measured.l1(0) == measured.rank_weighted_l1(0) == measured.magnitude(0, 3) == 0.0
    assert not measured.levels(0).any()
    assert measured.l1(1) > 0


def everything(measured: Measurements) -> list[object]:
    """One answer to each question, to compare."""
    return [
        [measured.l1(i) for i in range(3)],
        [measured.l1(i, rank_chance(0.4, 0.3)) for i in range(3)],
        [measured.rank_weighted_l1(i) for i in range(3)],
        [measured.magnitude(i, k) for i in range(3) for k in (1, 700, measured.elements)],
        [measured.variance(share) for share in (0.01, 0.5, 1.0)],
        measured.mean_squares(0.0),
        measured.mean_squares(1e-5),
        measured.importance(),
        measured.changed(1e-3),
        measured.gram.tolist(),
    ]


def test_nothing_depends_on_threads():
    found = tensors((300, 701), 3)
    with threads(1):
        alone = everything(measure(*found))
    with threads(2):
        assert everything(measure(*found)) == alone


def test_ranks_and_counts_do_not_depend_on_chunks_and_sums_hardly(monkeypatch: pytest.MonkeyPatch):
    found = tensors((30, 71), 3)
    before = everything(measure(*found))
    for chunk, lanes, segment in [(29, 64, 64), (100, 70, 500), (2129, 2130, 2131), (5000, 64, 200)]:
        monkeypatch.setattr(sums, "CHUNK", chunk)
        monkeypatch.setattr(sums, "LANES", lanes)
        monkeypatch.setattr(sums, "SEGMENT", segment)
        now = everything(measure(*found))
        assert now[3:5] == before[3:5]
        assert now[7:9] == before[7:9]
        for i in (0, 1, 2, 5, 6, 9):
            assert np.allclose(np.array(now[i], dtype=float), np.array(before[i], dtype=float), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 100])
def test_a_total_by_halving_counts_every_lane_once(size: int):
    lanes = 2.0 ** torch.arange(size).double() if size < 50 else torch.arange(size).double()
    assert sums.total(lanes.clone().repeat(2, 1)).tolist() == [lanes.sum().item()] * 2


# --- What is asked twice ---


def test_what_no_knob_changes_is_measured_once():
    measured = measure(*tensors((30, 40), 3))
    before = everything(measured)
    kept = dict(measured.cache)
    assert everything(measured) == before
    assert measured.cache.keys() == kept.keys()  # however many candidates ask, no more is held
    assert all(measured.cache[k] is kept[k] for k in kept)


# --- Random masks by rank ---

ROWS, COLUMNS = 300, 1024


def rank_mask(chance: Chance, levels: Tensor, seed: int = 0, tensor: str = "tensor", source: str = "one") -> Tensor:
    own, (key,) = mask_keys(seed, tensor, [source])
    return random_mask(chance, 0, levels.numel(), (own, key), levels.flatten() if chance.step else None)


@pytest.fixture(scope="module")
def levels() -> Tensor:
    base, source = tensors((ROWS, COLUMNS), 1)
    return rank_levels(source, base)


@given(density=st.floats(0, 1), epsilon=st.floats(0, 1))
@example(density=1.0, epsilon=1.0)
@example(density=0.5, epsilon=0.5)
@example(density=1e-9, epsilon=1.0)
@example(density=1 - 1e-9, epsilon=1.0)
@example(density=0.0, epsilon=0.5)
def test_chances_by_rank_lie_around_the_density_and_within_bounds(density: float, epsilon: float):
    found = rank_chance(density, epsilon)
    narrowed = min(epsilon, density, 1 - density)
    if found.step:
        assert found.low >= 1
        assert found.low + 255 * found.step < 2**32
        for level in (0, 100, 255):
            paper = density - narrowed + 2 * narrowed * (level + 0.5) / 256
            assert (found.low + level * found.step) / 2**32 == pytest.approx(paper, abs=1e-7)
    else:
        assert found == chance(density)
    assert (found.low + 127.5 * found.step) / 2**32 == pytest.approx(density, abs=2**-32)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.29), (0.5, 0.5), (0.9, 0.15), (0.02, 0.5)])
def test_every_level_is_kept_with_its_chance(density: float, epsilon: float, levels: Tensor):
    found = rank_chance(density, epsilon)
    mask = rank_mask(found, levels)
    kept = torch.zeros(256).scatter_add_(0, levels.flatten().long(), mask)
    total = torch.bincount(levels.flatten(), minlength=256).double()
    p = (found.low + found.step * torch.arange(256).double()) / 2**32
    deviations = (kept - total * p) / (total * p * (1 - p)).sqrt()
    assert deviations.abs().max() < 5
    assert deviations.square().sum() == pytest.approx(256, abs=5 * 512**0.5)
    assert mask.mean().item() == pytest.approx(density, abs=5 * (density * (1 - density) / mask.numel()) ** 0.5)


def test_at_equal_epsilon_the_mask_of_a_lower_density_lies_inside_that_of_a_higher_one(levels: Tensor):
    masks = [rank_mask(rank_chance(p, 0.15), levels) for p in (0.2, 0.4, 0.400001, 0.5, 0.8)]
    assert all((lower <= higher).all() for lower, higher in pairwise(masks))
    assert all(lower.sum() < higher.sum() for lower, higher in pairwise(masks) if lower is not masks[1])


def test_masks_at_the_ends_keep_nothing_and_all(levels: Tensor):
    assert not rank_mask(rank_chance(0.0, 0.15), levels).any()
    assert rank_mask(rank_chance(1.0, 0.15), levels).all()


@pytest.mark.parametrize("other", [{"source": "two"}, {"tensor": "another"}, {"seed": 1}], ids=str)
def test_masks_of_other_sources_tensors_and_seeds_are_independent(other: dict[str, object], levels: Tensor):
    same = torch.full_like(levels, 100)  # one chance for all, so that only the hash can tie two masks together
    found = rank_chance(0.4, 0.2)
    first, second = rank_mask(found, same), rank_mask(found, same, **other)  # type: ignore[arg-type]
    n = first.numel()
    table = [((first == a) & (second == b)).sum().item() for a in (0, 1) for b in (0, 1)]
    p, q = first.mean().item(), second.mean().item()
    expected = [n * x * y for x in (1 - p, p) for y in (1 - q, q)]
    chi_square = sum((t - e) ** 2 / e for t, e in zip(table, expected, strict=True))
    assert chi_square < 15  # one degree of freedom: beyond it by chance once in 10,000


def test_a_mask_is_the_same_in_pieces(levels: Tensor):
    found, flat = rank_chance(0.5, 0.2), levels.flatten()
    whole = rank_mask(found, levels)
    own, (key,) = mask_keys(0, "tensor", ["one"])
    parts = [(s, min(s + 1000, len(flat))) for s in range(0, len(flat), 1000)]
    pieces = [random_mask(found, a, b - a, (own, key), flat[a:b]) for a, b in parts]
    assert torch.equal(torch.cat(pieces), whole)


# --- Rescaling ---


@pytest.mark.parametrize("random", [Chance(2**30), rank_chance(0.4, 0.3), rank_chance(0.1, 0.1)], ids=str)
def test_the_expected_gain_keeps_the_mean_l1_norm_and_the_l1_gain_each_one(random: Chance):
    base, source = tensors((80, 90), 1)
    kept, whole = [], measure(base, source).l1(0)
    for seed in range(60):
        measured = measure(base, source, seed=seed)
        kept.append(measured.l1(0, random))
        assert gain(L1, measured, 0, random) * kept[-1] == pytest.approx(whole)
    expected = gain(EXPECTED, measure(base, source), 0, random)
    error = expected * float(np.std(kept)) / 60**0.5
    assert expected * float(np.mean(kept)) == pytest.approx(whole, abs=5 * error)


@pytest.mark.parametrize("how", [NONE, EXPECTED, L1])
@pytest.mark.parametrize("random", [Chance(0), Chance(2**32)], ids=str)
def test_what_is_kept_whole_or_not_at_all_is_not_rescaled(how: float, random: Chance):
    assert gain(how, measure(*tensors((9,), 1)), 0, random) == 1.0


def test_norms_of_nearly_nothing_are_not_divided_by():
    base = torch.zeros(50)
    measured = measure(base, torch.full((50,), 1e-9))
    assert gain(L1, measured, 0, chance(0.5)) == gain(EXPECTED, measured, 0, rank_chance(0.5, 0.2)) == 1.0


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_planes_match_the_tensors(size: int):
    assume(size > 0)
    base, source = tensors((size,), 1)
    measured = measure(base, source, base)
    plan = SparseBlend((1.0, 1.0), "rank", chances=(rank_chance(0.5, 0.2), Chance(2**31)))
    first, second = measured.planes(plan)
    assert torch.equal(first, oracle.levels(base, source))
    assert second.shape == base.shape
    (rows,) = measured.planes(SparseBlend((1.0,), "importance", floors=(0.0,)))
    assert torch.equal(rows, divergences(source, base))
