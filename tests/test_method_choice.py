"""A search that chooses its method: `method: [ties, task_arithmetic]`."""

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from models import write_family
from searches import finished_search, run_cli, trials_of, verdict_of, write_config
from test_search import LOOKS_COST_NOTHING

from evomerge.config.config_file import dump_config, load_config
from evomerge.config.differences import config_differences
from evomerge.config.running import RacingConfig
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.jobs import Outcome, TrialJob
from evomerge.search.evaluation.method_race import RACE, MethodRace, mean_of_first
from evomerge.search.evaluation.race_setup import build_race_setup
from evomerge.search.evaluation.scale import plain_scale
from evomerge.search.evaluation.task_set import TaskSet, open_task_set
from evomerge.search.models import open_config_models
from evomerge.search.run import open_run
from evomerge.search.space.baselines import base_alone, baselines
from evomerge.search.space.choose_method import best_method, default_recipes, space_of, tried_baselines
from evomerge.search.storage.item_scores import evaluation_records, unpack
from evomerge.search.storage.method_choice import METHOD, DefaultRecipe, MethodChoice, recorded_choice
from evomerge.search.verdict.recommended import recipe_of_trial
from evomerge.sources.tensor_names import TensorRole

METHODS = ["ties", "task_arithmetic"]  # the second is the better one on the tiny family
SPACE: dict[str, Any] = {"weight": [0, 1.6], "density": [0.2, 1.0], "lambda": [0.5, 1.5]}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained base and two sources of two layers."""
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, ("rev", "add"))
    return folder


def loaded(folder: Path, family: Path, **changes: Any) -> SearchConfig:
    return load_config(write_config(folder, family, **({"method": METHODS, "space": SPACE} | changes)))


# --- The configuration ---


def test_a_list_of_methods_is_read_back_as_it_was_written(family: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path, family)
    assert (config.method, config.methods) == ("ties", METHODS)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    chosen = config.model_copy(update={"method": "task_arithmetic"})
    (tmp_path / "again.yaml").write_text(dump_config(chosen))
    assert load_config(tmp_path / "again.yaml") == chosen


@pytest.mark.parametrize("method", ["ties", ["ties"]])
def test_one_method_is_written_without_a_list(method: object, family: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path, family, method=method)
    assert (config.method, config.methods) == ("ties", None)
    assert "methods" not in yaml.safe_load(dump_config(config))


def test_the_choice_is_no_difference_and_another_list_is_one(family: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path, family)
    chosen = config.model_copy(update={"method": "task_arithmetic"})
    assert config_differences(chosen, config) == []
    assert config_differences(chosen, loaded(tmp_path, family, method=["ties", "dare_ties"])) == [
        "methods.1: task_arithmetic -> dare_ties"
    ]
    assert len(config_differences(chosen, loaded(tmp_path, family, method="ties"))) == 3


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"method": ["ties", "task_aritmetic"]}, "method: 'task_aritmetic' is not one of "),
        ({"method": ["ties", "ties"]}, "method: ties is listed twice"),
        ({"method": ["ties", 3]}, "method: give the name of a method, or a list of names (found ['ties', 3])"),
        ({"method": []}, "method: give the name of a method, or a list of names (found [])"),
        ({"method": "dare_ties", "methods": METHODS}, "method: dare_ties is not one of `methods`"),
        (
            {"space": SPACE | {"t": 0.5}},
            "space.t: not a coefficient of ties or task_arithmetic; allowed: weight, density, lambda, normalize",
        ),
        ({"space": SPACE | {"density": [0.2, 2]}}, "space.density: bounds 0.2 to 2 are not within 0 to 1"),
        ({"space": {"weight": 1, "density": [0.2, 1]}}, "space: every coefficient of task_arithmetic is fixed"),
        ({"method": ["ties", "slerp"]}, "space.t: slerp needs it; give bounds [low, high] or a number"),
    ],
)
def test_one_mistake_is_one_line(changes: dict[str, Any], line: str, family: Path, tmp_path: Path) -> None:
    with pytest.raises(EvomergeError) as caught:
        loaded(tmp_path, family, **changes)
    _, *found = str(caught.value).split("\n  ")
    assert len(found) == 1, found
    assert found[0].startswith(line)


def test_a_wrong_name_brings_the_nearest_one(family: Path, tmp_path: Path) -> None:
    with pytest.raises(EvomergeError, match=r"1 problem\(s\):\n.*did you mean task_arithmetic\?$"):
        loaded(tmp_path, family, method=["ties", "task_aritmetic"])


# --- The default recipes ---


def names_of(folder: Path, family: Path, method: str, **space: Any) -> list[str]:
    config = loaded(folder, family, method=method, space=space)
    return [b.name for b in default_recipes(space_of(config, method, open_config_models(config)))]


def test_default_recipes_are_the_usual_weights_within_the_bounds(family: Path, tmp_path: Path) -> None:
    assert names_of(tmp_path, family, "task_arithmetic", weight=[0, 0.9]) == [
        "task_arithmetic weight 0.5",
        "task_arithmetic weight 0.8",
    ]
    assert names_of(tmp_path, family, "task_arithmetic", weight=[2, 3]) == ["task_arithmetic middle"]


def test_where_weights_are_divided_by_their_sum_lambda_varies(family: Path, tmp_path: Path) -> None:
    assert names_of(tmp_path, family, "ties", **SPACE) == ["ties lambda 1", "ties lambda 1.5"]
    assert names_of(tmp_path, family, "ties", weight=[0, 1], density=[0.2, 1]) == ["ties middle"]
    assert len(names_of(tmp_path, family, "ties", **SPACE, normalize=False)) == 3


def test_other_coefficients_are_in_the_middle_of_their_bounds(family: Path, tmp_path: Path) -> None:
    config = loaded(tmp_path, family, method="ties", space=SPACE | {"lambda": [0.5, 1.2], "granularity": "layer"})
    space = space_of(config, "ties", open_config_models(config))
    (baseline,) = default_recipes(space)
    knobs = baseline.recipe.knobs(TensorRole(1, "mlp"), 2)
    assert knobs.each == {"weight": (0.8, 0.8), "density": (0.6, 0.6)}
    assert knobs.shared["lambda"] == 1.0
    assert baseline.point is not None
    assert space.recipe(baseline.point) == baseline.recipe


def test_a_method_without_weights_has_one_default_recipe(family: Path, tmp_path: Path) -> None:
    assert names_of(tmp_path, family, "slerp", t=[0.2, 0.6]) == ["slerp middle"]


def test_recipes_of_bounds_that_are_no_more_are_no_baselines(family: Path, tmp_path: Path) -> None:
    best = {"ties": DefaultRecipe("ties lambda 1.5", -1.0), "task_arithmetic": DefaultRecipe("gone", -0.5)}
    config = loaded(tmp_path, family).model_copy(update={"method": "task_arithmetic"})
    models = open_config_models(config)
    found = tried_baselines(config, models, MethodChoice("task_arithmetic", best))
    assert [(b.name, b.point) for b in found] == [("ties lambda 1.5", None)]
    assert tried_baselines(config, models, MethodChoice("ties", best)) == []


def test_a_method_whose_recipes_are_all_broken_is_named() -> None:
    best = {"ties": DefaultRecipe("ties middle", None), "linear": DefaultRecipe("linear middle", 0.5)}
    assert MethodChoice("linear", best).sentence == "linear is searched: 0.5 (linear middle); ties broken"


def test_of_equal_values_the_measured_one_and_then_the_first_one_is_chosen() -> None:
    full, stopped, equal = DefaultRecipe("a", 0.5), DefaultRecipe("b", 0.5, 0.3), DefaultRecipe("c", 0.5)
    assert best_method({"linear": [stopped], "ties": [full], "dare_ties": [equal]}).chosen == "ties"
    assert best_method({"ties": [DefaultRecipe("d", None)], "linear": [stopped]}).chosen == "linear"


def test_the_sentence_says_which_value_is_an_estimate() -> None:
    best = {"linear": DefaultRecipe("linear weight 0.5", 0.25), "ties": DefaultRecipe("ties lambda 1", 0.125, 0.4)}
    choice = MethodChoice("linear", best)
    assert choice.sentence == "linear is searched: 0.25 (linear weight 0.5); ties about 0.125"
    assert recorded_choice({METHOD: choice.to_json()}) == choice


# --- The race ---

RACING = {"methods": [*METHODS, "dare_ties"], "space": SPACE | {"lambda": [0.5, 2]}}


@pytest.fixture(scope="module")
def known_scores(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TaskSet, dict[str, Any]]:
    """Default recipes by method; the tasks; name -> item scores of each recipe, of the base and of the parents."""
    splits = {"search": 300, "selection": 10, "holdout": 40}
    file = write_config(
        tmp_path_factory.mktemp("known"), tiny_family, method=RACING["methods"], space=RACING["space"], splits=splits
    )
    config = load_config(file)
    models, task_set = open_config_models(config), open_task_set(config)
    tried = {method: default_recipes(space_of(config, method, models)) for method in config.candidate_methods}
    space = space_of(config, config.method, models)
    others = [base_alone(space), *(b for b in baselines(space) if b.kind == "parent")]
    evaluator = Evaluator(config, models, task_set)
    scores = {}
    for baseline in [*others, *(b for found in tried.values() for b in found)]:
        outcome = evaluator.run(TrialJob(baseline.recipe, None))
        assert isinstance(outcome, Outcome)
        scores[baseline.name] = outcome.scores
    return {method: [b.name for b in found] for method, found in tried.items()}, task_set, scores


def test_the_race_chooses_the_method_that_full_scores_choose_and_scores_fewer_items(known_scores: Any) -> None:
    tried, task_set, scores = known_scores
    recipes = [name for names in tried.values() for name in names]
    same, shares = 0, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        picked = {t.name: np.sort(rng.permutation(300)[:120]) for t in task_set.tasks}
        items = {t: {"search": [task_set.items[t]["search"][i] for i in at]} for t, at in picked.items()}
        drawn = TaskSet(task_set.tasks, items)
        own = {
            name: {t: {m: np.array(x)[picked[t]] for m, x in metrics.items()} for t, metrics in tables.items()}
            for name, tables in scores.items()
        }
        scale = plain_scale(drawn)
        full = {name: DefaultRecipe(name, scale.value(tables)) for name, tables in own.items()}
        known = [own[name] for name in own if name not in recipes]
        setup = build_race_setup(drawn, scale, "items", known, seed, RacingConfig())
        first = np.sort(setup.order.items[: setup.looks.ends[0]])
        leader = max(recipes, key=lambda name: mean_of_first(setup, first, setup.values(own[name])[first]))
        race = MethodRace(setup, setup.values(own[leader]), [setup.values(x) for x in known], 0.0)
        raced = {}
        for name in recipes:
            estimate = race.estimate(setup.values(own[name]))
            raced[name] = full[name] if estimate is None else DefaultRecipe(name, estimate.value, estimate.fraction)
            shares.append((1.0 if estimate is None else estimate.fraction) + len(first) / len(setup.ceiling))
        results = [{m: [table[n] for n in names] for m, names in tried.items()} for table in (full, raced)]
        same += best_method(results[0]).chosen == best_method(results[1]).chosen
    print(f"same method with {same} of 20 seeds, {np.mean(shares):.0%} of the items")
    assert same >= 19
    assert np.mean(shares) < 0.8


# --- The search ---


def write_choosing(folder: Path, tiny_family: Path) -> Path:
    return write_config(folder, tiny_family, method=METHODS, space=SPACE, budget={"trials": 9})


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_search(write_choosing(tmp_path_factory.mktemp("finished"), tiny_family))


def scorings(run: Path) -> list[str]:
    """The log's lines of evaluations outside trials, without their times, sorted."""
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    return sorted(line.split(" ", 1)[1] for line in lines if " scoring " in line)


