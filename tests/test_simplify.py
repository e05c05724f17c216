"""Simplification: fewer sources and coefficients without a loss beyond the margin."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import ROOT, SKILLS, finished_search, run_cli, verdict_of, write_config

from evomerge.config.schema import SearchConfig
from evomerge.config.space import Granularity
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.knobs import is_named
from evomerge.merge.recipe.coefficients import all_numbers
from evomerge.merge.recipe.recipe import Recipe, recipe_problems
from evomerge.search.run import open_run
from evomerge.search.space.nearest import nearest_point
from evomerge.search.space.space import Group, Space
from evomerge.search.verdict.simplify import Form, form_of, simplest
from evomerge.sources.tensor_names import tensor_role

NAMES = ("rev", "add", "sort")
LAYERS = 6
INNER = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
TENSORS = (
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in INNER),
    "model.norm.weight",
    "lm_head.weight",
)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """A search space of any granularity of a method with several kinds of coefficients."""
    method = draw(st.sampled_from(["linear", "task_arithmetic", "ties", "dare_ties", "breadcrumbs", "slerp"]))
    names = NAMES[: METHODS[method].sources[1] or 3]
    config = SearchConfig.model_validate(
        {
            "name": "x",
            "base": "/base",
            "sources": [{"name": n, "path": f"/{n}"} for n in names],
            "method": method,
            "tasks": [{"task": "x"}],
        }
    )
    granularity: Granularity = draw(st.sampled_from(["model", "depth", "group", "layer"]))
    count = {"model": 1, "layer": LAYERS}.get(granularity) or draw(st.integers(2, 5))
    components = draw(st.sets(st.sampled_from(["attention", "mlp", "norm"]), max_size=2))
    groups = []
    for name, knob in METHODS[method].knobs.items():
        fixed = is_named(knob) or name not in ("weight", "density", "t", "lambda")
        for source in names if knob.each else [None]:
            for part in [*(() if fixed else sorted(components)), "default"]:
                low, high = (knob.default or 0.0,) * 2 if fixed else (0.1, 0.9)
                stem = f"{name}.{source}.{part}"
                one = fixed or granularity == "model"
                axes = (stem,) if one else tuple(f"{stem}.{k}" for k in range(count))
                groups.append(Group(name, source, part, "model" if one else granularity, low, high, axes))
    return Space(config, LAYERS, tuple(groups), TENSORS)


@st.composite
def recipes(draw: st.DrawFn, space: Space) -> Recipe:
    return space.recipe({axis: draw(st.floats(d.low, d.high)) for axis, d in space.axes.items()})


def numbers(recipe: Recipe) -> int:
    """How many different numbers a recipe has."""
    given = [recipe.parameters, *(s.parameters for s in recipe.sources)]
    values = [v for parameters in given for v in parameters.values() if not isinstance(v, (str, bool))]
    return len({x for value in values for x in all_numbers(value)})


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_form_of_a_recipe_makes_the_same_merge_with_no_more_coefficients(data: st.DataObject) -> None:
    space = data.draw(spaces())
    recipe = data.draw(recipes(space))
    form = form_of(space, recipe)
    assert form is not None
    assert form.count <= len(space.axes)
    for role in map(tensor_role, TENSORS):
        own, theirs = (r.knobs(role, LAYERS) for r in (form.recipe, recipe))
        for name, values in theirs.each.items():
            assert own.each[name] == pytest.approx(values)
        assert dict(own.shared) == pytest.approx(dict(theirs.shared))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_every_step_is_a_recipe_of_the_method_with_fewer_coefficients(data: st.DataObject) -> None:
    space = data.draw(spaces())
    recipe = data.draw(recipes(space))
    form = form_of(space, recipe)
    assert form is not None
    kept = [form]

    async def keep(tried: Form, what: str) -> bool:
        made = tried.recipe
        assert made.method == recipe.method
        assert recipe_problems(made) == []
        assert nearest_point(tried.space, made) is not None
        assert {s.name for s in made.sources} <= {s.name for s in recipe.sources}
        before = kept[-1]
        if what.startswith("rounded"):
            decimals = int(what.split()[2])
            assert tried.count == before.count
            assert all(round(value, decimals) == value for value in tried.point.values())
        elif what.startswith("without"):
            assert len(tried.sources) == len(before.sources) - 1
        else:
            assert tried.count < before.count
        if yes := data.draw(st.booleans(), label=what):
            kept.append(tried)
        return yes

    found = asyncio.run(simplest(form, keep))
    assert found is kept[-1]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_without_any_loss_one_source_with_one_value_is_left(data: st.DataObject) -> None:
    space = data.draw(spaces())
    recipe = data.draw(recipes(space))
    form = form_of(space, recipe)
    assert form is not None

    async def keep(tried: Form, what: str) -> bool:
        return True

    found = asyncio.run(simplest(form, keep))
    method = METHODS[recipe.method]
    assert len(found.sources) == max(1, method.sources[0] if "weight" in method.knobs else len(recipe.sources))
    assert all(group.granularity == "model" and group.component == "default" for group in found.free())
    assert all(round(value, 1) == value for value in found.point.values())
    assert numbers(found.recipe) <= max(numbers(recipe), 1)


def test_the_least_weighty_source_goes_first_and_what_an_adapter_cannot_change_does_not_count() -> None:
    config = SearchConfig.model_validate(
        {
            "name": "x",
            "base": "/base",
            "sources": [{"name": n, "path": f"/{n}"} for n in NAMES],
            "method": "task_arithmetic",
            "tasks": [{"task": "x"}],
        }
    )
    groups = [Group("weight", n, p, "model", -1, 1, (f"{n}.{p}",)) for n in NAMES for p in ("mlp", "default")]
    groups += [Group("lambda", None, "default", "model", 1.0, 1.0, ("lambda",))]
    groups += [Group("normalize", None, "default", "model", 0.0, 0.0, ("normalize",))]
    space = Space(config, LAYERS, tuple(groups), TENSORS)
    values = {"rev": (-0.9, 0.3), "add": (0.2, 0.1), "sort": (0.4, -0.4)}
    recipe = space.recipe(
        {f"{n}.{p}": v for n, both in values.items() for p, v in zip(("mlp", "default"), both, strict=True)}
    )
    reach = dict.fromkeys(NAMES, frozenset({"mlp", "attention", "norm"})) | {"rev": frozenset({"mlp"})}
    form = form_of(replace(space, reach=reach), recipe)
    assert form is not None
    assert form.count == 5
    asked = []

    async def keep(tried: Form, what: str) -> bool:
        asked.append(what)
        return what == "without add"

    found = asyncio.run(simplest(form, keep))
    assert asked[:3] == ["without add", "without sort", "without rev"]
    assert found.sources == ["rev", "sort"]
    assert found.recipe.knobs(tensor_role("model.layers.1.mlp.up_proj.weight"), LAYERS).each["weight"] == (-0.9, 0.4)


@pytest.fixture(scope="module")
def searched(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four skills' models and of a fifth source that is the base itself."""
    folder = tmp_path_factory.mktemp("useless")
    paths = {s: str(tiny_family / s) for s in SKILLS} | {"idle": str(tiny_family / "base")}
    config = write_config(
        folder,
        tiny_family,
        sources=[{"name": n, "path": p} for n, p in paths.items()],
        space={"weight": [0.3, 0.7], "granularity": "depth", "knots": 2},
        tasks=[{"task": str(ROOT / "evals" / "tiny" / f"{s}.yaml"), "objective": "gold_logprob"} for s in SKILLS],
        splits={"search": 40, "selection": 30, "holdout": 40},
        budget={"trials": 24},
    )
    return finished_search(config)


