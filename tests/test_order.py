"""The order in which sources are merged: what a method makes of it, and a search for it."""

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_family, write_llama
from searches import finished_search, write_config

from evomerge.config.schema import SearchConfig
from evomerge.merge.bank.bank import Bank
from evomerge.merge.materialise import materialise_tensor
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import Knobs
from evomerge.merge.methods.slerp import plan
from evomerge.merge.recipe.recipe import Model, Recipe, RecipeSource, load_recipe
from evomerge.search.run import open_run
from evomerge.search.space import order
from evomerge.search.space.nearest import nearest_point
from evomerge.search.space.space import Group, Space
from evomerge.sources.open_models import open_models

NAMES = ("one", "two", "three")
ORDERED = [name for name, method in METHODS.items() if method.ordered is not None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("order")
    found = write_family(root, dtype=torch.bfloat16)
    write_llama(root / "three", seed=5, dtype=torch.bfloat16)
    return {**found, "three": root / "three"}


def recipe_of(method: str, folders: dict[str, Path], names: tuple[str, ...], **changes: Any) -> Recipe:
    wanted = {"t": 0.003 if method == "nearswap" else 0.3, "weight": 0.5}
    return Recipe(
        method=method,
        base=Model(path=str(folders["base"])),
        sources=[RecipeSource(name=n, path=str(folders[n])) for n in names],
        parameters={k: wanted[k] for k in METHODS[method].knobs if k in wanted},
        **{"dtype": "float32", **changes},
    )


def merged(recipe: Recipe, bank: Bank) -> dict[str, torch.Tensor]:
    found = {}
    for name in bank.names:
        out = torch.empty(bank.base(name).shape, dtype=torch.float32)
        materialise_tensor(recipe, bank, name, out)
        found[name] = out
    return found


@pytest.mark.parametrize("method", ORDERED)
def test_orders_make_different_models_which_are_the_same_in_a_bank_of_their_own(
    method: str, folders: dict[str, Path]
) -> None:
    """What one order has measured serves the others, with the same bits."""
    sources = {n: folders[n] for n in NAMES}
    shared = Bank(open_models(folders["base"], sources))
    seen: list[dict[str, torch.Tensor]] = []
    for names in permutations(NAMES):
        recipe = recipe_of(method, folders, names)
        found = merged(recipe, shared)
        alone = merged(recipe, Bank(open_models(folders["base"], {n: folders[n] for n in names})))
        assert all(torch.equal(found[name], alone[name]) for name in found)
        if not any(all(torch.equal(found[name], other[name]) for name in found) for other in seen):
            seen.append(found)
    assert len(seen) == (3 if method == "nuslerp" else 6), "the first two of nuslerp may change places"


@pytest.mark.parametrize("method", ["slerp", "nearswap", "arcee_fusion"])
def test_three_sources_at_once_are_two_merges_one_after_the_other(method: str, folders: dict[str, Path]) -> None:
    """A nested recipe rounds its result to its own type, here float32."""
    bank = Bank(open_models(folders["base"], {n: folders[n] for n in NAMES}))
    first, second, third = NAMES
    found = merged(recipe_of(method, folders, NAMES), bank)
    inner = merged(recipe_of(method, folders, (first, second)), bank)
    for name, tensor in found.items():
        before, source = inner[name].double(), bank.source(third, name).double()
        if method == "slerp":
            cosine = float((before * source).sum() / before.norm() / source.norm())
            angle = np.arccos(cosine)
            parts = (np.sin(0.7 * angle) / np.sin(angle), np.sin(0.3 * angle) / np.sin(angle))
            parts = (0.7, 0.3) if cosine > 0.9995 else parts
            expected = parts[0] * before + parts[1] * source
        elif method == "nearswap":
            expected = before + (source - before).clamp(-0.003, 0.003)
        else:
            change = tensor.double() - before
            kept = (change.abs() > 1e-6 * before.abs()) | (source == before)
            expected = torch.where(kept, source, before)
        assert torch.allclose(tensor.double(), expected, rtol=1e-5, atol=1e-6), name


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.floats(0.0, 1.0), st.integers(0, 999))
def test_slerp_stays_between_the_lengths_of_orthogonal_sources(count: int, t: float, seed: int) -> None:
    """Orthonormal sources: every step walks on the unit sphere, and the later ones pull by sin(t 90 degrees)."""

    class Told:
        gram = np.eye(1 + count)

    blend = plan(Knobs({}, {"t": t}, count), Told())  # type: ignore[arg-type]
    found = np.array(([blend.base] if count == 1 else []) + list(blend.sources))
    assert np.sum(found**2) == pytest.approx(1.0)
    angle = t * np.pi / 2
    places = np.arange(len(found))
    expected = np.where(places > 0, np.sin(angle), 1.0) * np.cos(angle) ** (len(found) - 1 - places)
    assert found == pytest.approx(expected, abs=1e-12)


