"""The contract of a merge method: every one in METHODS passes this suite, against the float64 oracle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from models import write_family
from torch import Tensor

from evomerge.device import TORCH_DTYPES
from evomerge.merge.bank import Bank, mask_keys
from evomerge.merge.execute import Keys, execute, random_mask
from evomerge.merge.kernels import variance
from evomerge.merge.materialise import materialise_tensor
from evomerge.merge.measure import Measurements
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.della import rank_chance
from evomerge.merge.methods.rescale import RESCALE
from evomerge.merge.plan import Chance, Knob, Knobs, Plan, SparseBlend, chance
from evomerge.merge.recipe import Model, Recipe, RecipeSource
from evomerge.merge.statistics import divergences
from evomerge.sources.anatomy import place
from evomerge.sources.open import open_models

DTYPES = list(TORCH_DTYPES.values())
every_method = pytest.mark.parametrize("name", METHODS)


# --- The package's road from tensors to a tensor, and the oracle's ---


@dataclass
class Loose:
    """A base and sources of one tensor, without a bank."""

    tensors: Sequence[Tensor]

    def base(self, name: str) -> Tensor:
        return self.tensors[0]

    def source(self, source: str, name: str) -> Tensor:
        return self.tensors[1 + int(source)]


def measurements(base: Tensor, sources: Sequence[Tensor]) -> Measurements:
    words = keys_of(len(sources))

    def mask(source: int, chance: Chance, part: slice) -> Tensor:
        levels = measured.levels(source).reshape(-1)[part] if chance.step else None
        return random_mask(chance, part.start, part.stop - part.start, (words[0], words[1][source]), levels)

    measured = Measurements(Loose([base, *sources]), "tensor", [str(i) for i in range(len(sources))], {}, mask)
    return measured


def merge(name: str, knobs: Knobs, base: Tensor, sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    measured = measurements(base, sources)
    plan = METHODS[name].plan(knobs, measured)
    out = torch.empty(base.shape, dtype=dtype)
    execute(plan, out, base, sources, measured.planes(plan), keys_of(len(sources)))
    return out


def keys_of(count: int) -> Keys:
    return mask_keys(0, "tensor", [f"source {i}" for i in range(count)])


def truth(
    name: str, knobs: Knobs, base: Tensor, sources: Sequence[Tensor], keys: Keys
) -> oracle.Merged | oracle.Elected:
    each, shared = knobs.each, knobs.shared
    match name:
        case "linear":
            return oracle.linear(sources, each["weight"], bool(shared["normalize"]))
        case "slerp":
            first, second = (base, sources[0]) if len(sources) == 1 else sources
            return oracle.slerp(first, second, shared["t"])
        case "task_arithmetic":
            return oracle.task_arithmetic(base, sources, each["weight"], shared["lambda"], bool(shared["normalize"]))
        case "ties":
            normalize = bool(shared["normalize"])
            return oracle.ties(base, sources, each["weight"], each["density"], shared["lambda"], normalize)
        case "dare_linear" | "dare_ties" | "della_linear" | "della":
            random = [chance(p) for p in each["density"]]
            if "epsilon" in each:
                random = [rank_chance(p, e) for p, e in zip(each["density"], each["epsilon"], strict=True)]
            levels = [oracle.levels(base, x) for x in sources]
            return oracle.drop_and_rescale(
                base,
                sources,
                [mask(c, (keys[0], key), ranks) for c, key, ranks in zip(random, keys[1], levels, strict=True)],
                [(c.low + c.step * ranks.double()) / 2**32 for c, ranks in zip(random, levels, strict=True)],
                each["weight"],
                shared["lambda"],
                normalize=bool(shared["normalize"]),
                rescale={number: choice for choice, number in RESCALE.choices.items()}[shared["rescale"]],
                elect=name in ("dare_ties", "della"),
            )
        case "breadcrumbs" | "breadcrumbs_ties":
            return oracle.breadcrumbs(
                base,
                sources,
                each["weight"],
                each["density"],
                each["gamma"],
                shared["lambda"],
                normalize=bool(shared["normalize"]),
                elect=name == "breadcrumbs_ties",
            )
        case "sce":
            return oracle.sce(
                base, sources, variance([x.float() - base.float() for x in sources]), shared["select_topk"]
            )
        case "arcee_fusion":
            return oracle.arcee_fusion(base, sources[0], divergences(sources[0], base))
        case "ram" | "ramplus_tl":
            return oracle.ram(base, sources, **shared)
    raise LookupError(f"the method {name} has no oracle")


def mask(chance: Chance, key: tuple[int, int], levels: Tensor) -> Tensor:
    found = random_mask(chance, 0, levels.numel(), key, levels.flatten() if chance.step else None)
    return found.bool().view(levels.shape)


# --- Tensors that hurt ---

PALETTE = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.25, 3.0, 1e30, -1e30, 1e-38, -2e-38, 1e-7, -65504.0]
HUGE = float(np.float32(1e30))
elements = st.sampled_from(PALETTE) | st.floats(-HUGE, HUGE, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)


@st.composite
def vectors(draw: st.DrawFn, size: int) -> Tensor:
    """(size,) float32: numbers from the palette, or noise whose elements differ by many orders of magnitude."""
    if draw(st.booleans()):
        return torch.tensor(draw(st.lists(elements, min_size=size, max_size=size)), dtype=torch.float32)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    spread = draw(st.sampled_from([0.0, 0.0, 3.0, 8.0]))
    return torch.tensor(rng.normal(size=size) * 10 ** (spread * rng.normal(size=size)), dtype=torch.float32)


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as a checkpoint of this type can hold it: finite."""
    limit = torch.finfo(dtype).max
    return tensor.clamp(-limit, limit).to(dtype)


