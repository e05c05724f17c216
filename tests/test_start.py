"""`start_from`: the nearest point of a space to a recipe, and searches that begin where an earlier run ended."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_family
from searches import finished_search, run_cli, verdict_of, write_config

from evomerge.config.config_file import load_config
from evomerge.config.schema import SearchConfig
from evomerge.config.space import Granularity
from evomerge.search.run import open_run
from evomerge.search.space.nearest import nearest_point, nearest_values, per_layer
from evomerge.search.space.space import Group, Space
from evomerge.search.space.start_points import START, read_start
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.sources.tensor_names import TensorRole, tensor_role

COMPONENTS = {
    "self_attn.q_proj": "attention",
    "mlp.up_proj": "mlp",
    "input_layernorm": "norm",
}
LOW, HIGH = -0.5, 1.5


def tensors(layers: int) -> tuple[str, ...]:
    inner = [f"model.layers.{layer}.{name}.weight" for layer in range(layers) for name in COMPONENTS]
    return ("model.embed_tokens.weight", *inner, "model.norm.weight", "lm_head.weight")


CONFIG = SearchConfig.model_validate(
    {
        "name": "x",
        "base": "/base",
        "sources": [{"name": n, "path": f"/{n}"} for n in ("rev", "add")],
        "method": "task_arithmetic",
        "tasks": [{"task": "x"}],
    }
)


def space_with(granularity: Granularity, count: int, layers: int, components: list[str]) -> Space:
    """A space of two sources with `count` values along the depth in each of the components and in the rest."""
    groups = []
    for source in ("rev", "add"):
        for component in (*components, "default"):
            stem = f"weight.{source}.{component}"
            axes = (stem,) if granularity == "model" else tuple(f"{stem}.{granularity}{k}" for k in range(count))
            groups.append(Group("weight", source, component, granularity, LOW, HIGH, axes))
    groups += [Group(k, None, "default", "model", 1.0, 1.0, (k,)) for k in ("lambda",)]
    groups += [Group(k, None, "default", "model", 0.0, 0.0, (k,)) for k in ("normalize",)]
    return Space(CONFIG, layers, tuple(groups), tensors(layers))


@st.composite
def spaces(draw: st.DrawFn, layers: int) -> Space:
    granularity: Granularity = draw(st.sampled_from(["model", "depth", "group", "layer"]))
    most = {"model": 1, "depth": 9, "group": layers, "layer": layers}[granularity]
    count = layers if granularity == "layer" else draw(st.integers(2 if granularity == "depth" else 1, most))
    components = draw(st.sets(st.sampled_from(["attention", "mlp", "norm", "head", "embedding"]), max_size=3))
    return space_with(granularity, count, layers, sorted(components))


@st.composite
def points(draw: st.DrawFn, space: Space) -> dict[str, float]:
    return {axis: draw(st.floats(d.low, d.high)) for axis, d in space.axes.items()}


@settings(deadline=None)
@given(st.data(), st.integers(2, 12))
def test_a_point_is_the_nearest_one_to_its_own_recipe(data: st.DataObject, layers: int) -> None:
    """In every granularity, also where knots lie between layers."""
    space = data.draw(spaces(layers))
    point = data.draw(points(space))
    recipe = space.recipe(point)
    near = nearest_point(space, recipe)
    assert near is not None
    assert near.exact
    assert near.point.keys() == space.axes.keys()
    again = space.recipe(near.point)
    for role in map(tensor_role, space.tensors):
        assert again.knobs(role, layers).each["weight"] == pytest.approx(recipe.knobs(role, layers).each["weight"])


@settings(deadline=None)
@given(st.data(), st.integers(2, 40), st.sampled_from(["model", "depth", "group", "layer"]))
def test_the_values_of_a_group_come_back(data: st.DataObject, layers: int, granularity: Granularity) -> None:
    """As long as there are no more values than layers; knots may lie between layers."""
    count = {"model": 1, "layer": layers}.get(granularity) or data.draw(st.integers(2, layers))
    values = data.draw(st.lists(st.floats(LOW, HIGH), min_size=count, max_size=count))
    group = Group("weight", "rev", "mlp", granularity, LOW, HIGH, tuple(map(str, range(count))))
    along = per_layer(values, granularity, layers)
    wanted = [(TensorRole(layer, "mlp"), float(along[layer])) for layer in range(layers)]
    assert nearest_values(wanted, group, layers, 0.0) == pytest.approx(values, abs=1e-7)


def test_more_knots_than_layers_are_found_within_their_bounds() -> None:
    """The least squares leave the bounds there, and coordinate descent needs thousands of sweeps."""
    layers, count = 8, 9
    group = Group("weight", "rev", "default", "depth", -0.5, 1.5, tuple(map(str, range(count))))
    for seed in range(250, 270):
        values = np.clip(np.random.default_rng(seed).uniform(-3, 3, size=count), group.low, group.high)
        along = per_layer(list(values), "depth", layers)
        found = nearest_values([(TensorRole(k, "mlp"), float(along[k])) for k in range(layers)], group, layers, 0.0)
        assert per_layer(found, "depth", layers) == pytest.approx(along, abs=1e-9)


@settings(deadline=None)
@given(st.data(), st.integers(2, 8))
def test_the_nearest_point_is_nearer_than_its_neighbours_and_its_own_nearest(data: st.DataObject, layers: int) -> None:
    """Of recipes of any space, and of coefficients beyond the bounds."""
    finer, space = data.draw(spaces(layers)), data.draw(spaces(layers))
    wide = replace(finer, groups=tuple(g if g.fixed else replace(g, low=-3.0, high=3.0) for g in finer.groups))
    recipe = wide.recipe(data.draw(points(wide)))
    near = nearest_point(space, recipe)
    assert near is not None
    assert all(LOW <= value <= HIGH for value in near.point.values())

    def distance(point: dict[str, float]) -> float:
        made = space.recipe(point)
        gaps = [
            np.subtract(made.knobs(role, layers).each["weight"], recipe.knobs(role, layers).each["weight"])
            for role in map(tensor_role, space.tensors)
        ]
        return float(np.sum(np.square(gaps)))

    own = distance(near.point)
    axis = data.draw(st.sampled_from(sorted(space.axes)))
    for step in (-0.2, -1e-2, 1e-2, 0.2):
        moved = near.point | {axis: float(np.clip(near.point[axis] + step, LOW, HIGH))}
        assert distance(moved) >= own - 1e-9, (axis, step)
    again = nearest_point(space, space.recipe(near.point))
    assert again is not None
    assert again.difference < 1e-6  # knots without a layer of their own are found up to rounding
    assert distance(again.point) == pytest.approx(own, abs=1e-7)


def test_what_has_no_nearest_point_and_what_a_missing_source_gets() -> None:
    space = space_with("model", 1, 3, [])
    recipe = space.recipe({"weight.rev.default": 0.7, "weight.add.default": 0.3})
    alone = recipe.model_copy(update={"sources": recipe.sources[:1]})
    near = nearest_point(space, alone)
    assert near is not None
    assert near.exact
    assert near.point == {"weight.rev.default": 0.7, "weight.add.default": 0.0}
    unknown = recipe.model_copy(update={"sources": [recipe.sources[0].model_copy(update={"name": "other"})]})
    other_method = recipe.model_copy(update={"method": "linear", "parameters": {}})
    switched = recipe.model_copy(update={"parameters": {"lambda": 1.0, "normalize": True}})
    assert [nearest_point(space, r) for r in (unknown, other_method, switched)] == [None] * 3
    scaled = nearest_point(space, recipe.model_copy(update={"parameters": {"lambda": 0.5, "normalize": False}}))
    assert scaled is not None
    assert (scaled.difference, scaled.where.split()[0]) == (0.5, "lambda")


def test_tensors_that_an_adapter_leaves_alone_do_not_count() -> None:
    fine, coarse = space_with("model", 1, 3, ["norm"]), space_with("model", 1, 3, [])
    point = {"weight.rev.default": 0.7, "weight.add.default": 0.3, "weight.rev.norm": 0.0, "weight.add.norm": 0.3}
    every = nearest_point(coarse, fine.recipe(point))
    reach = {"rev": frozenset({"attention", "mlp"}), "add": frozenset({"norm", "attention", "mlp"})}
    near = nearest_point(replace(coarse, reach=reach), fine.recipe(point))
    assert every is not None
    assert near is not None
    assert (every.exact, near.exact) == (False, True)
    assert near.point == {"weight.rev.default": 0.7, "weight.add.default": 0.3}


QUICK: dict[str, Any] = {"splits": {"search": 6, "selection": 4, "holdout": 8}, "budget": {"trials": 9}}


@pytest.fixture(scope="module")
def earlier(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two knots along the depth."""
    folder = tmp_path_factory.mktemp("earlier")
    config = write_config(folder, tiny_family, name="earlier", **QUICK)
    return finished_search(config).rename(folder / "earlier")


