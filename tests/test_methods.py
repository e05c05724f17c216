"""The contract of a merge method: every one in METHODS passes this suite, against the float64 oracle."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from models import write_family, write_statistics
from torch import Tensor

from evomerge.device import TORCH_DTYPES
from evomerge.merge.bank.bank import Bank
from evomerge.merge.kernels.derived import derive
from evomerge.merge.kernels.elementwise import variance
from evomerge.merge.kernels.execute import execute
from evomerge.merge.kernels.operands import Keys, Operands
from evomerge.merge.kernels.random_masks import mask_keys, random_mask
from evomerge.merge.loose_tensors import measure_loose
from evomerge.merge.materialise import materialise_tensor
from evomerge.merge.measure.divergence import divergences
from evomerge.merge.measure.measurements import Measurements
from evomerge.merge.measure.statistics_file import StatisticsFile
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.della import rank_chance
from evomerge.merge.methods.density import chance
from evomerge.merge.methods.knobs import Knob, Knobs
from evomerge.merge.methods.plan import Chance, Derived, Plan, SparseBlend
from evomerge.merge.methods.rescale import RESCALE
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.merge.tensor_plan import last_turn
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import tensor_role

DTYPES = list(TORCH_DTYPES.values())
every_method = pytest.mark.parametrize("name", METHODS)


# --- The package's road from tensors to a tensor, and the oracle's ---


def measurements(base: Tensor, sources: Sequence[Tensor]) -> Measurements:
    return measure_loose(base, sources, keys_of(len(sources)))


def merge(name: str, knobs: Knobs, base: Tensor, sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    measured = measurements(base, sources)
    out = torch.empty(base.shape, dtype=dtype)
    if METHODS[name].in_turn:
        plan, operands = last_turn(METHODS[name], knobs, measured)
        execute(plan, out, operands)
        return out
    plan = METHODS[name].plan(knobs, measured)
    tensors = derive(plan, "tensor", base, sources) if isinstance(plan, Derived) else sources
    execute(plan, out, Operands(base, tensors, measured.planes(plan), keys_of(len(sources))))
    return out


def keys_of(count: int) -> Keys:
    return mask_keys(0, "tensor", [f"source {i}" for i in range(count)])


def truth(
    name: str,
    knobs: Knobs,
    base: Tensor,
    sources: Sequence[Tensor],
    keys: Keys,
    tensor: str = "tensor",
    statistics: Sequence[StatisticsFile] = (),
) -> oracle.Merged | oracle.Elected:
    each, shared = knobs.each, knobs.shared
    is_layer_matrix = base.ndim == 2 and tensor_role(tensor).component not in ("embedding", "head")
    match name:
        case "tsv" if is_layer_matrix:
            return oracle.tsv(base, sources, each["weight"], shared["lambda"])
        case "iso_c" if is_layer_matrix:
            return oracle.iso_c(base, sources, shared["lambda"])
        case "tsv" | "iso_c":
            weights = each.get("weight", (1.0,) * len(sources))
            return oracle.task_arithmetic(base, sources, weights, shared["lambda"] / len(sources), normalize=False)
        case "fisher" if statistics:
            scale = [
                g.size if shared["normalize"] else sum(h.size for h in statistics) / len(statistics) for g in statistics
            ]
            pairs = zip(statistics, each["weight"], scale, strict=True)
            return oracle.fisher(base, sources, [w * (g.read(tensor).double() / s).clamp(1e-6) for g, w, s in pairs])
        case "regmean" if statistics and statistics[0].covers(tensor):
            grams = [g.read(tensor) for g in statistics]
            return oracle.regmean(base, sources, grams, each["weight"], shared["alpha"])
        case "fisher" | "regmean":
            return oracle.task_arithmetic(base, sources, each["weight"], 1.0, normalize=True)
        case "linear":
            return oracle.linear(sources, each["weight"], bool(shared["normalize"]))
        case "uniform_soup":
            return oracle.linear(sources, [1.0] * len(sources), normalize=True)
        case "checkpoint_average":
            return oracle.checkpoint_average(sources, shared["decay"], bool(shared["linear"]))
        case "slerp":
            return oracle.slerp([base, *sources] if len(sources) == 1 else sources, shared["t"])
        case "nuslerp":
            flatten, row_wise = bool(shared["nuslerp_flatten"]), bool(shared["nuslerp_row_wise"])
            origin = base if shared["task_vectors"] else None
            return oracle.nuslerp(origin, sources, each["weight"], flatten, row_wise)
        case "multislerp":
            normalize, origin = bool(shared["normalize_weights"]), base if shared["task_vectors"] else None
            return oracle.multislerp(origin, sources, each["weight"], normalize, shared["eps"])
        case "karcher":
            return oracle.karcher(sources, int(shared["max_iter"]), max(shared["tol"], 1e-7))
        case "model_stock":
            return oracle.model_stock(base, sources, bool(shared["filter_wise"]))
        case "passthrough":
            return oracle.passthrough(sources[0], each["scale"][0])
        case "nearswap":
            return oracle.nearswap(base, sources, shared["t"])
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
            *earlier, last = sources
            for source in earlier:  # the exact bits decide what is important
                base = merge(name, Knobs(), base, [source], torch.float32)
            return oracle.arcee_fusion(base, last, divergences(last, base))
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
    if knob.high == 1.0:
        free = st.sampled_from([knob.low, 1.0, 0.5, 0.1]) | st.floats(0.01, 1.0)
    elif knob.low == 0.0:
        free = st.sampled_from([0.0, 1e-5, 1e-3]) | st.integers(1, 48).map(lambda n: n / 8)
    else:
        free = st.integers(-12, 16).map(lambda n: n / 8)
    return free if knob.default is None else st.just(knob.default) | free


SHAPES = [(1,), (2,), (3,), (7,), (16,), (33,), (60,), (4, 9), (7, 3), (1, 5), (3, 2, 5)]
SPECTRAL = ("tsv", "iso_c")  # singular vectors of degenerate matrices are not unique: test_data_methods.py has matrices


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[Knobs, Tensor, list[Tensor]]:
    method = METHODS[name]
    least, most = method.sources
    count = draw(st.integers(least, most or 4))
    shape = draw(st.sampled_from(SHAPES if name not in SPECTRAL else [x for x in SHAPES if len(x) != 2]))
    size = math.prod(shape)
    base = stored(draw(vectors(size)).view(shape), draw(st.sampled_from(DTYPES)))
    sources = []
    for _ in range(count):
        kind = draw(st.sampled_from(["free", "near", "same", "opposite"]))
        tensor = base.float() if kind == "same" else draw(vectors(size)).view(shape)
        if kind == "near":
            tensor = base.float() + 1e-3 * tensor
        if kind == "opposite" and sources:
            tensor = 2 * base.float() - sources[-1].float()  # the task vector of the last, turned round
        sources.append(stored(tensor, draw(st.sampled_from(DTYPES))))
    each = {k: tuple(draw(knob_values(v)) for _ in range(count)) for k, v in method.knobs.items() if v.each}
    shared = {k: draw(knob_values(v)) for k, v in method.knobs.items() if not v.each}
    return Knobs(each, shared, count), base, sources


# --- The contract ---


@every_method
@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_float32_arithmetic_rounded_once_agrees_with_the_paper(name: str, data: st.DataObject, dtype: torch.dtype):
    knobs, base, sources = data.draw(cases(name))
    if name == "slerp":
        models = [base, *sources] if len(sources) == 1 else sources
        for k, model in enumerate(models[1:], 1):
            before = oracle.slerp(models[:k], knobs.shared["t"])
            both = before.exact.any() and model.any()
            cosine = oracle.cosine_of(before.exact, model) if both else 0.0
            assume(abs(abs(cosine) - 0.9995) > 1e-9)  # the step from arc to chord
            assume(k == 1 or not cancels(before.exact, before.size))
    if name == "nuslerp":
        flatten, weights = bool(knobs.shared["nuslerp_flatten"]), knobs.each["weight"]
        origin = base.double() if knobs.shared["task_vectors"] else torch.zeros_like(base).double()
        axis = -1 if knobs.shared["nuslerp_row_wise"] else 0
        for k in range(1, len(sources)):
            before = oracle.nuslerp(origin, sources[:k], weights[:k], flatten, axis == -1)
            turns = [w / sum(weights[: k + 1]) for w in (sum(weights[:k]), weights[k]) if sum(weights[: k + 1])]
            parts = [before.exact - origin, before.size - origin.abs(), sources[k].double() - origin]
            whole = flatten or base.ndim < 2
            for found, size, model in [parts] if whole else zip(*(x.unbind(axis) for x in parts), strict=True):
                angle = np.arccos(np.clip(oracle.cosine_of(found, model), -1.0, 1.0))
                at_half_turn = [abs(t * angle) > 1.0 and abs(np.sin(t * angle)) < 1e-6 for t in turns]
                assume(not any(at_half_turn))  # rounding would decide the coefficient
                assume(k == 1 or not cancels(found, size))
    if name == "karcher":
        # Of n unit vectors some may be equal and the others cancel or be 0; then the mean's length is k / n for some k,
        # and rounding would decide.
        lengths = [k / n for n in range(1, len(sources) + 1) for k in range(1, n + 1)]
        assume(knobs.shared["tol"] < 1.0 and all(abs(knobs.shared["tol"] - x) > 1e-6 for x in lengths))
    out = merge(name, knobs, base, sources, dtype)
    allowed = truth(name, knobs, base, sources, keys_of(len(sources))).allows(out)
    assert allowed.all(), f"{out[~allowed]} at {(~allowed).nonzero().flatten().tolist()}"


def cancels(found: Tensor, size: Tensor) -> bool:
    """Whether so little is left of what was added up that rounding decides its direction.  size: absolute terms."""
    return 0 < torch.linalg.vector_norm(found) < 1e-4 * torch.linalg.vector_norm(size)


def test_lengths_that_cancel_are_as_sure_as_float64():
    """Two sources of the same huge length, one subtracted: what is left of the lengths has lost ten digits."""
    far, near = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e10], [1.0]])
    shared = usual("multislerp", 3, normalize_weights=0.0, task_vectors=0.0).shared
    knobs = Knobs({"weight": (0.625, 0.125, -0.625)}, shared, 3)
    out = merge("multislerp", knobs, far, [far, near, far], torch.float32)
    assert truth("multislerp", knobs, far, [far, near, far], keys_of(3)).allows(out).all()


def usual(name: str, count: int, **given: float) -> Knobs:
    """A method's own defaults; what has none is 1 / count.  count: how many sources."""
    knobs = METHODS[name].knobs
    value = {k: given.get(k, 1 / count if v.default is None else v.default) for k, v in knobs.items()}
    each = {k: (value[k],) * count for k, v in knobs.items() if v.each}
    return Knobs(each, {k: value[k] for k, v in knobs.items() if not v.each}, count)