def knob_values(knob: Knob) -> st.SearchStrategy[float]:
    """Weights are eighths, so that their float32 sum is exact and a divisor of nearly 0 cannot arise."""
    if knob.switch:
        return st.sampled_from([0.0, 1.0])
    if knob.choices:
        return st.sampled_from(list(knob.choices.values()))
    if knob.low == 0.0 and knob.high == 1.0:
        return st.sampled_from([0.0, 1.0, 0.5, 0.1]) | st.floats(0.01, 1.0)
    if knob.low == 0.0:
        return st.sampled_from([0.0, 1e-5, 1e-3, 0.2, 1.0])
    return st.integers(-12, 16).map(lambda n: n / 8)


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[Knobs, Tensor, list[Tensor]]:
    method = METHODS[name]
    least, most = method.sources
    count = draw(st.integers(least, most or 4))
    size = draw(st.sampled_from([1, 2, 3, 7, 16, 33, 60]))
    base = stored(draw(vectors(size)), draw(st.sampled_from(DTYPES)))
    sources = []
    for _ in range(count):
        kind = draw(st.sampled_from(["free", "near", "same", "opposite"]))
        tensor = base.float() if kind == "same" else draw(vectors(size))
        if kind == "near":
            tensor = base.float() + 1e-3 * tensor
        if kind == "opposite" and sources:
            tensor = 2 * base.float() - sources[-1].float()  # the task vector of the last, turned round
        sources.append(stored(tensor, draw(st.sampled_from(DTYPES))))
    each = {k: tuple(draw(knob_values(v)) for _ in range(count)) for k, v in method.knobs.items() if v.each}
    shared = {k: draw(knob_values(v)) for k, v in method.knobs.items() if not v.each}
    return Knobs(each, shared), base, sources


# --- The contract ---


@every_method
@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_float32_arithmetic_rounded_once_agrees_with_the_paper(name: str, data: st.DataObject, dtype: torch.dtype):
    knobs, base, sources = data.draw(cases(name))
    if name == "slerp":
        first, second = [base, *sources][-2:]
        both = first.any() and second.any()
        assume(not both or abs(abs(oracle.cosine_of(first, second)) - 0.9995) > 1e-9)  # the step from arc to chord
    out = merge(name, knobs, base, sources, dtype)
    allowed = truth(name, knobs, base, sources, keys_of(len(sources))).allows(out)
    assert allowed.all(), f"{out[~allowed]} at {(~allowed).nonzero().flatten().tolist()}"


def usual(name: str, count: int, **given: float) -> Knobs:
    """A method's own defaults; what has none is 1 / count."""
    knobs = METHODS[name].knobs
    value = {k: given.get(k, 1 / count if v.default is None else v.default) for k, v in knobs.items()}
    each = {k: (value[k],) * count for k, v in knobs.items() if v.each}
    return Knobs(each, {k: value[k] for k, v in knobs.items() if not v.each})


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_equal_models_gives_that_model(name: str, dtype: torch.dtype):
    base = torch.linspace(-3, 3, 101).to(dtype)
    count = min(2, METHODS[name].sources[1] or 2)
    out = merge(name, usual(name, count), base, [base] * count, dtype)
    assert torch.allclose(out.float(), base.float(), rtol=2 * oracle.UNIT, atol=0.0)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "arcee_fusion"])  # it never takes a source whole
