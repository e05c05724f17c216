"""With `goals: pareto`: trials by a sampler for several goals, then by several task weights in turn; races of these."""

import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState
from searches import ROOT, finished_search, run_cli, trials_of, verdict_of, write_config
from test_search import LOOKS_COST_NOTHING
from test_storage import space_of

from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import Order
from evomerge.search.evaluation.guards import Guard, GuardScale
from evomerge.search.evaluation.race_policy import Races
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.scale import SCALE, Line, Scale, TaskScale
from evomerge.search.run import open_run
from evomerge.search.samplers.auto import CHOSEN, GP_FRONT, UNTIL, front_trials
from evomerge.search.samplers.front import FIRST, SEVERAL, FrontSampler, turns_of
from evomerge.search.space.space import Space
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.item_scores import pack, trial_scores
from evomerge.search.storage.study import Begun, LearnedPoint, SearchStudy, in_full
from evomerge.search.storage.trial_record import LEARNED, WEIGHTS, RaceRecord, TrialRecord, record_of
from evomerge.search.verdict.front import hypervolume

SCALES = Scale({t: TaskScale(1.0, 0.0, Line("m"), Line("m")) for t in ("a", "b")})
TURNS = turns_of(SCALES.weights)
GUARDED = Scale(SCALES.tasks, {"g": GuardScale(Guard("g", {"a": "m"}, 0.1, "base"), -0.2, 0.1)})  # a may fall to -0.3
OPTIMA = {"a": 0.2, "b": 0.8}  # of every coefficient


def pareto_space(sampler: str, axes: int = 3) -> Space:
    space = space_of(axes, sampler)
    config = space.config.model_copy(update={"goals": "pareto"})
    return Space(config, space.layers, space.groups)


def opened(
    url: str, sampler: str = "cma-es", until: int = 0, axes: int = 3, scale: Scale = SCALES, workers: int = 1
) -> SearchStudy:
    """A study of two tasks, whose only learned trial is its first one.

    until: what `auto` chose, which goes on with CMA-ES then.
    """
    stored = open_study(url, "s", create=True)
    stored.set_user_attr(SCALE, scale.to_json())
    stored.set_user_attr(CHOSEN, "cma-es")
    stored.set_user_attr(UNTIL, until)
    study = SearchStudy(stored, pareto_space(sampler, axes), workers)
    if not study.size:
        finish(study, study.begin(None, LearnedPoint(3, dict.fromkeys(study.space.axes, 0.5))))
    return study


def finish(study: SearchStudy, begun: Begun, stop: float = 0.0) -> None:
    """Score a trial; one in `stop` is stopped by a race, one in `stop` fails."""
    means = {t: -sum((v - best) ** 2 for v in begun.params.values()) for t, best in OPTIMA.items()}
    chance = random.Random(begun.number).random()
    scores = {t: {"m": pack([mean - 0.01, mean + 0.01])} for t, mean in means.items()}
    if chance < stop:
        weights = begun.weights or SCALES.weights
        estimate = sum(weights[t] * means[t] for t in means) / sum(weights.values())
        record = TrialRecord(items="i", scores=scores, partial=0.5, race=RaceRecord(0))
        study.finish(begun, estimate, record)
    elif chance > 1 - stop:
        study.finish(begun, None, TrialRecord(reason="no"))
    else:
        record = TrialRecord(items="i", scores=scores)
        study.finish(begun, SCALES.value({t: {"m": [m, m]} for t, m in means.items()}), record)


def told(trial: FrozenTrial) -> TrialRecord:
    """The record of a trial; an empty one while it runs."""
    return record_of(trial) if trial.state.is_finished() else TrialRecord()


@pytest.mark.parametrize(("sampler", "until"), [("cma-es", 0), ("tpe", 0), ("auto", 14)])
def test_a_resumed_study_for_the_front_proposes_what_the_uninterrupted_one_would(
    sampler: str, until: int, tmp_path: Path
) -> None:
    points = []
    for name, ends in (("whole", ()), ("parts", (7, 19))):
        url = sqlite_url(tmp_path / f"{name}.db")
        study = opened(url, sampler, until)
        for number in range(1, 30):
            if number in ends:
                study.begin(None)  # a process dies while a trial runs
                study = opened(url, sampler, until)
            begun = study.begin(None)
            assert begun.number == number
            finish(study, begun, stop=0.1)
        points.append([(t.params, t.value, t.user_attrs.get(WEIGHTS), t.system_attrs) for t in study.trials])
    assert points[0] == points[1]
    turns = [TURNS[k % 5] if k % 5 else None for k in range(until, 30)]
    assert [w for _, _, w, _ in points[0][1:]] == ([{}] * (until - 1) + turns)[:29] if until else turns[1:]


