"""The derivative of a loss by the coefficients of a recipe, against differences of the float64 oracle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import VOCABULARY, write_adapter, write_family, write_statistics
from numpy.typing import NDArray
from test_folders import TEXT, write_model
from test_methods import SPECTRAL, keys_of, measurements, truth
from torch import Tensor
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.gradient import KnobTaps, learnable
from evomerge.merge.gradient.chain import changed, derivative_of_plan
from evomerge.merge.gradient.inner_products import by_blend, by_numbers
from evomerge.merge.kernels.derived import derive
from evomerge.merge.kernels.operands import Operands
from evomerge.merge.kernels.random_masks import mask_keys
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knob, Knobs, values_of
from evomerge.merge.methods.plan import Blend, Derived
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import coefficient_layer, tensor_role

Values = dict[tuple[str, str | None], dict[str, NDArray[np.float64]]]
TOKENS = torch.randint(3, len(VOCABULARY), (2, 9), generator=torch.Generator().manual_seed(4))
LAYERS = 2
seeds = st.integers(0, 999)
H = 1e-6  # of the oracle's differences


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norm computes in float32, too coarse for differences; here it computes in the type of its input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def loss_of(model: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The mean cross entropy of fixed tokens."""
    logits = (model(TOKENS) if weights is None else functional_call(model, dict(weights), (TOKENS,))).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def sources_of(
    folders: Mapping[str, Path], names: list[str], given: Mapping[str, Mapping[str, Any]]
) -> list[RecipeSource]:
    return [RecipeSource(name=n, path=str(folders[n]), parameters=dict(given.get(n, {}))) for n in names]


def opened(recipe: Recipe) -> tuple[Bank, Any]:
    """The bank of a recipe and a live model in float64 that holds the candidate."""
    folders = {s.name: Path(s.path) for s in recipe.sources}
    bank = Bank(open_models(Path(recipe.base.path), folders))
    model = candidate_model(bank, torch.float32).double()
    materialise(recipe, bank, destinations(model, bank))
    return bank, model


def gradient_of(recipe: Recipe, bank: Bank, model: Any, passes: int = 1) -> Values:
    with KnobTaps(model, bank, destinations(model, bank)).watch(recipe) as gradient:
        for _ in range(passes):
            loss_of(model).backward()
    return gradient.values


def exact(merged: oracle.Merged | oracle.Elected) -> Tensor:
    if isinstance(merged, oracle.Merged):
        return merged.exact
    return torch.where(merged.surely_minus, merged.minus.exact, merged.plus.exact)


def place_of(name: str, layers: int = LAYERS) -> tuple[str, int]:
    role = tensor_role(name)
    return role.finest, coefficient_layer(role, layers)


def expected(recipe: Recipe, bank: Bank, model: Any) -> Values:
    """Central differences of the loss of what the oracle merges, in float64."""
    method, names = METHODS[recipe.method], [s.name for s in recipe.sources]
    statistics = bank.statistics(recipe) if method.statistics else []

    def merged(name: str, change: Callable[[Knobs], Knobs] = lambda knobs: knobs) -> Tensor:
        knobs = change(recipe.knobs(tensor_role(name), LAYERS))
        parts = [bank.source(s, name) for s in names]
        return exact(
            truth(recipe.method, knobs, bank.base(name), parts, mask_keys(recipe.seed, name, names), name, statistics)
        )

    point = {name: merged(name) for name in destinations(model, bank)}
    found: Values = {}
    for knob in learnable(method):
        for i, source in enumerate(names) if method.knobs[knob].each else [(None, None)]:
            for place in set(map(place_of, point)):
                losses = []
                for step in (H, -H):

                    def change(knobs: Knobs, i: int | None = i, knob: str = knob, step: float = step) -> Knobs:
                        if i is None:
                            return Knobs(knobs.each, {**knobs.shared, knob: knobs.shared[knob] + step}, knobs.count)
                        each = [x + step * (k == i) for k, x in enumerate(knobs.each[knob])]
                        return Knobs({**knobs.each, knob: tuple(each)}, knobs.shared, knobs.count)

                    here = {n: merged(n, change) for n in point if place_of(n) == place}
                    with torch.no_grad():
                        losses.append(float(loss_of(model, point | here)))
                values = found.setdefault((knob, source), {}).setdefault(place[0], np.zeros(LAYERS))
                values[place[1]] += (losses[0] - losses[1]) / (2 * H)
    return found