def counts(name: str) -> list[int]:
    """The numbers of sources that a method is tried with: its least, two, its most or four."""
    least, most = METHODS[name].sources
    return sorted({least, min(max(2, least), most or 2), most or 4})


every_count = pytest.mark.parametrize(("name", "count"), [(name, n) for name in METHODS for n in counts(name)])


@every_count
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_equal_models_gives_that_model(name: str, count: int, dtype: torch.dtype):
    base = torch.linspace(-3, 3, 101).to(dtype)
    out = merge(name, usual(name, count), base, [base] * count, dtype)
    assert torch.allclose(out.float(), base.float(), rtol=2 * oracle.UNIT, atol=0.0)


# Not nuslerp and model_stock: they take two sources at least.  Not nearswap: at t = 1 it takes small changes only.
# Not arcee_fusion: it never takes a source whole.
@pytest.mark.parametrize("name", [n for n in METHODS if 1 in counts(n) and n not in ("nearswap", "arcee_fusion")])
def test_one_source_at_full_weight_is_that_source(name: str):
    base, source = torch.linspace(-3, 3, 101), torch.linspace(4, -2, 101).cos()
    out = merge(name, usual(name, 1, t=1.0, weight=1.0), base, [source], torch.float32)
    assert torch.allclose(out, source, rtol=0.0, atol=8 * oracle.UNIT)