def test_the_better_method_is_searched_and_everything_names_it(finished: Path) -> None:
    run = open_run(finished)
    choice = recorded_choice(run.study().user_attrs)
    assert choice is not None
    values = {method: best.value or -9 for method, best in choice.best.items()}
    assert choice.chosen == "task_arithmetic" == max(values, key=values.__getitem__)
    assert (run.config().method, run.config().methods) == ("task_arithmetic", METHODS)
    assert recipe_of_trial(run, 8).method == "task_arithmetic"
    assert set(trials_of(finished)[8][2]) == {"lambda", "weight.rev", "weight.add"}
    shown = run_cli("status", finished).stdout
    assert "task_arithmetic of 2 sources" in shown
    assert choice.sentence in shown.replace("\n", " ")
    assert choice.sentence in run.log_file.read_text()
    assert choice.sentence in run.report_file.read_text()


def test_the_default_recipes_take_part_in_the_search_and_in_the_finals(finished: Path) -> None:
    run = open_run(finished)
    choice = recorded_choice(run.study().user_attrs)
    assert choice is not None
    own, other = choice.best["task_arithmetic"], choice.best["ties"]
    trials = {t.user_attrs.get("baseline"): t for t in run.study().get_trials()}
    assert trials[own.name].value == own.value
    assert other.name not in trials
    kinds = {f["name"]: f["kind"] for f in verdict_of(finished)["finalists"]}
    assert kinds[own.name] == kinds[other.name] == "recommended"