def same(found: Values, wanted: Values, tolerance: float = 2e-5) -> None:
    assert any(x.any() for components in wanted.values() for x in components.values())
    for place, components in wanted.items():
        scale = max(float(np.abs(x).max()) for x in components.values())
        for component, values in components.items():
            got = found[place].get(component, np.zeros(LAYERS))
            assert np.allclose(got, values, rtol=1e-4, atol=tolerance * scale), (place, component, got, values)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two fine-tuned models and two adapters of one base."""
    found = write_family(tmp := tmp_path_factory.mktemp("family"))
    for seed, name in enumerate(("adapter", "other"), 1):
        found[name] = write_adapter(tmp / name, found["base"], seed, targets=("q_proj", "down_proj")[:seed])
    return found


GIVEN: dict[str, Any] = {"weight": 0.75, "density": 0.5, "t": 0.3, "lambda": 1.25, "decay": 0.6, "gamma": 0.1}
smooth = [name for name, method in METHODS.items() if learnable(method)]


def recipe_of(
    method: str, folders: Mapping[str, Path], names: list[str], first: Any = 0.75, **parameters: Any
) -> Recipe:
    """A recipe with different weights for its sources.  first: the first one's."""
    kind = METHODS[method]
    names = names[: 1 if kind.in_turn else kind.sources[1]]
    own = {n: {"weight": w} for n, w in zip(names, (first, 0.5), strict=False)} if "weight" in kind.knobs else {}
    given = {k: v for k, v in (GIVEN | parameters).items() if k in kind.knobs}
    sources = sources_of(folders, names, {} if "weight" in parameters else own)
    if kind.statistics:
        for seed, source in enumerate(sources):
            file = folders[source.name].parent / f"{source.name}.{kind.statistics}"
            source.statistics = str(
                file if file.exists() else write_statistics(file, kind.statistics, folders[source.name], seed=seed)
            )
    return Recipe(
        method=method, dtype="float32", seed=5, base=Model(path=str(folders["base"])), sources=sources, parameters=given
    )


UNSURE = "products of low rank have singular vectors that are not unique"
NOT_OF_ADAPTERS = {
    "fisher": "the statistics are those of whole models",
    "tsv": UNSURE,
    "iso_c": UNSURE,
    "ramplus_tl": "no tensor has elements that both change and others that one changes alone",
}


@pytest.mark.parametrize("names", [["one", "two"], ["adapter", "other"]], ids=["checkpoints", "adapters"])
@pytest.mark.parametrize("method", smooth)
def test_every_method_agrees_with_differences_of_the_oracle(method: str, names: list[str], folders: dict[str, Path]):
    if "adapter" in names and method in NOT_OF_ADAPTERS:
        pytest.skip(NOT_OF_ADAPTERS[method])
    recipe = recipe_of(method, folders, names, **{"t": 0.03} if method == "nearswap" else {})
    bank, model = opened(recipe)
    same(gradient_of(recipe, bank, model), expected(recipe, bank, model))


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_steps_one_after_the_other_have_their_derivatives(method: str, folders: dict[str, Path]):
    recipe = recipe_of(method, folders, ["two", "adapter", "one"], **{"t": [0.3, 0.6]})
    if method == "nuslerp":
        recipe.sources[2].parameters["weight"] = 0.25
    bank, model = opened(recipe)
    same(gradient_of(recipe, bank, model), expected(recipe, bank, model))


def test_a_source_on_top_of_another_has_no_derivative(folders: dict[str, Path]):
    assert learnable(METHODS["nearswap"]) == {"t"}
    assert learnable(METHODS["nearswap"], 2) == set()
    recipe = recipe_of("nearswap", folders, ["one"])
    bank, model = opened(several := recipe.model_copy(update={"sources": sources_of(folders, ["one", "two"], {})}))
    with pytest.raises(EvomergeError, match="nearswap has no coefficient"):
        gradient_of(several, bank, model)


def test_only_what_changes_the_weights_smoothly_is_learnable():
    assert learnable(METHODS["ties"]) == learnable(METHODS["della"]) == {"weight", "lambda"}
    assert learnable(METHODS["slerp"]) == {"t"}
    without = {name for name, method in METHODS.items() if not learnable(method)}
    assert without == {"arcee_fusion", "karcher", "model_stock", "ram", "regmean", "sce", "uniform_soup"}


