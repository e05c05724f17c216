"""The search space, the samplers and what a failing trial costs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from models import write_family
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from pyarrow import parquet
from searches import finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.config.config_file import load_config
from evomerge.errors import EvomergeError
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.models import open_config_models
from evomerge.search.run import open_run
from evomerge.search.samplers.cmaes import CmaEsSampler
from evomerge.search.samplers.sampler_kind import trial_seed
from evomerge.search.space.baselines import Baseline, baselines, distinct, plain_recipe
from evomerge.search.space.space import Space, build_space, spread
from evomerge.search.space.start_points import points_of, read_start
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.item_scores import unpack
from evomerge.search.storage.study import SearchStudy, in_full
from evomerge.search.storage.trial_record import TrialRecord, record_of
from evomerge.sources.open_models import open_models
from evomerge.sources.tensor_names import TensorRole, tensor_role


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained base and two sources of two layers."""
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, ("rev", "add"))
    return folder


def space_of(family: Path, folder: Path, **changes: object) -> Space:
    config = load_config(write_config(folder, family, **changes))
    return build_space(config, open_models(family / "base", {s: family / s for s in ("rev", "add")}))


def middle(space: Space) -> dict[str, float]:
    return {name: (d.low + d.high) / 2 for name, d in space.axes.items()}


@pytest.mark.parametrize(("granularity", "count"), [("model", 1), ("depth", 2), ("group", 2), ("layer", 2)])
def test_a_granularity_has_its_number_of_axes(family: Path, tmp_path: Path, granularity: str, count: int) -> None:
    space = space_of(family, tmp_path, space={"weight": [0, 1], "granularity": granularity, "knots": 2, "groups": 2})
    assert len(space.axes) == 2 * count


def test_components_have_coefficients_of_their_own(family: Path, tmp_path: Path) -> None:
    space = space_of(family, tmp_path, space={"weight": [0, 1], "components": ["attention", "mlp"]})
    point = middle(space) | {"weight.rev.attention": 0.9}
    knobs = space.recipe(point).knobs
    assert knobs(TensorRole(0, "attention"), 2).each["weight"] == (0.9, 0.5)
    assert knobs(TensorRole(0, "mlp"), 2).each["weight"] == (0.5, 0.5)
    assert knobs(TensorRole(None, "embedding"), 2).each["weight"] == (0.5, 0.5)


def test_a_fixed_knob_is_no_axis_but_is_in_the_recipe(family: Path, tmp_path: Path) -> None:
    space = space_of(family, tmp_path, method="ties", space={"weight": [0, 1], "density": 0.3, "lambda": [0.5, 1.5]})
    assert sorted(space.axes) == ["lambda", "weight.add", "weight.rev"]
    assert space.recipe(middle(space)).knobs(TensorRole(0, "mlp"), 2).each["density"] == (0.3, 0.3)


@pytest.mark.parametrize(("given", "written"), [(False, "none"), (True, "expected"), ("l1", "l1")])
def test_a_choice_is_written_into_the_recipe_by_name(given: object, written: str, family: Path, tmp_path: Path) -> None:
    bounds = {"weight": [0, 1], "density": [0.2, 0.9], "epsilon": [0.05, 0.2], "rescale": given}
    space = space_of(family, tmp_path, method="della", space=bounds)
    assert len(space.axes) == 6
    recipe = space.recipe(middle(space))
    assert recipe.parameters["rescale"] == written
    assert recipe.knobs(TensorRole(0, "mlp"), 2).each["epsilon"] == (0.125, 0.125)


def test_one_source_may_have_bounds_of_its_own(family: Path, tmp_path: Path) -> None:
    space = space_of(family, tmp_path, space={"weight": [0, 1], "sources": {"add": {"weight": [-1, 0]}}})
    assert space.axes["weight.add"] == FloatDistribution(-1, 0)


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6), st.integers(2, 40))
def test_depth_knots_are_joined_by_straight_lines(values: list[float], layers: int) -> None:
    along = spread(values, "depth", layers)
    expected = np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(values)), values)
    assert np.allclose(along, expected)


