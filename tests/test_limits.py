"""When a search ends, and the time that it keeps for what follows."""

import os
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from models import write_family
from searches import Done, finished_search, run_cli, trials_of, verdict_of, write_config

from evomerge.config.config_file import load_config
from evomerge.config.running import BudgetConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.tasks import SPLITS
from evomerge.search.budget.limits import Deadline, Limits, Moment, SearchProgress, deadline_of, limits_of
from evomerge.search.budget.reserve import FIXED, RemainingWork, StepSeconds, remaining_work, reserve_seconds
from evomerge.search.models import open_config_models
from evomerge.search.run import open_run
from evomerge.search.space.space import build_space
from evomerge.search.storage.database import open_study, sqlite_url
from evomerge.search.storage.study import LearnedPoint, SearchStudy
from evomerge.search.storage.trial_record import TrialRecord, record_of
from evomerge.search.verdict.finalists import FINALISTS

QUICK = {"search": 12, "selection": 4, "holdout": 8}  # items of a search whose verdict is not the point
START = Moment(1_000_000.0, 500.0)

# --- The limits themselves ---

trials = st.lists(st.tuples(st.none() | st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.booleans()), max_size=12).flatmap(
    lambda found: st.permutations(list(enumerate(found)))
)


@given(trials)
def test_progress_is_the_same_in_whatever_order_trials_finish(finished: list[tuple[int, Any]]) -> None:
    progress = SearchProgress()
    for number, (value, sampled) in finished:
        progress.add(number, value, sampled)
    best = max((v for _, (v, _) in finished if v is not None), default=None)
    first = min((n for n, (v, _) in finished if v is not None and v == best), default=-1)
    assert (progress.best, progress.best_number) == (best, first)
    assert progress.trials == len(finished)
    assert progress.since_best == sum(sampled for n, (_, sampled) in finished if n > first)


def after(values: str, baselines: int = 0) -> SearchProgress:
    """The progress of trials with these values, `x` for one that was not evaluated in full; the first are baselines."""
    progress = SearchProgress()
    for number, value in enumerate(values.split()):
        progress.add(number, None if value == "x" else float(value), number >= baselines)
    return progress


def test_trials_end_a_search_whatever_became_of_them() -> None:
    assert Limits(trials=3).reached(after("x x"), 0.0, START) is None
    assert "3 trials" in str(Limits(trials=3).reached(after("x x x"), 0.0, START))


def test_a_target_is_reached_by_a_trial_evaluated_in_full_baselines_among_them() -> None:
    limits = Limits(target=0.5)
    assert limits.reached(after("0.4 x 0.3"), 0.0, START) is None
    assert "trial 1 reached 0.5000, the target is 0.5" in str(limits.reached(after("0.4 0.5", 2), 0.0, START))


def test_patience_counts_sampled_trials_since_the_best_one() -> None:
    limits = Limits(patience=3)
    assert limits.reached(after("0.5 0.1 0.1 0.1", baselines=4), 0.0, START) is None
    assert limits.reached(after("0.5 x 0.5 0.1"), 0.0, START) is not None, "an equal score is no better"
    assert limits.reached(after("0.5 0.1 0.1 0.6 0.2 x"), 0.0, START) is None
    assert limits.reached(after("0.5 0.1 0.1 0.6 0.2 x 0.3"), 0.0, START) is not None


def test_time_ends_a_search_when_only_the_reserve_is_left() -> None:
    limits = Limits(seconds=100.0)
    assert limits.reached(after("0.5"), 69.0, START, reserve=30.0) is None
    end = limits.reached(after("0.5"), 70.0, START, reserve=30.0)
    assert end == "30 s are left, and judging the finalists may take 30 s"


def test_time_ends_nothing_before_there_is_a_candidate() -> None:
    limits = Limits(seconds=1.0, deadline=Deadline(START), target=0.0, patience=1)
    assert limits.reached(after("x x"), 1000.0, START, reserve=30.0) is None
    assert limits.reached(after("x x -1"), 1000.0, START, reserve=30.0) is not None


def test_whichever_limit_comes_first() -> None:
    limits = Limits(seconds=100.0, deadline=Deadline(Moment(START.wall + 50, START.steady + 50)))
    assert limits.seconds_left(10.0, START) == 50.0
    assert limits.seconds_left(80.0, START) == 20.0
    assert Limits(trials=4).seconds_left(80.0, START) == float("inf")
    assert [Limits(trials=1).timed, Limits(seconds=1.0).timed, Limits(deadline=Deadline(START)).timed] == [0, 1, 1]