def test_a_search_starts_from_a_run_of_another_space(earlier: Path, tiny_family: Path, tmp_path: Path) -> None:
    sources = [{"name": s, "path": str(tiny_family / s)} for s in ("sort", "add", "rev")]
    space = {"weight": [0.0, 1.0], "granularity": "layer", "components": ["mlp"]}
    config = write_config(tmp_path, tiny_family, sources=sources, space=space, start_from=str(earlier), **QUICK)
    run = finished_search(config)
    study = open_run(run).study()
    trials = study.get_trials()
    names = [t.user_attrs.get("baseline", "") for t in trials]
    begun = [n for n in names if n.startswith("earlier trial")]
    assert len(begun) >= 2
    starts = {start["name"]: start for start in study.user_attrs[START]["recipes"]}
    assert starts["earlier winner"]["rival"]
    assert len(starts) <= 5
    log = (run / "log.txt").read_text()
    kinds = {f["name"]: f["kind"] for f in verdict_of(run)["finalists"]}
    for name in begun:
        recipe = starts[name.removesuffix(", nearest point")]["recipe"]
        weights = {source["name"]: source["parameters"]["weight"] for source in recipe["sources"]}
        for axis, value in trials[names.index(name)].params.items():
            _, source, *_, layer = axis.split(".")
            wanted = weights[source][int(layer.removeprefix("layer"))] if source in weights else 0.0
            assert value == pytest.approx(np.clip(wanted, 0.0, 1.0)), axis
        if name.endswith(", nearest point"):
            start = name.removesuffix(", nearest point")
            assert f"start_from: {start}: the nearest point of this space, largest difference" in log
        assert kinds[name] == "candidate"

    gone = earlier.rename(tmp_path / "moved")  # the run is not needed any more
    try:
        done = run_cli("resume", run, "--trials", "11")
        assert done.returncode == 0, done.stderr
    finally:
        gone.rename(earlier)
    again = open_run(run).study().get_trials()
    assert [t.params for t in again[:9]] == [t.params for t in trials]
    assert len(again) == 11