def test_each_turn_of_cma_es_goes_to_the_best_of_its_weights(tmp_path: Path) -> None:
    study = opened(sqlite_url(tmp_path / "s.db"))
    for _ in range(400):
        finish(study, study.begin(None), stop=0.05)
    for turn, weights in enumerate(TURNS):
        late = [t for t in study.trials[300:] if t.number % len(TURNS) == turn]
        best = sum(weights[t] * OPTIMA[t] for t in OPTIMA)
        mean = np.mean([list(t.params.values()) for t in late])
        assert mean == pytest.approx(best, abs=0.05), weights


def test_a_turn_sees_the_trials_of_others_as_given_and_by_its_own_weights(tmp_path: Path) -> None:
    study = opened(sqlite_url(tmp_path / "s.db"), "tpe")
    running = []
    for _ in range(40):
        running.append(study.begin(None))
        if len(running) > 3:  # three workers' results come late
            finish(study, running.pop(0), stop=0.2)
    sampler = study.sampler(study.size)
    assert isinstance(sampler, FrontSampler)
    for turn, weights in enumerate(TURNS):
        seen = sampler.view(study.mirror, turn, None).get_trials()
        assert [t.params for t in seen] == [t.params for t in study.trials]
        for trial, known in zip(study.trials, seen, strict=True):
            mine = trial.number % len(TURNS) == turn and LEARNED not in trial.user_attrs
            assert ("fixed_params" in known.system_attrs) != mine
            if in_full(trial):
                means = {t: m["m"].mean() for t, m in trial_scores(trial).items()}
                assert known.value == pytest.approx(sum(weights[t] * means[t] for t in means), abs=1e-6)
            elif trial.state.is_finished():
                assert known.value == (trial.value if mine else None)


def test_a_sampler_for_several_goals_sees_the_value_of_every_task(tmp_path: Path) -> None:
    """What runs, what failed, what broke and what breaks a guard included."""
    study = opened(sqlite_url(tmp_path / "s.db"), "auto", until=40, scale=GUARDED, workers=3)
    running = []
    for number in range(1, 24):
        running.append(study.begin(None))
        if len(running) == 3:
            begun = running.pop(0)
            if number == 9:
                study.finish(begun, study.penalty, TrialRecord(broken="weights are not finite"))
            else:
                finish(study, begun, stop=0.1)
    sampler = study.sampler(study.size)
    assert isinstance(sampler, FrontSampler)
    seen = sampler.view(study.mirror, SEVERAL, None).get_trials()
    means = {t.number: {k: float(m["m"].mean()) for k, m in trial_scores(t).items()} for t in study.complete}
    lost = {n: max(0.0, -0.3 - m["a"]) / 0.1 for n, m in means.items()}
    assert 0 < sum(x > 0 for x in lost.values()) < len(lost), "some break the guard"
    values = {n: [m["a"] - lost[n], m["b"] - lost[n]] for n, m in means.items()}
    for trial, known in zip(study.trials, seen, strict=True):
        assert known.params == trial.params
        assert known.state == (TrialState.FAIL if told(trial).partial else trial.state)
        if trial.number in values:
            assert known.values == pytest.approx(values[trial.number], abs=1e-6)
        elif told(trial).broken:
            assert known.values == pytest.approx(np.min(list(values.values()), axis=0), abs=1e-6)
    assert [t.state for t in seen[-2:]] == [TrialState.RUNNING] * 2
    points = [tuple(t.params.values()) for t in study.trials]
    assert len(set(points)) == len(points), "a trial that runs is not proposed again"


def test_the_sampler_gp_is_told_the_value_of_every_task_in_all_trials(tmp_path: Path) -> None:
    sampler = opened(sqlite_url(tmp_path / "s.db"), "gp").sampler(1)
    assert isinstance(sampler, FrontSampler)
    assert sampler.weights(1000, []) == {}


def test_a_sampler_for_several_goals_finds_more_of_the_front_than_turns_by_few_trials(tmp_path: Path) -> None:
    volumes = {}
    for until in (0, 25):
        study = opened(sqlite_url(tmp_path / f"{until}.db"), "auto", until, axes=6)
        while study.size < 25:
            finish(study, study.begin(None))
        means = [[m["m"].mean() for m in trial_scores(t).values()] for t in study.complete]
        volumes[until] = hypervolume(np.array(means) + 2.0)
    assert volumes[25] > volumes[0] + 0.15


def test_a_trial_of_a_sampler_for_several_goals_does_not_race(tmp_path: Path) -> None:
    quarter, looks = np.full(4, 0.25), Looks((2, 4), (0.5, 1.0))
    order = Order(np.arange(4), quarter, quarter)
    setup = RaceSetup("i", {"a": 2, "b": 2}, order, np.full(4, 4.0), 0.02, looks, SCALES)
    races = Races(opened(sqlite_url(tmp_path / "s.db"), "auto", until=40), setup)
    assert [races.next(weights)[0] is None for weights in ({}, TURNS[1], None)] == [True, False, False]