def test_one_source_at_full_weight_is_that_source(name: str):
    base, source = torch.linspace(-3, 3, 101), torch.linspace(4, -2, 101).cos()
    out = merge(name, usual(name, 1, t=1.0, weight=1.0), base, [source], torch.float32)
    assert torch.allclose(out, source, rtol=0.0, atol=8 * oracle.UNIT)


@every_method
def test_inputs_are_left_as_they_were(name: str):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, generator=generator) for _ in range(3)]
    copies = [t.clone() for t in tensors]
    count = min(2, METHODS[name].sources[1] or 2)
    merge(name, usual(name, count, density=0.5, t=0.3), tensors[0], tensors[1 : 1 + count], torch.float32)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@every_method
def test_a_plan_is_made_of_numbers_and_is_the_same_twice(name: str):
    tensors = [torch.linspace(-3, 3, 101), torch.linspace(4, -2, 101).cos(), torch.linspace(0, 9, 101).sin()]
    count = METHODS[name].sources[1] or 2
    knobs = usual(name, count)
    first, second = (METHODS[name].plan(knobs, measurements(tensors[0], tensors[1 : 1 + count])) for _ in range(2))
    assert isinstance(first, get_args(Plan))
    assert repr(first) == repr(second)
    assert METHODS[name].name == name


@every_method
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_a_model_on_disk_agrees_with_the_paper(name: str, dtype: str, tmp_path: Path):
    folders = write_family(tmp_path, dtype=torch.bfloat16, shards=2)
    sources = {s: folders[s] for s in ("one", "two")[: METHODS[name].sources[1]]}
    bank = Bank(open_models(folders["base"], sources))
    knobs = METHODS[name].knobs
    wanted = {"weight": 0.75, "density": 0.4, "t": 0.3, "lambda": 1.25, "select_topk": 0.5}
    recipe = Recipe(
        method=name,
        dtype=dtype,
        seed=5,
        base=Model(path=str(folders["base"])),
        sources=[RecipeSource(name=s, path=str(folder)) for s, folder in sources.items()],
        parameters={k: wanted[k] for k in knobs if k in wanted},
    )
    for tensor in bank.names:
        base = bank.base(tensor)
        out = torch.empty(base.shape, dtype=TORCH_DTYPES[dtype])
        materialise_tensor(recipe, bank, tensor, out)
        keys = mask_keys(5, tensor, list(sources))
        expected = truth(
            name, recipe.knobs(place(tensor), bank.layers), base, [bank.source(s, tensor) for s in sources], keys
        )
        assert expected.allows(out).all(), tensor
        if name != "arcee_fusion" or base.ndim > 1:  # a vector of 16 may hold nothing important
            assert not torch.equal(out, base.to(out.dtype)), tensor


# --- What single methods promise ---


def knobs_of(weights: Sequence[float], density: float = 1.0, **shared: float) -> Knobs:
    return Knobs({"weight": tuple(weights), "density": (density,) * len(weights)}, {"lambda": 1.0, **shared})


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_an_undecided_element_elects_plus(name: str):
    base = torch.zeros(3)
    sources = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-1.0, 2.0, 0.0])]
    out = merge(name, knobs_of([0.5, 0.5], normalize=1.0, rescale=1.0), base, sources, torch.float32)
    assert out.tolist() == [1.0, 2.0, 0.0]


def test_ties_elects_the_sign_of_the_weighted_sum_not_of_the_majority():
    sources = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([-3.0])]
    out = merge("ties", knobs_of([0.5, 0.5, 0.5], normalize=0.0), torch.zeros(1), sources, torch.float32)
    assert out.item() == -1.5


def test_ties_divides_by_the_weights_that_agree():
    sources = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, -0.5])]
    out = merge("ties", knobs_of([0.25, 0.5], normalize=1.0), torch.zeros(2), sources, torch.float32)
    assert out.tolist() == pytest.approx([1.75 / 0.75, 1.0])


def test_ties_keeps_all_elements_as_large_as_the_last_one_kept():
    source = torch.tensor([0.5, -2.0, 2.0, 2.0, 0.1])
    out = merge("ties", knobs_of([1.0], density=0.4, normalize=0.0), torch.zeros(5), [source], torch.float32)
    assert out.tolist() == [0.0, -2.0, 2.0, 2.0, 0.0]