def test_a_method_without_a_derivative_is_refused(folders: dict[str, Path]):
    bank, model = opened(recipe := recipe_of("karcher", folders, ["one", "two"]))
    with pytest.raises(EvomergeError, match="karcher has no coefficient"):
        gradient_of(recipe, bank, model)


KINDS: dict[str, Any] = {
    "one number": 0.5,
    "0": 0.0,
    "by layer": [0.5, -0.25],
    "by component": {"mlp": 0.5, "embedding": 0.0, "default": 0.25},
    "by component and layer": {"attention": [1.0, 0.25], "default": [0.0, -0.25]},
    "by name": [{"filter": "q_proj", "value": [0.1, 0.9]}, {"value": 0.4}],
}


@pytest.mark.parametrize("names", [["one", "two"], ["adapter", "other"]], ids=["checkpoints", "adapters"])
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_coefficient_has_its_derivative(
    kind: str, method: str, names: list[str], folders: dict[str, Path]
):
    recipe = recipe_of(method, folders, names, KINDS[kind], **{"lambda": KINDS["by layer"]})
    bank, model = opened(recipe)
    same(gradient_of(recipe, bank, model), expected(recipe, bank, model))


@pytest.mark.parametrize("t", [0.0, 1.0, [0.0, 0.7], {"mlp": 1.0, "default": 0.2}], ids=str)
def test_a_derivative_at_a_bound_is_one_sided(t: Any, folders: dict[str, Path]):
    bank, model = opened(recipe := recipe_of("slerp", folders, ["one", "two"], t=t))
    same(gradient_of(recipe, bank, model), expected(recipe, bank, model), tolerance=1e-4)


def test_a_weight_of_zero_in_a_sparse_merge_has_the_derivative_beside_it(folders: dict[str, Path]):
    found = []
    for weight in (0.0, 1e-4):
        recipe = recipe_of("ties", folders, ["one", "two"])
        recipe.sources[1].parameters["weight"] = weight
        bank, model = opened(recipe)
        found.append(gradient_of(recipe, bank, model)["weight", "two"])
    for component, values in found[0].items():
        assert np.isfinite(values).all()
        assert np.abs(values).max() > 0
        assert np.abs(values).max() < 100 * max(1.0, np.abs(found[1][component]).max())


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_the_low_rank_way_equals_the_way_through_whole_gradients(
    method: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    bank, model = opened(recipe := recipe_of(method, folders, ["adapter", "other"]))
    adapted = [p for name, p in model.named_parameters() if "q_proj" in name or "down_proj" in name]
    with KnobTaps(model, bank, destinations(model, bank)).watch(recipe) as low_rank:
        assert not any(p.requires_grad for p in model.parameters())
        loss_of(model).backward()
    monkeypatch.setattr(KnobTaps, "linear", lambda *_: None)
    with KnobTaps(model, bank, destinations(model, bank)).watch(recipe) as full:
        assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, adapted))
        loss_of(model).backward()
    same(low_rank.values, full.values, tolerance=1e-6)
    same(full.values, low_rank.values, tolerance=1e-6)


@pytest.mark.parametrize("names", [["one", "two"], ["adapter", "other"], ["one", "adapter"]], ids="+".join)
def test_backward_passes_add_up_and_leave_nothing_behind(names: list[str], folders: dict[str, Path]):
    bank, model = opened(recipe := recipe_of("task_arithmetic", folders, names))
    before = {name: p.clone() for name, p in model.named_parameters()}
    once = gradient_of(recipe, bank, model)
    thrice = gradient_of(recipe, bank, model, passes=3)
    same(thrice, {k: {c: 3 * x for c, x in values.items()} for k, values in once.items()}, tolerance=1e-6)

    def stop() -> None:
        loss_of(model).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), KnobTaps(model, bank, destinations(model, bank)).watch(recipe):
        stop()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert not p.requires_grad
        assert p.grad is None
        assert not p._post_accumulate_grad_hooks
    assert not any(module._forward_hooks for module in model.modules())
    assert not loss_of(model).requires_grad