def test_no_model_is_scored_twice(finished: Path) -> None:
    assert len(scorings(finished)) == len(set(scorings(finished)))
    before = scorings(finished)
    assert run_cli("resume", finished).returncode == 0
    assert scorings(finished) == before


def test_a_trial_of_the_chosen_method_can_be_repeated(finished: Path) -> None:
    done = run_cli("repeat", finished, "--trial", "8")
    assert done.returncode == 0, done.stderr
    assert "0 of 24 item scores differ" in done.stdout


KILL = "import os, signal\ndef die(*a):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
DURING_THE_CHOICE = (
    KILL
    + """
import evomerge.search.evaluation.evaluator as s
calls, real = [0], s.Evaluator.materialise
def counted(self, *a):
    calls[0] += 1
    if calls[0] == DEATH:
        die()
    return real(self, *a)
s.Evaluator.materialise = counted
"""
)
BEFORE_THE_CHOICE_IS_STORED = (
    KILL + "\nimport evomerge.search.storage.method_choice as m\nm.MethodChoice.to_json = die\n"
)
BEFORE_THE_CONFIGURATION_IS_WRITTEN = KILL + "\nimport evomerge.search.space.choose_method as l\nl.write_config = die\n"
BEFORE_THE_FIRST_TRIAL = KILL + "\nimport evomerge.search.loop as l\nl.Driver.search = die\n"