@given(st.integers(1, 8), st.integers(8, 60))
def test_groups_are_runs_of_nearly_equal_length(groups: int, layers: int) -> None:
    along = spread([float(g) for g in range(groups)], "group", layers)
    assert isinstance(along, list)
    assert along == sorted(along)
    lengths = [along.count(float(g)) for g in range(groups)]
    assert max(lengths) - min(lengths) <= 1


def test_baselines_are_the_parents_the_uniform_blend_and_the_recommended_recipes(family: Path, tmp_path: Path) -> None:
    found = {b.name: b for b in baselines(space_of(family, tmp_path))}
    assert list(found) == ["rev", "add", "uniform", "task_arithmetic 0.8", "dare_ties 0.5"]
    assert found["rev"].recipe.knobs(TensorRole(0, "mlp"), 2).each["weight"] == (1.0, 0.0)
    assert found["uniform"].recipe.knobs(TensorRole(0, "mlp"), 2).each["weight"] == (0.5, 0.5)
    assert found["dare_ties 0.5"].point is None
    assert found["dare_ties 0.5"].recipe.method == "dare_ties"


def test_baselines_that_make_the_same_model_are_one(family: Path, tmp_path: Path) -> None:
    """Of two sources task arithmetic at 0.5 is the uniform blend, and a file of the user's may be a parent."""
    space = space_of(family, tmp_path)

    def made(method: str, weights: dict[str, float], density: float = 1.0) -> Baseline:
        return Baseline("own", "given", plain_recipe(space, method, weights, density), None)

    known = baselines(space)
    assert distinct([made("linear", {"rev": 0.5, "add": 0.5}), *known], space.layers) == known
    assert distinct([made("linear", {"rev": 3.0, "add": 0.0}), *known], space.layers) == known
    assert distinct([made("dare_ties", {"rev": 0.5, "add": 0.5}, 0.5), *known], space.layers) == known
    for other in (made("linear", {"rev": 0.6, "add": 0.4}), made("task_arithmetic", {"rev": 0.5, "add": 0.0})):
        assert distinct([other, *known], space.layers) == [other, *known]


def test_a_parent_outside_the_bounds_is_a_recipe_of_its_own(family: Path, tmp_path: Path) -> None:
    found = {b.name: b for b in baselines(space_of(family, tmp_path, space={"weight": [0.2, 0.8]}))}
    assert found["rev"].point is None
    assert found["rev"].recipe.method == "linear"
    assert [s.name for s in found["rev"].recipe.sources] == ["rev"]


def test_roles_bring_the_blend_of_specialists_and_generalists(family: Path, tmp_path: Path) -> None:
    sources = [
        {"name": n, "path": str(family / n), "role": r} for n, r in (("rev", "specialist"), ("add", "generalist"))
    ]
    found = {b.name: b for b in baselines(space_of(family, tmp_path, sources=sources))}
    assert found["specialists 0.65"].recipe.knobs(TensorRole(0, "mlp"), 2).each["weight"] == (0.65, 0.35)


MERGEKIT_FILE = """
merge_method: task_arithmetic
base_model: {family}/base
models:
- model: {family}/rev
  parameters: {{weight: [{{filter: norm, value: 0.7}}, {{value: {rev}}}]}}
- model: {family}/add
parameters: {{weight: 0.25}}
"""


def start(family: Path, folder: Path, rev: str, **changes: Any) -> Space:
    (folder / "mine.yml").write_text(MERGEKIT_FILE.format(family=family, rev=rev))
    silent = {"start_from": "mine.yml", "base": None, "sources": None, "method": None}
    config = yaml.safe_load(write_config(folder, family, **silent, **changes).read_text())
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    loaded = load_config(file)
    return build_space(loaded, open_config_models(loaded))