weighted = [
    (name, n)
    for name, method in METHODS.items()
    if "weight" in method.knobs and method.keeps_parent
    for n in counts(name)
]


@pytest.mark.parametrize(("name", "count"), weighted)
@pytest.mark.parametrize("which", [0, -1])
def test_a_source_that_has_all_the_weight_is_the_result(name: str, count: int, which: int):
    base, *sources = torch.randn(1 + count, 101, generator=torch.Generator().manual_seed(0)).unbind()
    knobs = usual(name, count)
    weights = [0.0] * count
    weights[which] = 1.0
    out = merge(name, Knobs({**knobs.each, "weight": tuple(weights)}, knobs.shared), base, sources, torch.float32)
    assert torch.allclose(out, sources[which], rtol=0.0, atol=8 * oracle.UNIT)


NO_ANGLE = {
    "sources that are the base": lambda b, i: b,
    "zeros": lambda b, i: torch.zeros_like(b),
    "one change, longer and longer": lambda b, i: b + i * b.cos(),
    "changes that cancel": lambda b, i: b + (-1) ** i * b.cos(),
    "sources that are opposite": lambda b, i: (-1) ** i * b.cos(),
    "one of them the base": lambda b, i: b if i == 1 else b.cos() + i,
    "one of them zero": lambda b, i: torch.zeros_like(b) if i == 1 else b.cos() + i,
    "tiny changes": lambda b, i: b + 1e-7 * (i * b).cos(),
    "no length to speak of": lambda b, i: 1e-38 * (i * b).cos(),
}