@pytest.mark.parametrize(
    ("prelude", "again"),
    [
        # Base and parents, five recipes on the first items, their leader, then the others.
        pytest.param(DURING_THE_CHOICE.replace("DEATH", "6"), False, id="first look"),
        pytest.param(DURING_THE_CHOICE.replace("DEATH", "9"), True, id="leader"),
        pytest.param(DURING_THE_CHOICE.replace("DEATH", "11"), True, id="race"),
        pytest.param(BEFORE_THE_CHOICE_IS_STORED, False, id="stored"),
        pytest.param(BEFORE_THE_CONFIGURATION_IS_WRITTEN, False, id="written"),
        pytest.param(BEFORE_THE_FIRST_TRIAL, False, id="trial"),
    ],
)
@pytest.mark.more
def test_a_search_killed_around_its_choice_resumes_to_the_same_trials_and_winner(
    prelude: str, again: bool, finished: Path, tiny_family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed = run_cli("search", write_choosing(tmp_path, tiny_family), "--run", run, prelude=prelude)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert trials_of(run) == []
    resumed = run_cli("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert open_run(run).config().method == "task_arithmetic"
    assert trials_of(run) == trials_of(finished)
    assert verdict_of(run) == verdict_of(finished)
    assert (len(scorings(run)) > len(set(scorings(run)))) == again
    assert set(scorings(run)) == set(scorings(finished))


# --- A search that races its default recipes ---


def write_racing(folder: Path, tiny_family: Path) -> Path:
    splits = {"search": 80, "selection": 10, "holdout": 40}
    return write_config(
        folder, tiny_family, method=RACING["methods"], space=RACING["space"], splits=splits, budget={"trials": 7}
    )


@pytest.fixture(scope="module")
def raced(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_search(write_racing(tmp_path_factory.mktemp("raced"), tiny_family), LOOKS_COST_NOTHING)


def test_default_recipes_that_fall_behind_are_stopped_and_the_rest_is_scored_in_full(raced: Path) -> None:
    study = open_run(raced).study()
    choice = recorded_choice(study.user_attrs)
    assert choice is not None
    assert choice.chosen == "task_arithmetic"
    assert choice.best[choice.chosen].partial is None
    records = {r.name: r for r in evaluation_records(study.user_attrs, ["search"]).values()}
    stopped = {name: r for name, r in records.items() if r.partial is not None}
    assert stopped
    assert not {best.name for best in choice.best.values()} & stopped.keys(), "a baseline is scored on all items"
    for record in stopped.values():
        seen = [np.isfinite(unpack(text)).sum() for metrics in record.scores.values() for text in metrics.values()]
        assert sum(seen) == record.scored == round(record.partial * 160)
    share = re.search(r"choosing the method took (\d+)% of the items", (raced / "log.txt").read_text())
    assert share is not None
    assert int(share[1]) < 90


@pytest.mark.more
def test_a_search_killed_in_the_race_resumes_to_the_same_choice(raced: Path, tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prelude = LOOKS_COST_NOTHING + DURING_THE_CHOICE.replace("DEATH", "16")
    killed = run_cli("search", write_racing(tmp_path, tiny_family), "--run", run, prelude=prelude)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(r.partial for r in evaluation_records(open_run(run).study().user_attrs, ["search"]).values())
    resumed = run_cli("resume", run, prelude=LOOKS_COST_NOTHING)
    assert resumed.returncode == 0, resumed.stderr
    before, after = (open_run(r).study().user_attrs for r in (raced, run))
    assert after[METHOD] == before[METHOD]
    assert after[RACE] == before[RACE]
    assert trials_of(run) == trials_of(raced)
    assert verdict_of(run) == verdict_of(raced)


def test_the_trial_of_a_recipe_that_raced_can_be_repeated(raced: Path) -> None:
    study = open_run(raced).study()
    names = {r.name for r in evaluation_records(study.user_attrs, ["search"]).values() if r.seconds.race is not None}
    numbers = [t.number for t in study.get_trials() if t.user_attrs.get("baseline") in names]
    assert numbers
    done = run_cli("repeat", raced, "--trial", str(numbers[0]), prelude=LOOKS_COST_NOTHING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 160 item scores differ" in done.stdout