# --- The space ---


def space_of(method: str = "slerp", count: int = 3, **space: Any) -> Space:
    config = SearchConfig.model_validate(
        {
            "name": "x",
            "base": "/base",
            "sources": [{"name": n, "path": f"/{n}"} for n in NAMES[:count]],
            "method": method,
            "tasks": [{"task": "x"}],
            "space": space,
        }
    )
    groups = [Group("t", None, "default", "model", 0.0, 1.0, ("t",))] if method == "slerp" else []
    return Space(config, 4, tuple(groups), ("model.layers.0.mlp.up_proj.weight",))


@given(st.permutations(NAMES), st.floats(0, 1))
def test_a_point_of_an_order_gives_that_order_and_is_found_again(names: list[str], t: float) -> None:
    space = space_of()
    point = {"t": t} | order.point_of(names)
    recipe = space.recipe(point)
    assert [s.name for s in recipe.sources] == names
    near = nearest_point(space, recipe)
    assert near is not None
    assert near.exact
    assert space.recipe(near.point) == recipe


def test_equal_numbers_leave_the_sources_where_the_configuration_has_them() -> None:
    recipe = space_of().recipe({"t": 0.5} | {order.axis_of(n): 0.5 for n in NAMES})
    assert [s.name for s in recipe.sources] == list(NAMES)


def test_the_order_is_searched_where_the_result_depends_on_it() -> None:
    axes = ["order.one", "order.two", "order.three"]
    assert list(space_of().axes) == ["t", *axes]
    assert list(space_of(order=False).axes) == ["t"]
    assert list(space_of(count=2).axes) == ["t"], "that of two is said by t"
    assert list(space_of("arcee_fusion", 2).axes) == axes[:2]
    assert list(space_of("karcher").axes) == []
    space = space_of()
    assert space.point({}, {"t": 0.25}) == {"t": 0.25} | order.point_of(NAMES)
    assert set(space.ties) == set(space.pairs) == set(space.axes), "shifts and coarser searches know every axis"


def test_a_recipe_in_an_order_that_is_not_searched_is_no_point() -> None:
    recipe = space_of().recipe({"t": 0.5} | order.point_of(("three", "one", "two")))
    assert nearest_point(space_of(order=False), recipe) is None


# --- A search ---


def test_a_search_tries_several_orders(tiny_family: Path, tmp_path: Path) -> None:
    sources = [{"name": s, "path": str(tiny_family / s)} for s in ("rev", "add", "sort")]
    changes = {"sources": sources, "method": "slerp", "space": {"t": [0.1, 0.9]}, "budget": {"trials": 14}}
    run = open_run(finished_search(write_config(tmp_path, tiny_family, **changes)))
    trials = [t for t in run.study().get_trials(deepcopy=False) if "baseline" not in t.user_attrs]
    orders = {tuple(order.order_at(t.params, ["rev", "add", "sort"])) for t in trials}
    assert len(orders) > 1
    chosen = load_recipe(run.winner_file)
    if chosen.method == "slerp":
        assert tuple(s.name for s in chosen.sources) in orders