@pytest.mark.parametrize("granularity", ["model", "depth", "group", "layer"])
def test_a_search_starts_from_a_mergekit_file(granularity: str, family: Path, tmp_path: Path) -> None:
    space = start(family, tmp_path, "0.5", space={"weight": [0, 1], "granularity": granularity, "components": ["norm"]})
    assert [(s.name, s.path) for s in space.config.sources] == [(n, str(family / n)) for n in ("rev", "add")]
    first = points_of(space, read_start(space.config)[0])[0][0]
    assert (first.name, first.kind) == ("mine", "given")
    assert first.point is not None
    expected = {"weight.rev": 0.5, "weight.rev.norm": 0.7, "weight.add": 0.25, "weight.add.norm": 0.25}
    for axis, value in first.point.items():
        assert value == expected[re.sub(r"\.(depth|group|layer)\d+$", "", axis)], axis


@pytest.mark.parametrize(
    ("rev", "space"),
    [
        ("2.0", {"weight": [0, 1], "components": ["norm"]}),  # beyond the bounds
        ("0.5", {"weight": [0, 1]}),  # norms have no value of their own
        ("[0, 1]", {"weight": [0, 1], "components": ["norm"], "granularity": "depth"}),  # the head has the first value
        ("0.5", {"weight": [0, 1], "components": ["norm"], "lambda": 0.5}),
    ],
)
def test_a_start_that_the_space_cannot_express_is_a_recipe_of_its_own(
    rev: str, space: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    found = start(family, tmp_path, rev, space=space)
    first, near = points_of(found, read_start(found.config)[0])[0]
    assert (near.name, near.kind) == ("mine, nearest point", "start")
    assert (first.name, first.point) == ("mine", None)
    assert first.recipe.knobs(tensor_role("lm_head.weight"), 2).each["weight"][1] == 0.25


@pytest.mark.parametrize("changes", [
    {"slices": [{"layers": {"rev": [0, 1]}}]},
    {"vocabulary": "union"},
    {"sources": [{"name": "rev", "recipe": {"method": "linear", "base": {"path": "/base"},
                                            "sources": [{"name": "add", "path": "/add"}]}}]},
])  # fmt: skip
def test_a_baseline_that_would_be_another_model_than_the_searchs_is_refused(
    changes: dict[str, object], family: Path, tmp_path: Path
) -> None:
    recipe = {"method": "linear", "base": {"path": "/base"}, "sources": [{"name": "rev", "path": "/rev"}]} | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(EvomergeError, match=r"mine\.yaml: a baseline is merged into the search's own model"):
        baselines(space_of(family, tmp_path, baselines=[str(tmp_path / "mine.yaml")]))


def fitness(point: dict[str, float]) -> float:
    return -sum((value - 0.9 - 0.1 * k) ** 2 for k, value in enumerate(point.values()))


def drive(space: Space, database: Path, trials: int, reopen_every: int | None) -> list[dict[str, float]]:
    """Points that a search proposes on a known function, with the process state thrown away now and then."""
    study = SearchStudy(open_study(sqlite_url(database), "s", create=True), space)
    points = []
    while len(study.trials) < trials:
        if reopen_every and points and len(points) % reopen_every == 0:
            study.begin(None)  # a trial that runs when the process dies
            study = SearchStudy(open_study(sqlite_url(database), "s", create=True), space)
        begun = study.begin(None)
        points.append(dict(begun.params))
        study.finish(begun, None if begun.number == 5 else fitness(begun.params), TrialRecord())
    return points


@pytest.mark.parametrize("sampler", ["cma-es", "tpe", "nsga-ii", "gp", "qmc", "random"])
def test_resumed_study_proposes_what_the_uninterrupted_one_would(family: Path, tmp_path: Path, sampler: str) -> None:
    space = space_of(family, tmp_path, sampler={"name": sampler})
    whole = drive(space, tmp_path / "whole.db", 16, None)
    parts = drive(space, tmp_path / "parts.db", 16, 7)
    assert parts == whole
    assert len({tuple(p.values()) for p in whole}) == 16


def test_cma_es_climbs(family: Path, tmp_path: Path) -> None:
    space = space_of(family, tmp_path)
    points = drive(space, tmp_path / "s.db", 150, None)
    assert max(map(fitness, points[-20:])) > -0.002
    assert max(map(fitness, points[:10])) < -0.01


def test_cma_es_starts_at_the_best_baseline(family: Path, tmp_path: Path) -> None:
    space = space_of(family, tmp_path)
    study = SearchStudy(open_study(sqlite_url(tmp_path / "s.db"), "s", create=True), space)
    good, bad = dict.fromkeys(space.axes, 1.4), dict.fromkeys(space.axes, 0.1)
    for name, point, value in (("bad", bad, 0.0), ("good", good, 1.0)):
        study.finish(study.begin((name, point)), value, TrialRecord())
    sampler = CmaEsSampler(space.axes, seed=0, sigma0=1e-6, population=4)
    proposed = sampler.sample_relative(study.mirror, study.mirror.ask()._cached_frozen_trial, {})
    assert proposed == pytest.approx(good, abs=1e-4)


@settings(max_examples=30)
@given(st.integers(0, 2**31 - 1), st.integers(0, 10_000))
def test_trial_seeds_fit_32_bits_and_differ(seed: int, number: int) -> None:
    assert 0 <= trial_seed(seed, number) < 2**32
    assert trial_seed(seed, number) != trial_seed(seed, number + 1)


def test_a_trial_is_in_the_database_before_its_work_begins(family: Path, tmp_path: Path) -> None:
    space = space_of(family, tmp_path)
    study = SearchStudy(open_study(sqlite_url(tmp_path / "s.db"), "s", create=True), space)
    begun = study.begin(None)
    there = open_study(sqlite_url(tmp_path / "s.db"), "s", create=False).get_trials()
    assert [(t.state, t.params) for t in there] == [(TrialState.RUNNING, begun.params)]


FAILING = """
import evomerge.evaluate.engine as s
calls, real = [0], s.Engine.score_parts
def sometimes(self, *arguments):
    calls[0] += 1
    if CONDITION:
        raise ERROR
    return real(self, *arguments)
s.Engine.score_parts = sometimes
"""


def study_of(run: Path) -> optuna.Study:
    return open_run(run).study()


def test_a_failing_trial_is_recorded_and_the_search_goes_on(tiny_family: Path, tmp_path: Path) -> None:
    prelude = FAILING.replace("CONDITION", "calls[0] in (5, 11)").replace("ERROR", "RuntimeError('a bug of a library')")
    run = tmp_path / "run"
    done = run_cli("search", write_config(tmp_path, tiny_family, budget={"trials": 10}), "--run", run, prelude=prelude)
    assert done.returncode == 0, done.stderr
    assert [t[1] for t in trials_of(run)].count("FAIL") == 2
    assert "a bug of a library" in done.stdout
    assert "a bug of a library" in (run / "log.txt").read_text()


def test_ten_failures_in_a_row_end_the_search_with_an_explanation(tiny_family: Path, tmp_path: Path) -> None:
    prelude = FAILING.replace("CONDITION", "calls[0] > 4").replace("ERROR", "MemoryError('no memory left')")
    run = tmp_path / "run"
    done = run_cli("search", write_config(tmp_path, tiny_family, budget={"trials": 40}), "--run", run, prelude=prelude)
    assert done.returncode == 2
    assert "10 trials failed in a row" in done.stderr
    assert "out of memory: no memory left" in done.stderr
    assert "Traceback (most recent" not in done.stderr
    assert run_cli("status", run).returncode == 0


def test_a_broken_candidate_is_recorded_with_the_worst_value(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, space={"weight": [-1e39, 1e39]}, budget={"trials": 8}, name="wild")
    run = tmp_path / "run"
    done = run_cli("search", config, "--run", run)
    assert done.returncode == 0, done.stderr
    trials = study_of(run).get_trials()
    broken = [t for t in trials if record_of(t).broken is not None]
    assert broken
    assert all(t.state == TrialState.COMPLETE for t in trials)
    for trial in broken:
        assert trial.value == min(t.value for t in trials[: trial.number] if t.value is not None)
        assert str(record_of(trial).broken) in done.stdout
    assert f"{len(broken)} broken" in run_cli("status", run).stdout


# --- Racing ---


LOOKS_COST_NOTHING = """
import evomerge.search.evaluation.race_setup as r
r.Cost.on = lambda device, batch_tokens: r.Cost(0.1, 0.0)
"""


@pytest.fixture(scope="module")
def raced(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search whose candidates ran against each other."""
    splits = {"search": 80, "selection": 10, "holdout": 40}
    folder = tmp_path_factory.mktemp("raced")
    config = write_config(folder, tiny_family, splits=splits, budget={"trials": 20})
    return finished_search(config, LOOKS_COST_NOTHING)  # so few items are not worth a look otherwise


def test_a_stopped_candidate_is_never_the_best(raced: Path) -> None:
    study = study_of(raced)
    trials = study.get_trials()
    stopped = [t for t in trials if record_of(t).partial is not None]
    assert stopped, "nothing was stopped, so this test says nothing"
    for trial in stopped:
        share = record_of(trial).partial
        assert share is not None
        assert 0 < share < 1
        before = [t.value for t in trials[: trial.number] if in_full(t)]
        assert trial.value is not None
        assert trial.value < max(v for v in before if v is not None)
        scores = np.concatenate([unpack(text) for m in record_of(trial).scores.values() for text in m.values()])
        assert np.isfinite(scores).mean() == pytest.approx(share)
    assert in_full(study.best_trial)
    finalists = {f["trial"] for f in verdict_of(raced)["finalists"]}
    assert finalists.isdisjoint({t.number for t in stopped})


def test_a_candidate_that_runs_to_the_end_has_the_mean_of_its_items(raced: Path) -> None:
    for trial in study_of(raced).get_trials():
        if in_full(trial):
            scale = Scale.from_json(study_of(raced).user_attrs[SCALE])
            each = {task: unpack(m["gold_logprob"]) for task, m in record_of(trial).scores.items()}
            means = [scale.scaled(task, "objective", scores).mean() for task, scores in each.items()]
            assert trial.value == pytest.approx(np.mean(means), abs=1e-9)


def test_racing_can_be_turned_off(tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, tiny_family, racing=False, budget={"trials": 12})
    assert run_cli("search", config, "--run", run).returncode == 0
    assert all(map(in_full, study_of(run).get_trials()))


def test_every_item_score_is_in_the_table(raced: Path, tmp_path: Path) -> None:
    out = tmp_path / "items.parquet"
    done = run_cli("items", raced, "--out", out)
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(out).to_pandas()
    trials = study_of(raced).get_trials()
    counted = table[table.trial.notna()].groupby("trial").size()
    for trial in trials:
        assert counted[trial.number] == round(160 * (record_of(trial).partial or 1.0))
    assert set(table[table.recipe.notna()].split) == {"search", "selection", "holdout"}
    best = study_of(raced).best_trial
    own = table[table.trial == best.number].groupby("task").score.mean()
    scale = Scale.from_json(study_of(raced).user_attrs[SCALE])
    values = [scale.scaled(task, "objective", [mean])[0] for task, mean in own.items()]
    assert np.mean(values) == pytest.approx(best.value, abs=1e-6)
    again = run_cli("items", raced, "--out", out)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    wrong = run_cli("items", raced, "--out", tmp_path / "items.xlsx")
    assert (wrong.returncode, ".parquet or .csv" in wrong.stderr) == (2, True)


def test_a_task_that_is_added_to_a_finished_run_is_all_that_its_finalists_are_scored_on(
    tiny_family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, tiny_family, budget={"trials": 8})
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"tasks": content["tasks"][:1]}))
    assert run_cli("search", config, "--run", run).returncode == 0
    before = verdict_of(run)
    config.write_text(yaml.safe_dump(content))
    log = (run / "log.txt").read_text()
    done = run_cli("resume", run, "--accept-changes")
    assert done.returncode == 0, done.stderr
    new = (run / "log.txt").read_text().removeprefix(log)
    scored = re.compile(r"scoring \S+ (\w+) on (\d+) items of (selection|holdout)")
    known = {(recipe, split) for recipe, _, split in scored.findall(log)}
    counts = {(s, n) for recipe, n, s in scored.findall(new) if (recipe, s) in known}
    assert counts == {("selection", "10"), ("holdout", "40")}  # those of the new task; both tasks have twice as many
    assert verdict_of(run)["finalists"] != before["finalists"]
    assert set(verdict_of(run)["tasks"]) == {"tiny_rev", "tiny_add"}
