"""Searches with `goals: pareto`: climbs by several task weights, the front, and another model chosen later."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from searches import ROOT, finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.api.run import Run
from evomerge.errors import EvomergeError
from evomerge.search.learned.climbs import climbs, distance
from evomerge.search.run import open_run
from evomerge.search.storage.step_record import step_records
from evomerge.search.verdict.choices import parse_weights

SMALL: dict[str, Any] = {
    "tasks": [{"task": str(ROOT / "evals" / "tiny" / f"{skill}.yaml")} for skill in ("rev", "add")],
    "sampler": {"name": "auto", "steps": 9},
    "goals": "pareto",
    "budget": {"trials": 17},
}
TASKS = ("tiny_rev", "tiny_add")
CLIMBS = climbs(dict.fromkeys(TASKS, 1.0), 9, pareto=True)
THREE_BY_GP = "import evomerge.search.samplers.auto as a\na.GP_SHARE, a.GP_FRONT = 1e9, 3\n"  # trials are short here
IN_THE_THIRD_CLIMB = """
import os, signal
import evomerge.search.learned.learn as l
real = l.Learner.step
async def killed(self, climb, number, *rest):
    if (climb.number, number) == (2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return await real(self, climb, number, *rest)
l.Learner.step = killed
"""
AT_ITS_LOOK = """
import os, signal
import evomerge.search.learned.learn as l
real = l.Learner.look
async def killed(self, learned, ended):
    if learned.weights == self.climbs[2].weights:
        self.trials.pool.run = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    return await real(self, learned, ended)
l.Learner.look = killed
"""


@pytest.fixture(scope="module")
def pareto(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search for the front of two tasks."""
    return finished_search(write_config(tmp_path_factory.mktemp("pareto"), tiny_family, **SMALL), THREE_BY_GP)


def steps_of(run: Path, climb: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Point and gradient of every step of a climb."""
    return [(r.point, r.gradient) for r in step_records(open_run(run).study().user_attrs, climb)]


def finalists_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "finalists.json").read_text())["finalists"]
    return found


def test_each_set_of_weights_is_climbed_from_the_nearest_one(pareto: Path) -> None:
    tried = {
        str(t.user_attrs["weights"]): t
        for t in open_run(pareto).study().trials
        if {"learned", "weights"} <= t.user_attrs.keys()
    }
    assert list(tried) == [str(c.weights) for c in CLIMBS[1:]]
    assert all(len(steps_of(pareto, c.number)) == 3 for c in CLIMBS[1:])
    for climb in CLIMBS[3:]:
        near = min(CLIMBS[1 : climb.number], key=lambda c: distance(c.weights, climb.weights))
        assert steps_of(pareto, climb.number)[0][0] == tried[str(near.weights)].params


def test_an_emphasised_task_gets_better(pareto: Path) -> None:
    front = {t.number: t.values for t in status_front(pareto).trials}
    tried = [t for t in open_run(pareto).study().trials if {"learned", "weights"} <= t.user_attrs.keys()]
    by_weight = {t.user_attrs["weights"]["tiny_rev"]: front[t.number] for t in tried}
    assert by_weight[max(by_weight)][0] > by_weight[min(by_weight)][0]
    assert by_weight[max(by_weight)][1] < by_weight[min(by_weight)][1]


def test_the_first_trials_after_it_are_told_the_value_of_every_task(pareto: Path) -> None:
    trials = open_run(pareto).study().trials
    first = max(t.number for t in trials if "learned" in t.user_attrs) + 1
    assert first + 3 < len(trials)
    assert [t.user_attrs.get("weights") == {} for t in trials] == [first <= t.number < first + 3 for t in trials]


def status_front(run: Path) -> Any:
    from evomerge.report.status import read_status

    front = read_status(open_run(run)).front
    assert front is not None
    return front


def test_models_along_the_front_are_finalists(pareto: Path) -> None:
    searched = [m for m in status_front(pareto).members if m.name.startswith("trial")]
    names = {f["name"] for f in verdict_of(pareto)["finalists"]}
    assert len(searched) > 1
    assert len({f"trial {m.number}" for m in searched} & names) >= min(8, len(searched))


def test_status_and_report_show_the_front(pareto: Path) -> None:
    shown = run_cli("status", pareto)
    assert "Hypervolume: " in shown.stdout
    assert "tiny_rev 0." in shown.stdout
    report = (pareto / "report.html").read_text()
    assert "Hypervolume over trials" in report
    assert "The front" in report
    volumes = status_front(pareto).hypervolumes
    assert volumes == sorted(volumes)
    assert volumes[-1] > 0


@pytest.mark.parametrize("prelude", [pytest.param(IN_THE_THIRD_CLIMB, id="step"), pytest.param(AT_ITS_LOOK, id="look")])
@pytest.mark.more
def test_a_killed_search_for_the_front_goes_on_to_the_same_bits(
    prelude: str, pareto: Path, tiny_family: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, tiny_family, **SMALL)
    killed = run_cli("search", config, "--run", run, prelude=THREE_BY_GP + prelude)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(steps_of(run, 2)) in (1, 3)
    assert not steps_of(run, 3)
    resumed = run_cli("resume", run, prelude=THREE_BY_GP)
    assert resumed.returncode == 0, resumed.stderr
    assert [steps_of(run, c.number) for c in CLIMBS] == [steps_of(pareto, c.number) for c in CLIMBS]
    assert trials_of(run) == trials_of(pareto)
    assert verdict_of(run) == verdict_of(pareto)
    assert [f["tasks"] for f in finalists_of(run)] == [f["tasks"] for f in finalists_of(pareto)]


def test_each_end_of_the_weights_exports_the_model_that_is_best_there(pareto: Path, tmp_path: Path) -> None:
    recipes = {}
    for task in TASKS:
        out = tmp_path / task
        done = run_cli("export", pareto, "--prefer", f"{task}=1", "--out", out)
        assert done.returncode == 0, done.stderr
        recipes[task] = (out / "recipe.yaml").read_text()
        best = max(f["tasks"][task]["metric"] for f in finalists_of(pareto))
        sentence = next(line for line in done.stdout.splitlines() if f"by the task weights {task} 1.00" in line)
        assert f"weighted mean {best:.3f}" in sentence
        card = (out / "README.md").read_text()
        assert sentence in card
        judged = next(f["chosen"] for f in finalists_of(pareto) if sentence.startswith(f"{f['name']}, "))
        assert ("have not judged this choice" in card) != judged
        assert ("| holdout |" in card) == judged
    assert recipes["tiny_rev"] != recipes["tiny_add"]


def test_the_same_weights_in_python_give_the_recipe_of_the_finalist(pareto: Path, tmp_path: Path) -> None:
    run = Run(pareto)
    made = {
        "prefer": run.export(mergekit=tmp_path / "a.yml", prefer={"tiny_rev": 2, "tiny_add": 1}, show=False),
        "knee": run.export(mergekit=tmp_path / "b.yml", knee=True, show=False),
    }
    found = finalists_of(pareto)
    for recipe in made.values():
        assert recipe.model_dump(mode="json") in [f["recipe"] for f in found]

    def mean(finalist: dict[str, Any]) -> float:
        return float(sum(finalist["tasks"][t]["metric"] * w for t, w in zip(TASKS, (2 / 3, 1 / 3), strict=True)))

    chosen = next(f for f in found if f["recipe"] == made["prefer"].model_dump(mode="json"))
    assert mean(chosen) == pytest.approx(max(map(mean, found)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tiny_rve=1", "there is no task 'tiny_rve'; the tasks are tiny_rev, tiny_add; did you mean tiny_rev?"),
        ("tiny_rev=0", "the weight of tiny_rev must be above 0, not 0"),
        ("tiny_rev=1,tiny_add=-2", "the weight of tiny_add must be above 0, not -2"),
        ("tiny_rev=inf", "must be above 0, not inf"),
        ("tiny_rev", "'tiny_rev' is not TASK=WEIGHT"),
        ("tiny_rev=much", "is not TASK=WEIGHT"),
        ("tiny_rev=1,tiny_rev=2", "tiny_rev has two weights"),
    ],
)
def test_wrong_weights_are_refused(text: str, words: str, pareto: Path, tmp_path: Path) -> None:
    with pytest.raises(EvomergeError) as refused:
        Run(pareto).export(tmp_path / "m", prefer=parse_weights(text), show=False)
    assert words in str(refused.value)


def test_one_model_is_chosen_in_one_way(pareto: Path, tmp_path: Path) -> None:
    done = run_cli("export", pareto, "--knee", "--trial", "0", "--out", tmp_path / "m")
    assert done.returncode == 2
    assert "give one of trial, prefer and knee" in done.stderr


def test_a_run_without_its_finalists_says_how_to_get_them(pareto: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pareto, run)
    (run / "finalists.json").unlink()
    done = run_cli("export", run, "--knee", "--out", tmp_path / "m")
    assert done.returncode == 2
    assert f"evomerge resume {run}" in done.stderr
    (run / "finalists.json").write_text('{"finalists": [{"name": "x"}]}')
    done = run_cli("export", run, "--knee", "--out", tmp_path / "m")
    assert done.returncode == 2
    assert "finalists.0.kind" in done.stderr


def test_what_breaks_a_guard_is_chosen_only_if_every_finalist_does(pareto: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pareto, run)
    found = finalists_of(run)
    kept = found[-1]
    for broken in ([f for f in found if f is not kept], found):
        for finalist in broken:
            finalist["breaks"] = ["general"]
        (run / "finalists.json").write_text(json.dumps({"finalists": found}))
        for way in ({"knee": True}, {"prefer": {"tiny_rev": 1.0}}):
            recipe = Run(run).export(mergekit=tmp_path / "m.yml", show=False, **way)
            assert (recipe.model_dump(mode="json") == kept["recipe"]) == (broken is not found)


def test_one_task_has_no_front(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, **SMALL | {"tasks": SMALL["tasks"][:1]})
    done = run_cli("search", config, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "goals: pareto needs at least two tasks" in done.stderr


def test_a_search_for_the_mean_by_another_sampler_can_be_chosen_from_later(tiny_family: Path, tmp_path: Path) -> None:
    changes = {"sampler": {"name": "cma-es", "population": 4}, "goals": "mean", "budget": {"trials": 10}}
    run = finished_search(write_config(tmp_path, tiny_family, **SMALL | changes))
    recipe = Run(run).export(mergekit=tmp_path / "m.yml", prefer={"tiny_add": 1}, show=False)
    best = max(finalists_of(run), key=lambda f: (f["tasks"]["tiny_add"]["metric"], f["tasks"]["tiny_add"]["value"]))
    assert recipe.model_dump(mode="json") == best["recipe"]