@given(st.floats(-1e6, 1e6), st.floats(0, 1e5))
def test_a_clock_that_is_set_gives_no_more_time(jump: float, passed: float) -> None:
    """The deadline is a wall time and as long by the monotonic clock; the first of the two ends the search."""
    deadline = Deadline(Moment(START.wall + 3600, START.steady + 3600))
    left = deadline.seconds_left(Moment(START.wall + passed + jump, START.steady + passed))
    assert left <= 3600 - passed + 1e-6  # seconds since the epoch have seven digits to spare
    assert left == pytest.approx(3600 - passed - max(0.0, jump))


# --- The command line and the configuration ---


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone that goes over to summer time on 29 March 2026 at 2:00, and back on 25 October at 3:00."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("now", "until", "hours"),
    [
        ("2026-02-10 22:00", "07:00", 9),
        ("2026-02-10 06:59", "07:00", 1 / 60),
        ("2026-02-10 07:00", "07:00", 24),
        ("2026-03-28 22:00", "07:00", 8),  # an hour is left out
        ("2026-10-24 22:00", "07:00", 10),  # an hour comes twice
        ("2026-03-28 22:00", "02:30", 4.5),  # there is no 2:30 that night: 3:30 it is
        ("2026-10-24 22:00", "02:30", 4.5),  # the first 2:30
    ],
)
def test_until_is_local_time_across_changes_to_summer_time(now: str, until: str, hours: float) -> None:
    wall = datetime.fromisoformat(now).timestamp()
    at = deadline_of(until, Moment(wall, 10.0)).at
    assert at.wall - wall == pytest.approx(3600 * hours)
    assert at.steady == pytest.approx(10.0 + 3600 * hours)


@pytest.mark.usefixtures("berlin")
def test_in_the_hour_that_comes_again_until_is_still_to_come() -> None:
    wall = datetime(2026, 10, 25, 2, 45, fold=0).timestamp()
    assert deadline_of("02:30", Moment(wall, 0.0)).at.wall - wall == pytest.approx(45 * 60)


@pytest.mark.parametrize("text", ["7 am", "25:00", "", "07:00:00", "-1:00", "soon"])
def test_what_is_no_time_of_day(text: str) -> None:
    with pytest.raises(EvomergeError, match=r"--until: .* is not a time of day; write 07:00"):
        deadline_of(text, START)


def test_a_budget_that_is_sure_to_end_needs_no_hundred_trials() -> None:
    assert BudgetConfig().most == 100
    assert BudgetConfig(target=0.9).most == 100
    assert BudgetConfig(patience=20).most is None
    assert limits_of(BudgetConfig(), "07:00").trials is None
    assert limits_of(BudgetConfig(trials=50), "07:00").trials == 50


def refusal(done: Done) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_wrong_limits_are_refused_before_there_is_a_run(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family)
    run = tmp_path / "run"
    assert "--target: Input should be a finite number" in refusal(
        run_cli("search", config, "--run", run, "--target=nan")
    )
    assert "--patience" in refusal(run_cli("search", config, "--run", run, "--patience", "0"))
    assert "--timeout: '8 hours'" in refusal(run_cli("search", config, "--run", run, "--timeout", "8 hours"))
    assert "--until: '7 am'" in refusal(run_cli("search", config, "--run", run, "--until", "7 am"))
    wrong = write_config(tmp_path, tiny_family, budget={"patience": 0, "target": "high"}, price={"per_device_hour": -1})
    said = refusal(run_cli("search", wrong, "--run", run))
    assert all(key in said for key in ("budget.patience", "budget.target", "price.per_device_hour", "price.currency"))
    assert not run.exists()