def test_the_models_and_the_method_come_from_the_run(earlier: Path, tiny_family: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(write_config(tmp_path, tiny_family, start_from=str(earlier)).read_text())
    left = {k: v for k, v in content.items() if k not in ("base", "sources", "method")}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(left))
    found, asked = load_config(tmp_path / "search.yaml"), load_config(earlier / "config.yaml")
    assert (found.base, found.sources, found.method) == (asked.base, asked.sources, asked.method)


def test_a_source_that_is_gone_is_left_out_with_a_note(earlier: Path, tiny_family: Path, tmp_path: Path) -> None:
    sources = [{"name": "plus", "path": str(tiny_family / "add")}, {"name": "sort", "path": str(tiny_family / "sort")}]
    starts, notes = read_start(
        load_config(write_config(tmp_path, tiny_family, sources=sources, start_from=str(earlier)))
    )
    assert starts[0].name == "earlier winner"
    assert all([s.name for s in start.recipe.sources] == ["plus"] for start in starts)
    assert notes == [f"rev is a source of {earlier} and not of this search; left out"]


def test_what_a_search_cannot_start_from_is_said_before_there_is_a_run_folder(
    earlier: Path, tiny_family: Path, tmp_path: Path
) -> None:
    def refusal(start: Path, **changes: Any) -> str:
        config = write_config(tmp_path, tiny_family, **{**QUICK, **changes}, start_from=str(start))
        done = run_cli("search", config, "--run", tmp_path / "run")
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "run").exists()
        return " ".join(done.stderr.split())

    (tmp_path / "empty").mkdir()
    assert "empty is no run folder (it has no config.yaml)" in refusal(tmp_path / "empty")
    assert "no such file or run folder" in refusal(tmp_path / "nothing")
    assert "belong to this search's" in refusal(earlier, seed=4, splits={"search": 6, "selection": 4, "holdout": 0.9})
    assert "has none of this search's sources (sort)" in refusal(
        earlier, sources=[{"name": "sort", "path": str(tiny_family / "sort")}]
    )
    write_family(tmp_path / "other", ("rev", "add"))
    sources = [{"name": s, "path": str(tmp_path / "other" / s)} for s in ("rev", "add")]
    assert "has another base model" in refusal(earlier, base=str(tmp_path / "other" / "base"), sources=sources)

    unfinished = shutil.copytree(earlier, tmp_path / "unfinished")
    for name in ("verdict.json", "winner.yaml", "study.db"):
        (unfinished / name).unlink()
    open_study(sqlite_url(unfinished / "study.db"), "earlier", create=True)
    assert "no trial of this run was evaluated in full yet" in refusal(unfinished)