@every_count
@pytest.mark.parametrize("case", NO_ANGLE)
@pytest.mark.parametrize("origin", [1.0, 0.0], ids=["base", "base of zeros"])
def test_tensors_without_an_angle_between_them_merge_to_numbers(name: str, count: int, case: str, origin: float):
    base = origin * torch.linspace(-3, 3, 60).view(6, 10)
    sources = [NO_ANGLE[case](base, i) for i in range(1, 1 + count)]
    switches = [k for k, v in METHODS[name].knobs.items() if v.switch]
    for values in itertools.product([0.0, 1.0], repeat=len(switches)):
        knobs = usual(name, count, t=0.25, **dict(zip(switches, values, strict=True)))
        out = merge(name, knobs, base, sources, torch.float32)
        largest = max(t.abs().max().item() for t in (base, *sources))
        assert out.abs().max().item() <= 4 * count * largest, switches


@every_count
def test_inputs_are_left_as_they_were(name: str, count: int):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, generator=generator) for _ in range(1 + count)]
    copies = [t.clone() for t in tensors]
    merge(name, usual(name, count, density=0.5, t=0.3), tensors[0], tensors[1:], torch.float32)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@every_count
def test_a_plan_is_made_of_numbers_and_is_the_same_twice(name: str, count: int):
    base, *sources = (torch.linspace(-3, i, 101).cos() for i in range(1 + count))
    knobs = usual(name, count)
    first, second = (METHODS[name].plan(knobs, measurements(base, sources)) for _ in range(2))
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
    wanted = {"weight": 0.75, "density": 0.4, "t": 0.3, "lambda": 1.25, "decay": 0.6, "select_topk": 0.5}
    statistics = {}
    if kind := METHODS[name].statistics:
        for seed, (s, folder) in enumerate(sources.items()):
            statistics[s] = str(write_statistics(tmp_path / f"{s}.{kind}", kind, folder, seed=seed))
    recipe = Recipe(
        method=name,
        dtype=dtype,
        seed=5,
        base=Model(path=str(folders["base"])),
        sources=[RecipeSource(name=s, path=str(folder), statistics=statistics.get(s)) for s, folder in sources.items()],
        parameters={k: wanted[k] for k in knobs if k in wanted},
    )
    for tensor in bank.names:
        base = bank.base(tensor)
        out = torch.empty(base.shape, dtype=TORCH_DTYPES[dtype])
        materialise_tensor(recipe, bank, tensor, out)
        keys = mask_keys(5, tensor, list(sources))
        expected = truth(
            name,
            recipe.knobs(tensor_role(tensor), bank.layers),
            base,
            [bank.source(s, tensor) for s in sources],
            keys,
            tensor,
            bank.statistics(recipe),
        )
        assert expected.allows(out).all(), tensor
        if name != "arcee_fusion" or base.ndim > 1:  # a vector of 16 may hold nothing important
            assert not torch.equal(out, base.to(out.dtype)), tensor