def test_an_output_folder_with_something_in_it_is_refused_before_the_search(tiny_family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    done = run_cli("search", write_config(tmp_path, tiny_family), "--run", tmp_path / "run", "--out", out)
    assert "is not an empty folder" in refusal(done)
    assert not (tmp_path / "run").exists()


# --- The reserve ---

SECONDS = StepSeconds(merge=2.0, item=0.1, trial=5.0, objective=0.02, draw=0.001)
WORK = RemainingWork({"search": 1, "selection": 6, "holdout": 5}, {"search": 100, "selection": 50, "holdout": 200})


def test_the_reserve_is_the_formula_that_it_states() -> None:
    scoring = (2 + 2) + 6 * (2 + 5) + 5 * (2 + 20)
    assert reserve_seconds(SECONDS, WORK) == pytest.approx(FIXED + 1.3 * (5 + scoring + 3 * 200 * 0.001))
    assert reserve_seconds(SECONDS, RemainingWork()) == pytest.approx(FIXED + 1.3 * 5)


@given(st.integers(1, 64))
def test_workers_side_by_side_need_as_many_rounds_as_models_ask_for(workers: int) -> None:
    assert reserve_seconds(SECONDS, WORK, workers + 1) <= reserve_seconds(SECONDS, WORK, workers)
    alone = reserve_seconds(SECONDS, RemainingWork({"holdout": 1}, WORK.items))
    assert reserve_seconds(SECONDS, RemainingWork({"holdout": workers}, WORK.items), workers) == alone


def test_learned_points_that_are_not_among_the_best_are_finalists_too(tmp_path: Path) -> None:
    write_family(tmp_path, ("rev", "add"))
    config = load_config(write_config(tmp_path, tmp_path, sampler={"name": "random"}))
    space = build_space(config, open_config_models(config))

    def judged(name: str, weights: dict[str, float] | None) -> int:
        study = SearchStudy(open_study(sqlite_url(tmp_path / name), "s", create=True), space)
        points = [dict.fromkeys(space.axes, 0.1 * k) for k in range(3)]
        for learned in (*(LearnedPoint(k + 1, p, weights) for k, p in enumerate(points)), *[None] * FINALISTS):
            trial = study.begin(None, learned)
            study.finish(trial, float(trial.number), TrialRecord())
        return remaining_work(study, {}, [], dict.fromkeys(SPLITS, 10)).models["selection"]

    assert judged("own.db", None) == 3 + judged("others.db", {"tiny_rev": 1.0})


# --- Real searches ---


def test_a_search_ends_at_its_target_and_exports_what_it_recommends(tiny_family: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    config = write_config(tmp_path, tiny_family, budget={"trials": 60, "target": -2.0}, splits=QUICK, scale="none")
    done = run_cli("search", config, "--run", run, "--out", out)
    assert done.returncode == 0, done.stderr
    *before, last = [t[3] for t in trials_of(run) if t[3] is not None]
    assert last >= -2.0 > max(before)
    assert (out / "model.safetensors").exists()
    assert "The search ran" in (out / "README.md").read_text()
    assert "the target is -2" in (run / "log.txt").read_text()


def test_patience_ends_a_search_and_the_time_of_its_sessions_adds_up(tiny_family: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_family, budget={"patience": 2}, splits=QUICK, sampler={"name": "random"})
    run = finished_search(config)
    trials = trials_of(run)
    best = max((t for t in trials if t[1] == "COMPLETE"), key=lambda t: (t[3] or 0.0, -t[0]))
    assert trials[-1][0] - best[0] >= 2
    assert run_cli("resume", run, "--timeout", "1s", "--patience", "100").returncode == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["budget"] == {"timeout": 1.0, "patience": 100}
    assert trials_of(run) == trials, "the first session has taken the second that there was"


@pytest.mark.slow
def test_the_verdict_is_there_at_the_deadline(tiny_family: Path, tmp_path: Path) -> None:
    """By the run's own clock, which starts when the command has read its inputs."""
    config = write_config(tmp_path, tiny_family, budget={"timeout": "30s"})
    run, out = tmp_path / "run", tmp_path / "merged"
    began = time.time()
    done = run_cli("search", config, "--run", run, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "judging the finalists may take" in (run / "log.txt").read_text()
    elapsed = [e.seconds for t in open_run(run).study().get_trials(deepcopy=False) if (e := record_of(t).elapsed)]
    assert elapsed == sorted(elapsed)
    assert len(elapsed) > 5, "the reserve took it all"
    started = os.stat(run / "run.json").st_mtime
    assert (run / "report.html").stat().st_mtime - started < 32
    assert out.stat().st_mtime - started < 33
    assert verdict_of(run)["chosen"]
    assert time.time() - began < 120