@pytest.mark.parametrize(
    ("goals", "seconds", "workers", "count"),
    [
        (2, 1.1, 1, GP_FRONT),
        (3, 1.6, 1, GP_FRONT),
        (3, 1.4, 1, 0),
        (3, 6.1, 4, GP_FRONT),
        (3, 5.9, 4, 0),
        (5, 9, 1, 0),
    ],
)
def test_a_gaussian_process_begins_where_its_proposals_are_short_beside_a_trial(
    goals: int, seconds: float, workers: int, count: int
) -> None:
    assert front_trials(goals, seconds, workers) == count


@pytest.mark.parametrize("sampler", ["cma-es", "tpe"])
def test_without_a_learned_start_the_first_trials_go_by_the_searchs_weights(sampler: str, tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.db")
    stored = open_study(url, "s", create=True)
    stored.set_user_attr(SCALE, SCALES.to_json())
    study = SearchStudy(stored, pareto_space(sampler))
    for _ in range(FIRST + 10):
        finish(study, study.begin(None))
    weights = [t.user_attrs.get(WEIGHTS) for t in study.trials]
    assert weights == [TURNS[k % 5] if k >= FIRST and k % 5 else None for k in range(FIRST + 10)]


@pytest.mark.parametrize("sampler", ["nsga-ii", "qmc", "random"])
def test_samplers_that_have_no_use_for_turns_keep_the_searchs_weights(sampler: str, tmp_path: Path) -> None:
    study = opened(sqlite_url(tmp_path / "s.db"), sampler)
    for _ in range(6):
        finish(study, study.begin(None))
    assert not any(WEIGHTS in t.user_attrs for t in study.trials)


# --- A real search ---


SMALL: dict[str, Any] = {
    "tasks": [{"task": str(ROOT / "evals" / "tiny" / f"{s}.yaml")} for s in ("rev", "add")],
    "splits": {"search": 80, "selection": 10, "holdout": 40},
    "goals": "pareto",
    "budget": {"trials": 26},
}
AT_ONCE = LOOKS_COST_NOTHING + "import evomerge.search.samplers.front as t\nt.FIRST = 0\n"
KILLED = """
import os, signal
import evomerge.search.trial as t
real = t.TrialRunner.job_of
def killed(self, trial, *rest):
    if trial.number == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, trial, *rest)
t.TrialRunner.job_of = killed
"""


@pytest.fixture(scope="module")
def raced(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search for the front whose candidates ran against each other; nothing is learned."""
    return finished_search(write_config(tmp_path_factory.mktemp("turns"), tiny_family, **SMALL), AT_ONCE)


@pytest.mark.more
def test_a_candidate_races_against_the_best_by_its_own_weights(raced: Path) -> None:
    trials = open_run(raced).study().get_trials()
    scale = Scale.from_json(open_run(raced).study().user_attrs[SCALE])
    others = [t for t in trials if WEIGHTS in t.user_attrs and record_of(t).raced]
    assert any(record_of(t).partial for t in others), "nothing was stopped, so this test says nothing"
    differ = 0
    for trial in others:
        mine = scale.weighted(trial.user_attrs[WEIGHTS])
        race = record_of(trial).race
        assert race is not None
        assert race.incumbent is not None
        before = [t for t in trials[: trial.number] if in_full(t)]
        values = {t.number: mine.value(trial_scores(t)) for t in before}
        assert values[race.incumbent] == pytest.approx(max(values.values()), abs=1e-9)
        differ += race.incumbent != max(before, key=lambda t: (t.value or 0.0, -t.number)).number
        if record_of(trial).partial:
            assert trial.value is not None
            assert trial.value <= max(values.values())
        else:
            assert trial.value == pytest.approx(scale.value(trial_scores(trial)), abs=1e-9)
    assert differ, "no incumbent differs from that of the search's weights"


@pytest.mark.more
def test_a_raced_trial_of_other_weights_can_be_repeated(raced: Path) -> None:
    trials = open_run(raced).study().get_trials()
    stopped = next(t for t in trials if WEIGHTS in t.user_attrs and record_of(t).partial)
    done = run_cli("repeat", raced, "--trial", str(stopped.number), prelude=AT_ONCE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.more
def test_a_killed_search_by_turns_goes_on_to_the_same_bits(raced: Path, tiny_family: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, tiny_family, **SMALL)
    killed = run_cli("search", config, "--run", run, prelude=AT_ONCE + KILLED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run_cli("resume", run, prelude=AT_ONCE)
    assert resumed.returncode == 0, resumed.stderr
    assert trials_of(run) == trials_of(raced)
    assert verdict_of(run) == verdict_of(raced)