# --- What single methods promise ---


def knobs_of(weights: Sequence[float], density: float = 1.0, **shared: float) -> Knobs:
    return Knobs({"weight": tuple(weights), "density": (density,) * len(weights)}, {"lambda": 1.0, **shared})


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [7 / 3, 7 / 3]),
        ({"decay": 0.5}, [(1 / 4 + 2 / 2 + 4) / 1.75, (4 / 4 + 2 / 2 + 1) / 1.75]),
        ({"linear": 1.0}, [(1 * 1 + 2 * 2 + 3 * 4) / 6, (1 * 4 + 2 * 2 + 3 * 1) / 6]),
    ],
    ids=["plain", "decay", "linear"],
)
def test_the_newest_checkpoint_is_the_last_source_and_the_heaviest(knobs: dict[str, float], expected: list[float]):
    oldest_to_newest = [torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0]), torch.tensor([4.0, 1.0])]
    out = merge(
        "checkpoint_average", usual("checkpoint_average", 3, **knobs), torch.zeros(2), oldest_to_newest, torch.float32
    )
    assert out.tolist() == pytest.approx(expected)


def test_a_long_run_with_a_small_decay_is_its_newest_checkpoint():
    sources = [torch.full((2,), float(i)) for i in range(60)]
    knobs = usual("checkpoint_average", 60, decay=METHODS["checkpoint_average"].knobs["decay"].low)
    out = merge("checkpoint_average", knobs, torch.zeros(2), sources, torch.float32)
    assert out.tolist() == pytest.approx([59.0, 59.0], rel=1e-6)


@pytest.mark.parametrize("same", ["linear", "checkpoint_average"])
def test_the_uniform_soup_is_what_equal_weights_give(same: str):
    generator = torch.Generator().manual_seed(0)
    base, *sources = (torch.randn(50, generator=generator) for _ in range(4))
    soup, twin = (merge(n, usual(n, 3, weight=1.0), base, sources, torch.float32) for n in ("uniform_soup", same))
    assert torch.equal(soup, twin)


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


def nuslerp_knobs(first: float, second: float, **switches: float) -> Knobs:
    shared = {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0, "task_vectors": 1.0, **switches}
    return Knobs({"weight": (first, second)}, shared)


def test_nuslerp_turns_from_one_task_vector_to_the_other():
    base = torch.tensor([10.0, 20.0])
    sources = [base + torch.tensor([3.0, 0.0]), base + torch.tensor([0.0, 3.0])]
    out = merge("nuslerp", nuslerp_knobs(1.0, 2.0), base, sources, torch.float32)
    assert (out - base).tolist() == pytest.approx([3 * math.cos(math.pi / 3), 3 * math.sin(math.pi / 3)], rel=1e-5)


