"""The derivative of a loss by the coefficients of a recipe, against differences of the float64 oracle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from models import VOCABULARY, write_adapter, write_family, write_statistics
from numpy.typing import NDArray
from test_methods import truth
from torch import Tensor
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from evomerge.errors import EvomergeError
from evomerge.merge.bank.bank import Bank
from evomerge.merge.gradient import KnobTaps, learnable
from evomerge.merge.kernels.random_masks import mask_keys
from evomerge.merge.live import candidate_model, destinations
from evomerge.merge.materialise import materialise
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import coefficient_layer, tensor_role

Values = dict[tuple[str, str | None], dict[str, NDArray[np.float64]]]
TOKENS = torch.randint(3, len(VOCABULARY), (2, 9), generator=torch.Generator().manual_seed(4))
LAYERS = 2
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


def place_of(name: str) -> tuple[str, int]:
    role = tensor_role(name)
    return role.component, coefficient_layer(role, LAYERS)


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
    for place, components in wanted.items():
        scale = max(float(np.abs(x).max()) for x in components.values())
        assert scale > 0, place
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


def recipe_of(method: str, folders: Mapping[str, Path], names: list[str], **parameters: Any) -> Recipe:
    """A recipe with different weights for its sources."""
    kind = METHODS[method]
    names = names[: kind.sources[1]]
    own = {n: {"weight": w} for n, w in zip(names, (0.75, 0.5), strict=False)} if "weight" in kind.knobs else {}
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