def test_at_most_one_gradient_of_a_weight_is_alive(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    bank, model = opened(recipe := recipe_of("ties", folders, ["one", "two"]))
    alive, reduce = [], KnobTaps.reduce

    def counted(*args: Any) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        reduce(*args)
        assert all(p.grad is None for p in model.parameters())

    monkeypatch.setattr(KnobTaps, "reduce", counted)
    gradient_of(recipe, bank, model)
    assert alive == [1] * len(list(model.parameters()))


MIXTURE = TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "mixtral": MIXTURE,
    "qwen2": TEXT | {"tie_word_embeddings": True},
    "gpt2": {"vocab_size": len(VOCABULARY), "n_embd": 16, "n_inner": 24, "n_layer": 4, "n_head": 2, "n_positions": 64},
}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_experts_in_one_parameter_and_tied_weights_have_their_share(kind: str, method: str, tmp_path: Path):
    """Against differences along the task vectors, or along what an almost equal merge adds."""
    folders = {n: write_model(tmp_path / n, kind, ARCHITECTURES[kind], seed) for seed, n in enumerate(("base", "one"))}
    recipe = recipe_of(method, folders, ["one"], density=1.0, weight=0.3)
    recipe.parameters["lambda"] = 0.1
    bank, model = opened(recipe)
    if kind == "mixtral":
        model.float()  # transformers' product of experts takes no float64
    places, step = destinations(model, bank), 1e-3
    if kind == "mixtral":
        assert len(places) > len(list(model.parameters()))
    found = gradient_of(recipe, bank, model)["lambda", None]
    share = 1.0 if method == "ties" else 0.3  # ties divides by the weight
    checked = set()
    with torch.no_grad():
        for component in {tensor_role(name).finest for name in places}:
            for layer in range(4):
                here = [n for n in places if place_of(n, 4) == (component, layer)]
                losses = []
                for direction in (1.0, -2.0, 1.0):
                    for name in here:
                        places[name] += direction * step * share * (bank.source("one", name) - bank.base(name))
                    losses.append(float(loss_of(model)))
                wanted = (losses[0] - losses[1]) / (2 * step)
                got = found[component][layer] if component in found else 0.0
                assert got == pytest.approx(wanted, rel=0.02, abs=2e-3), (component, layer)
                checked.add(abs(wanted) > 0.01)
    assert True in checked


# --- One tensor, without a model ---


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("method", smooth)
def test_derivatives_of_a_single_tensor_agree_with_differences_of_the_oracle(method: str, data: st.DataObject):
    kind = METHODS[method]
    least, most = kind.sources
    count = data.draw(st.integers(least, most or 4))
    shape = data.draw(st.sampled_from([(7,), (33,), (4, 9), (3, 2, 5)] if method not in SPECTRAL else [(40,), (12, 9)]))
    gradient, base, *sources = torch.randn(2 + count, *shape, generator=torch.Generator().manual_seed(data.draw(seeds)))
    eighths = st.integers(1, 12).map(lambda n: n / 8)
    weights = eighths if kind.keeps_parent and data.draw(st.booleans()) else eighths.map(lambda x: x - 0.0625)

    def value(name: str, knob: Knob) -> float:
        if knob.switch or knob.choices:
            return data.draw(st.sampled_from(sorted(values_of(knob))))
        if name in ("density", "select_topk"):
            return data.draw(st.sampled_from([0.3, 0.7, 1.0]))
        return (
            data.draw(st.floats(0.1, 0.9)) if knob.high == 1.0 and knob.smooth else knob.default or data.draw(weights)
        )

    each = {k: tuple(value(k, v) for _ in range(count)) for k, v in kind.knobs.items() if v.each}
    shared = {k: value(k, v) for k, v in kind.knobs.items() if not v.each}
    assume(not (shared.get("linear") and shared.get("decay") != 1.0))
    knobs, measured, keys = Knobs(each, shared, count), measurements(base, sources), keys_of(count)

    def oracle_at(knobs: Knobs) -> float:
        return float((gradient.double() * exact(truth(method, knobs, base, sources, keys))).sum())

    found = derivative_of_plan(kind, knobs, measured)
    plan = found.plan
    operands = derive(plan, "tensor", base, sources) if isinstance(plan, Derived) else sources
    inner = (
        by_blend(gradient, base, sources, with_base=True)
        if isinstance(plan, Blend)
        else by_numbers(plan, gradient, Operands(base, operands, measured.planes(plan), keys))
    )
    for (name, source), got in zip(found.places, found.matrix @ inner.numpy(), strict=True):
        at = knobs.shared[name] if source is None else knobs.each[name][source]
        ends = [oracle_at(changed(knobs, name, source, at + step)) for step in (H, -H)]
        assert got == pytest.approx((ends[0] - ends[1]) / (2 * H), rel=1e-3, abs=2e-4), (name, source)