def test_nuslerp_without_task_vectors_is_slerp_whatever_the_base():
    first, second = torch.linspace(1, 2, 9), torch.linspace(-1, 3, 9)
    expected = merge("slerp", Knobs({}, {"t": 0.3}), first, [second], torch.float32)
    out = merge("nuslerp", nuslerp_knobs(0.7, 0.3, task_vectors=0.0), torch.ones(9), [first, second], torch.float32)
    assert torch.allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize(("row_wise", "axis"), [(0.0, 0), (1.0, 1)], ids=["rows", "columns"])
@pytest.mark.parametrize("task_vectors", [0.0, 1.0], ids=["sources", "task vectors"])
def test_nuslerp_turns_rows_or_columns_one_by_one(row_wise: float, axis: int, task_vectors: float):
    # more elements than are measured, or merged, in one piece
    base, first, second = torch.randn(3, 300, 500, generator=torch.Generator().manual_seed(0)).unbind()
    knobs = nuslerp_knobs(0.5, 0.25, nuslerp_flatten=0.0, nuslerp_row_wise=row_wise, task_vectors=task_vectors)
    out = merge("nuslerp", knobs, base, [first, second], torch.float32)
    flat = nuslerp_knobs(0.5, 0.25, task_vectors=task_vectors)
    slices = zip(*(x.unbind(axis) for x in (base, first, second)), strict=True)
    alone = [merge("nuslerp", flat, b.clone(), [x.clone(), y.clone()], torch.float32) for b, x, y in slices]
    assert torch.allclose(out, torch.stack(alone, axis), rtol=0.0, atol=1e-6)


def test_nuslerp_by_rows_treats_a_vector_as_one_row():
    base, first, second = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).unbind()
    whole = merge("nuslerp", nuslerp_knobs(0.5, 0.25), base, [first, second], torch.float32)
    for row_wise in (0.0, 1.0):
        knobs = nuslerp_knobs(0.5, 0.25, nuslerp_flatten=0.0, nuslerp_row_wise=row_wise)
        assert torch.allclose(merge("nuslerp", knobs, base, [first, second], torch.float32), whole, rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 0.0), (2.0, -2.0)])
def test_nuslerp_goes_half_way_where_weights_do_not_say_how_far(weights: tuple[float, float]):
    base, sources = torch.zeros(2), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    out = merge("nuslerp", nuslerp_knobs(*weights), base, sources, torch.float32)
    assert out.tolist() == pytest.approx([0.5**0.5] * 2)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
@pytest.mark.parametrize("flatten", [1.0, 0.0])
def test_small_task_vectors_of_a_large_base_have_exact_angles(name: str, flatten: float):
    base = torch.tensor([1e20, 0.0, 0.0])
    sources = [torch.tensor([1e20, 1.0, 0.0]), torch.tensor([1e20, 0.0, 1.0])]
    out = merge(name, usual(name, 2, nuslerp_flatten=flatten), base, sources, torch.float32)
    assert out.tolist() == pytest.approx([1e20, 0.5**0.5, 0.5**0.5])


def test_multislerp_keeps_the_mean_length_of_the_task_vectors():
    base, *sources = torch.randn(4, 60, generator=torch.Generator().manual_seed(0)).unbind()
    out = merge("multislerp", usual("multislerp", 3), base, sources, torch.float32)
    lengths = [torch.linalg.vector_norm(x - base).item() for x in sources]
    assert torch.linalg.vector_norm(out - base).item() == pytest.approx(sum(lengths) / 3, rel=1e-6)


def test_karcher_of_two_is_the_middle_of_their_arc():
    first, second = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    out = merge("karcher", usual("karcher", 2), torch.ones(3), [first, second], torch.float32)
    assert out.tolist() == pytest.approx([3 * 0.5**0.5, 3 * 0.5**0.5, 0.0])