def test_ties_keeps_the_largest_element_even_at_density_zero():
    source = torch.tensor([0.5, -2.0, 1.0])
    out = merge("ties", knobs_of([1.0], density=0.0, normalize=0.0), torch.zeros(3), [source], torch.float32)
    assert out.tolist() == [0.0, -2.0, 0.0]


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_at_density_zero_is_the_base(name: str):
    base, source = torch.linspace(-1, 1, 9), torch.ones(9)
    out = merge(name, knobs_of([1.0], density=0.0, normalize=0.0, rescale=1.0), base, [source], torch.float32)
    assert torch.equal(out, base)


def test_dare_keeps_the_expected_change():
    base, source = torch.zeros(200_000), torch.ones(200_000)
    out = merge("dare_linear", knobs_of([1.0], density=0.3, normalize=0.0, rescale=1.0), base, [source], torch.float32)
    sigma = (0.7 / 0.3 / 200_000) ** 0.5
    assert out.mean().item() == pytest.approx(1.0, abs=5 * sigma)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.3])


def test_task_arithmetic_takes_a_skill_away():
    base, source = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0])
    knobs = Knobs({"weight": (-1.0,)}, {"lambda": 1.0, "normalize": 0.0})
    assert merge("task_arithmetic", knobs, base, [source], torch.float32).tolist() == [0.5, 3.0]


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "dare_linear"])
def test_weights_that_cancel_are_not_divided_by(name: str):
    base, sources = torch.zeros(2), [torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])]
    out = merge(name, knobs_of([1.0, -1.0], normalize=1.0, rescale=1.0), base, sources, torch.float32)
    assert out.tolist() == [2.0, 0.0]


@given(t=st.floats(0, 1))
@example(t=0.0)
@example(t=1.0)
def test_slerp_between_vectors_of_one_length_keeps_the_length(t: float):
    first, second = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, -5.0, 0.0])
    out = merge("slerp", Knobs({}, {"t": t}), torch.zeros(3), [first, second], torch.float32)
    assert torch.linalg.vector_norm(out).item() == pytest.approx(5.0, rel=1e-6)


def test_slerp_starts_at_the_base_when_there_is_one_source():
    base, source = torch.tensor([1.0, 2.0]), torch.tensor([-2.0, 1.0])
    assert torch.equal(merge("slerp", Knobs({}, {"t": 0.0}), base, [source], torch.float32), base)
    assert torch.equal(merge("slerp", Knobs({}, {"t": 1.0}), base, [source], torch.float32), source)


@pytest.mark.parametrize("second", [[0.0, 0.0], [2.0, 4.0], [-1.0, -2.0]], ids=["zero", "parallel", "antiparallel"])
def test_slerp_without_an_arc_takes_the_straight_line(second: list[float]):
    base = torch.tensor([1.0, 2.0])
    out = merge("slerp", Knobs({}, {"t": 0.25}), base, [torch.tensor(second)], torch.float32)
    assert out.tolist() == pytest.approx([0.75 + 0.25 * second[0], 1.5 + 0.25 * second[1]])


# --- The sparse methods ---


def shared_knobs(**shared: float) -> Knobs:
    return Knobs({}, shared)


def test_ram_adds_what_one_source_changed_and_averages_what_several_did():
    base = torch.ones(4)
    sources = [
        torch.tensor([2.0, 3.0, 1.0, 1.0]),
        torch.tensor([1.0, 5.0, 1.0, 0.5]),
        torch.tensor([1.0, 2.0, 1.0, 1.0]),
    ]
    out = merge("ram", shared_knobs(epsilon=1e-5), base, sources, torch.float32)
    assert out.tolist() == pytest.approx([2.0, 1 + 7 / 3, 1.0, 0.5])


def test_ram_counts_only_what_changed_by_more_than_epsilon():
    sources = [torch.tensor([0.25, 0.5]), torch.tensor([1.0, 1.0])]
    out = merge("ram", shared_knobs(epsilon=0.25), torch.zeros(2), sources, torch.float32)
    assert out.tolist() == [1.0, 0.75]


def test_ramplus_tl_amplifies_what_was_changed_alone_by_how_much_was_shared():
    sources = [torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 3.0, 3.0, 2.0])]
    out = merge("ramplus_tl", shared_knobs(epsilon=0.0, r=0.5, alpha=1.5), torch.zeros(4), sources, torch.float32)
    assert out.tolist() == [1 + 0.5 * 1.5, 2.0, 2.0, 2 * (1 + 0.5 * 1.5)]


