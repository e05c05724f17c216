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
from models import write_family, write_statistics
from torch import Tensor

from evomerge.device import TORCH_DTYPES
from evomerge.merge.bank import Bank, mask_keys
from evomerge.merge.execute import Keys, execute, random_mask
from evomerge.merge.gathered import Gathered
from evomerge.merge.materialise import materialise_tensor
from evomerge.merge.measure import Measurements
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Chance, Knob, Knobs, Plan, SparseBlend, chance
from evomerge.merge.recipe import Model, Recipe, RecipeSource
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
    planes: list[Tensor] = []
    if isinstance(plan, SparseBlend) and plan.keep == "rank":
        planes = [measured.levels(i) for i in range(len(sources))]
    elif isinstance(plan, SparseBlend) and plan.keep == "importance":
        planes = [measured.divergences()]
    execute(plan, out, base, sources, planes, keys_of(len(sources)))
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
    gathered: Sequence[Gathered] = (),
) -> oracle.Merged | oracle.Elected:
    each, shared = knobs.each, knobs.shared
    is_layer_matrix = base.ndim == 2 and place(tensor).component not in ("embedding", "head")
    match name:
        case "tsv" if is_layer_matrix:
            return oracle.tsv(base, sources, each["weight"], shared["lambda"])
        case "iso_c" if is_layer_matrix:
            return oracle.iso_c(base, sources, shared["lambda"])
        case "tsv" | "iso_c":
            weights = each.get("weight", (1.0,) * len(sources))
            return oracle.task_arithmetic(base, sources, weights, shared["lambda"] / len(sources), normalize=False)
        case "fisher" if gathered:
            scale = [g.size if shared["normalize"] else sum(h.size for h in gathered) / len(gathered) for g in gathered]
            pairs = zip(gathered, each["weight"], scale, strict=True)
            return oracle.fisher(base, sources, [w * (g.read(tensor).double() / s).clamp(1e-6) for g, w, s in pairs])
        case "regmean" if gathered and gathered[0].covers(tensor):
            grams = [g.read(tensor) for g in gathered]
            return oracle.regmean(base, sources, grams, each["weight"], shared["alpha"])
        case "fisher" | "regmean":
            return oracle.task_arithmetic(base, sources, each["weight"], 1.0, normalize=True)
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
        case "dare_linear" | "dare_ties":
            pairs = zip(keys[1], each["density"], strict=True)
            masks = [
                random_mask(chance(p), 0, base.numel(), (keys[0], key)).bool().view(base.shape) for key, p in pairs
            ]
            return oracle.dare(
                base,
                sources,
                masks,
                each["weight"],
                each["density"],
                shared["lambda"],
                normalize=bool(shared["normalize"]),
                rescale=bool(shared["rescale"]),
                elect=name == "dare_ties",
            )
    raise LookupError(f"the method {name} has no oracle")


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
    if knob.low == 0.0 and knob.high == 1.0:
        return st.sampled_from([0.0, 1.0, 0.5, 0.1]) | st.floats(0.01, 1.0)
    if knob.low == 0.0:
        return st.integers(0, 16).map(lambda n: n / 8)
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
    out = merge(name, usual(name, 2), base, [base, base], dtype)
    assert torch.allclose(out.float(), base.float(), rtol=2 * oracle.UNIT, atol=0.0)


@every_method
def test_one_source_at_full_weight_is_that_source(name: str):
    base, source = torch.linspace(-3, 3, 101), torch.linspace(4, -2, 101).cos()
    out = merge(name, usual(name, 1, t=1.0, weight=1.0), base, [source], torch.float32)
    assert torch.allclose(out, source, rtol=0.0, atol=8 * oracle.UNIT)


@every_method
def test_inputs_are_left_as_they_were(name: str):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, generator=generator) for _ in range(3)]
    copies = [t.clone() for t in tensors]
    merge(name, usual(name, 2, density=0.5, t=0.3), tensors[0], tensors[1:], torch.float32)
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
    sources = {s: folders[s] for s in ("one", "two")}
    bank = Bank(open_models(folders["base"], sources))
    knobs = METHODS[name].knobs
    wanted = {"weight": 0.75, "density": 0.4, "t": 0.3, "lambda": 1.25}
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
            recipe.knobs(place(tensor), bank.layers),
            base,
            [bank.source(s, tensor) for s in sources],
            keys,
            tensor,
            bank.gathered(recipe),
        )
        assert expected.allows(out).all(), tensor
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