def test_karcher_ends_where_the_pulls_of_the_sources_cancel():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).abs().double()
    knobs = usual("karcher", 5, tol=1e-7, max_iter=100.0)
    out = merge("karcher", knobs, torch.zeros(4), x.float().unbind(), torch.float32).double()
    centre = out / torch.linalg.vector_norm(out)
    units = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    cosines = (units @ centre)[:, None]
    pulls = cosines.acos() / cosines.acos().sin() * (units - cosines * centre)
    assert torch.linalg.vector_norm(pulls.mean(0)).item() < 1e-6


def test_karcher_more_than_the_normalised_mean_is_worth_the_iterations():
    x = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    start, end = (merge("karcher", usual("karcher", 3, max_iter=n), x[0], x, torch.float32) for n in (0.0, 10.0))
    assert math.atan2(start[1], start[0]) == pytest.approx(math.atan2(1, 2), rel=1e-6)
    assert math.atan2(end[1], end[0]) == pytest.approx(math.pi / 6, rel=1e-6)  # a third of the arc


@pytest.mark.parametrize("filter_wise", [0.0, 1.0])
def test_model_stock_trusts_what_the_sources_agree_on(filter_wise: float):
    base = torch.zeros(2, 4)
    sources = [torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0]]), torch.tensor([[1.0, 0, 1, 0], [0, 0, 1, 1]])]
    out = merge("model_stock", usual("model_stock", 2, filter_wise=filter_wise), base, sources, torch.float32)
    mean = sum(sources) / 2
    t = [2 * 0.5 / 1.5, 0.0] if filter_wise else [2 * 0.25 / 1.25] * 2  # cosines 1/2 and 0, of the whole 1/4
    assert torch.allclose(out, torch.tensor(t)[:, None] * mean, rtol=1e-6)


def test_model_stock_of_opposite_changes_is_the_base():
    base = torch.tensor([1.0, 2.0])
    sources = [base + torch.tensor([3.0, 4.0]), base - torch.tensor([3.0, 4.0])]
    assert torch.equal(merge("model_stock", usual("model_stock", 2), base, sources, torch.float32), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passthrough_gives_the_bits_of_the_source(dtype: torch.dtype):
    source = torch.cat([torch.randn(100), torch.tensor([0.0, -0.0, 1e-7, torch.finfo(dtype).max])]).to(dtype)
    out = merge("passthrough", usual("passthrough", 1), torch.ones_like(source), [source], dtype)
    assert torch.equal(out.view(torch.uint8), source.view(torch.uint8))


def test_passthrough_scales():
    knobs = Knobs({"scale": (-1.5,)}, {})
    assert merge("passthrough", knobs, torch.ones(2), [torch.tensor([2.0, -4.0])], torch.float32).tolist() == [
        -3.0,
        6.0,
    ]


def test_nearswap_takes_small_changes_whole_and_of_large_ones_t():
    base, source = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.25, 0.75, 3.0, -1.0])
    out = merge("nearswap", Knobs({}, {"t": 0.5}), base, [source], torch.float32)
    assert out.tolist() == [1.25, 0.75, 1.5, 0.5]
    assert torch.equal(merge("nearswap", Knobs({}, {"t": 0.0}), base, [source], torch.float32), base)


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
    execute(SparseBlend((1.0, 0.0), elect="plain", normalize=True), out, Operands(base, sources))
    assert out.item() == 0.0


def test_a_change_too_small_for_float32_after_weighing_does_not_count():
    base, least = torch.zeros(2), 2.0**-149
    sources = [torch.tensor([1e30, 1.0]), torch.tensor([least, 5e29])]  # weights 0.8 and 0.2
    knobs = shared_knobs(select_topk=1.0)
    out = merge("sce", knobs, base, sources, torch.float32)
    assert out[0] == sources[0][0]
    assert truth("sce", knobs, base, sources, keys_of(2)).allows(out).all()


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


# --- The documentation ---


def test_the_list_of_methods_names_every_method_with_its_coefficients():
    text = (Path(__file__).parent.parent / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| [`")}
    assert rows.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert all(f"`{knob}`" in rows[name] for knob in method.knobs), name