def test_sce_weighs_by_energy_and_erases_the_minority():
    sources = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, -2.0, 2.0])]
    out = merge("sce", shared_knobs(select_topk=1.0), torch.zeros(3), sources, torch.float32)
    first, second = 14 / 23, 9 / 23
    assert out.tolist() == pytest.approx([3 * first + second, -2.0, 2.0])


def test_sce_selects_where_the_sources_differ_most():
    sources = [torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 0.9, 2.0, 1.2])]
    out = merge("sce", shared_knobs(select_topk=0.4), torch.zeros(4), sources, torch.float32)
    assert out.tolist() == pytest.approx([3 * 0.9 + 0.1, 0.0, 0.0, 0.0])  # one of the three that vary


def test_sce_weighs_equally_what_hardly_moved():
    sources = [torch.tensor([4e-4, 2e-4]), torch.tensor([2e-4, 2e-4])]
    out = merge("sce", shared_knobs(select_topk=1.0), torch.zeros(2), sources, torch.float32)
    assert out.tolist() == pytest.approx([3e-4, 2e-4])


def test_one_source_varies_nowhere_so_sce_selects_nothing():
    base, source = torch.zeros(3), torch.ones(3)
    assert torch.equal(merge("sce", shared_knobs(select_topk=0.99), base, [source], torch.float32), base)
    assert torch.equal(merge("sce", shared_knobs(select_topk=1.0), base, [source], torch.float32), source)


def test_a_source_without_weight_still_has_its_vote_in_a_plain_election():
    base, out = torch.zeros(1), torch.empty(1)
    sources = [torch.tensor([1.0]), torch.tensor([-2.0])]
    execute(SparseBlend((1.0, 0.0), elect="plain", normalize=True), out, base, sources)
    assert out.item() == 0.0


def test_breadcrumbs_keeps_the_middle():
    source = torch.tensor([10.0, -9.0, 8.0, -7.0, 6.0, -5.0, 4.0, -3.0, 2.0, -1.0])
    knobs = Knobs({"weight": (1.0,), "density": (0.5,), "gamma": (0.2,)}, {"lambda": 1.0, "normalize": 0.0})
    out = merge("breadcrumbs", knobs, torch.zeros(10), [source], torch.float32)
    assert out.tolist() == [0.0, 0.0, 8.0, -7.0, 6.0, -5.0, 4.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(("density", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_della_at_the_ends_keeps_nothing_or_all(name: str, density: float, expected: float):
    base, source = torch.zeros(2, 9), torch.ones(2, 9)
    knobs = Knobs({"weight": (1.0,), "density": (density,), "epsilon": (0.15,)}, usual(name, 1).shared)
    assert torch.equal(merge(name, knobs, base, [source], torch.float32), expected * source)


def test_della_keeps_large_changes_sooner_than_small_ones():
    base, source = torch.zeros(400, 500), torch.linspace(0.1, 1, 500).repeat(400, 1)
    each = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.3,)}
    out = merge("della_linear", Knobs(each, usual("della_linear", 1).shared), base, [source], torch.float32)
    kept = (out != 0).float().mean(0)
    assert kept[:50].mean().item() == pytest.approx(0.23, abs=0.02)
    assert kept[-50:].mean().item() == pytest.approx(0.77, abs=0.02)
    assert out.sum().item() == pytest.approx(source.sum().item(), rel=0.02)


def test_arcee_fusion_takes_over_the_outliers_of_importance():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 100, generator=generator)
    source = base + 0.01 * torch.randn(8, 100, generator=generator)
    source[2, 5] += 1.0
    out = merge("arcee_fusion", Knobs(), base, [source], torch.float32)
    assert out[2, 5] == pytest.approx(source[2, 5].item())
    assert 0 < (out != base).float().mean().item() < 0.2


def drawn_tensors(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@every_method
@pytest.mark.parametrize("shape", [(), (1,), (5, 0), (3, 4, 5), (2, 3, 2, 2)], ids=str)
def test_tensors_of_any_shape_are_merged(name: str, shape: tuple[int, ...]):
    count = min(2, METHODS[name].sources[1] or 2)
    base, *sources = drawn_tensors(shape, 1 + count)
    knobs = usual(name, count, density=0.5, t=0.3, select_topk=0.5)
    out = merge(name, knobs, base, sources, torch.float32)
    assert out.shape == shape
    if out.numel():
        assert truth(name, knobs, base, sources, keys_of(count)).allows(out).all()