def test_a_useless_source_is_dropped_and_a_resume_scores_nothing_twice(searched: Path) -> None:
    before = verdict_of(searched)
    assert before["finalists"][0]["kind"] == "candidate"
    assert before["simplified"] == ""
    done = run_cli("resume", searched, "--simplify", "0.03")
    assert done.returncode == 0, done.stderr
    verdict = verdict_of(searched)
    assert verdict["chosen"]["name"] == "simplified"
    assert verdict["holdout_uses"] == before["holdout_uses"] + 1
    assert verdict["simplified"].startswith("Simplified: 4 sources instead of 5 (without idle)")
    assert verdict["simplified"] in " ".join(done.stdout.split())
    assert verdict["simplified"] in (searched / "report.html").read_text()
    recipe = yaml.safe_load((searched / "winner.yaml").read_text())
    assert [s["name"] for s in recipe["sources"]] == list(SKILLS)
    metrics = {f["name"]: f["selection_metric"] for f in verdict["finalists"]}
    assert metrics["simplified"] >= metrics[before["chosen"]["name"]] - 0.03
    assert metrics["simplified"] >= max(f["selection_metric"] for f in verdict["finalists"] if f["kind"] != "candidate")

    written = (searched / "log.txt").read_text().count(" scoring ")
    assert run_cli("resume", searched).returncode == 0
    assert (searched / "log.txt").read_text().count(" scoring ") == written

    (searched / "verdict.json").unlink()  # as if the disk had been full when it was written
    assert run_cli("resume", searched).returncode == 0
    assert verdict_of(searched) == verdict
    assert verdict_of(searched) == verdict
    assert open_run(searched).config().simplify == 0.03


def test_a_margin_that_the_items_cannot_show_is_named(searched: Path) -> None:
    """160 items of right and wrong exclude a loss of 1 - 0.05 ** (1 / 160) at best; the interval is drawn."""
    assert run_cli("resume", searched, "--simplify", "0.01").returncode == 0
    log = (searched / "log.txt").read_text()
    assert "simplify: the search items are too few to exclude a loss of 0.01, even of equal models" in log
    least = re.search(r"give a margin above ([0-9.]+),", log)
    assert least is not None
    assert float(least.group(1)) == pytest.approx(1 - 0.05 ** (1 / 160), rel=0.05)
    refused = run_cli("resume", searched, "--simplify", "-1")
    assert (refused.returncode, "is not a margin" in refused.stderr) == (2, True)
