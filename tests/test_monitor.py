"""What a search says of itself while it runs: rate, time left and how much of a phase is done."""

import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from searches import run_cli, verdict_of, write_config

from evomerge.config.config_file import load_config
from evomerge.report import progress
from evomerge.report.progress import Bar, Steps
from evomerge.report.terminal import SearchView
from evomerge.search.budget.enough import room, too_short
from evomerge.search.budget.limits import Limits
from evomerge.search.budget.reserve import by_every_metric
from evomerge.search.evaluation.scale import SCALE, Line, Scale, TaskScale
from evomerge.search.monitor.monitor import BATCHES, GRADIENT_STEPS, Monitor
from evomerge.search.monitor.snapshot import Snapshot, WorkerState
from evomerge.search.run import Run
from evomerge.search.storage.trial_record import EvaluationRecord, Seconds, TrialRecord


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, str]] = []
        self.trials: list[Snapshot] = []

    def phase(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def step(self, done: int, total: int, unit: str) -> None:
        self.steps.append((done, total, unit))

    def trial(self, number: int, value: float | None, note: str, snapshot: Snapshot) -> None:
        self.trials.append(snapshot)

    def show(self, snapshot: Snapshot) -> None: ...


@pytest.fixture
def monitor(tiny_family: Path, tmp_path: Path) -> Monitor:
    config = load_config(write_config(tmp_path, tiny_family))
    return Monitor(Run(tmp_path), config, Limits(trials=20), Quiet())


def finish(monitor: Monitor, number: int, seconds: float | None, baseline: str | None = None) -> None:
    """A trial that took so long ends; None: its scores were known."""
    parts = Seconds(total=0.001) if seconds is None else Seconds(forward=seconds, total=seconds)
    monitor.trial(number, 0.5, TrialRecord(seconds=parts), baseline)


def test_one_trial_gives_no_rate_and_known_scores_give_none_at_all(monitor: Monitor) -> None:
    for number in range(4):
        finish(monitor, number, None, f"parent {number}")
    finish(monitor, 4, 2.0)
    assert monitor.snapshot().per_minute is None
    assert monitor.snapshot().left is None
    finish(monitor, 5, 2.0)
    finish(monitor, 6, 2.0)
    assert monitor.snapshot().per_minute == pytest.approx(30.0)
    monitor.attach_workers(lambda: [WorkerState(str(n), "cpu", "busy") for n in range(4)], 4, "float32")
    assert monitor.snapshot().per_minute == pytest.approx(120.0)


def test_the_rate_is_that_of_candidates_as_soon_as_there_are_enough(monitor: Monitor) -> None:
    for number in range(5):
        finish(monitor, number, 6.0, f"baseline {number}")
    assert monitor.snapshot().per_minute == pytest.approx(10.0)
    for number in range(5, 8):
        finish(monitor, number, 1.0)
    assert monitor.snapshot().per_minute == pytest.approx(60.0)


def test_the_time_left_counts_the_steps_to_come_and_the_judging(monitor: Monitor) -> None:
    monitor.reserve(40.0)
    monitor.steps_to_come = True
    for number in range(10):
        finish(monitor, number, 2.0)
    assert monitor.snapshot().left is None, "nobody knows what a gradient step takes"
    monitor.phase("learning", 100, GRADIENT_STEPS, done=50)
    monitor.phase_began -= 10.0
    for _ in range(10):
        monitor.part()
    assert monitor.snapshot().left == pytest.approx(10 * 2.0 + 40 * 1.0 + 40.0, rel=0.05)
    monitor.steps_to_come = False
    assert monitor.snapshot().left == pytest.approx(10 * 2.0 + 40.0, rel=0.05)


def test_judging_uses_up_its_time_and_is_never_below_zero(monitor: Monitor) -> None:
    monitor.reserve(40.0)
    monitor.judge()
    assert monitor.snapshot().left == pytest.approx(40.0, abs=1.0)
    monitor.judging_since = time.monotonic() - 41.0
    assert monitor.snapshot().left is None


def test_a_limit_of_time_is_known_from_the_beginning(monitor: Monitor) -> None:
    monitor.limits = Limits(trials=20, seconds=60.0)
    monitor.steps_to_come = True
    assert monitor.snapshot().left == pytest.approx(60.0, abs=1.0)


def test_parts_are_counted_and_batches_are_those_of_the_present_model(monitor: Monitor) -> None:
    monitor.attach_workers(lambda: [WorkerState("0", "cpu", "busy")], 1, "float32")
    monitor.phase("scoring", 2)
    monitor.step(3, 3)
    assert (monitor.snapshot().parts, monitor.snapshot().step) == ((0, 2), (3, 3))
    for _ in range(3):
        monitor.part()
    assert (monitor.snapshot().parts, monitor.snapshot().step) == ((3, 3), None)
    monitor.step(1, 3)
    monitor.attach_workers(lambda: [WorkerState(str(n), "cpu", "busy") for n in range(2)], 2, "float32")
    assert monitor.snapshot().step is None
    monitor.phase("searching")
    monitor.part()
    assert monitor.snapshot().parts is None


def test_a_bar_takes_more_than_was_expected_and_has_no_rate_at_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "console", Console(file=None, force_terminal=False))
    steps = Steps("scoring")
    for done in range(1, 6):
        time.sleep(0.01)
        steps.step(done, 3)
    steps.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scoring: 1 of 3 batches"
    assert "scoring: 5 of 5 batches" in lines[-1]
    assert not any("-" in line for line in lines)
    assert all(float(line.split(", ")[1].removesuffix("/s")) < 200 for line in lines[1:]), lines


def test_a_bar_shows_bytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "console", Console(file=None, force_terminal=False))
    bar = Bar("merging", 4_000_000, "MB")
    bar.update(2_000_000)
    assert capsys.readouterr().out.startswith("merging: 2 of 4 MB, ")


def test_without_a_terminal_a_long_count_prints_a_bounded_number_of_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    view = SearchView()
    view.screen = Console(force_terminal=False)

    def count(phase: str, steps: int, seconds: float, unit: str = GRADIENT_STEPS) -> list[str]:
        view.phase(phase)
        for done in range(1, 1 + steps):
            clock[0] += seconds
            view.step(done, steps, unit)
        return capsys.readouterr().out.splitlines()

    assert count("scoring", 4, 1.0) == ["scoring ..."], "what is over at once needs no line"
    lines = count("learning", 100, 7.0)
    assert lines[:3] == ["learning ...", "learning: 1 of 100 gradient steps", "learning: 6 of 100 gradient steps"]
    assert lines[-1] == "learning: 100 of 100 gradient steps"
    assert len(lines) < 700 / progress.LINE_SECONDS + 3, "and not one a step"
    models = [line for n in range(5) for line in count("judging", 2, 3.0, BATCHES)]
    assert models == ["judging ...", "judging: 2 of 2 batches of one model"], "the next model is no reason for a line"


def test_the_reserve_takes_what_base_and_parents_took_by_every_metric() -> None:
    scale = Scale({"math": TaskScale(1.0, 0.0, Line("gold_logprob"), Line("exact_match"))})

    def entry(metrics: list[str], **options: Any) -> dict[str, Any]:
        return EvaluationRecord(scores={"math": dict.fromkeys(metrics, "")}, scored=10, **options).to_json()

    attributes = {
        SCALE: scale.to_json(),
        "scores:search:a": entry(["gold_logprob", "exact_match"]),
        "scores:search:b": entry(["gold_logprob"]),
        "scores:search:c": entry(["gold_logprob", "exact_match"], partial=0.5),
        "scores:holdout:d": entry(["gold_logprob", "exact_match"]),
    }
    assert len(by_every_metric(attributes)) == 1
    assert by_every_metric({}) == []


def test_a_search_says_what_it_does_from_its_first_second(tiny_family: Path, tmp_path: Path) -> None:
    sampler = {"name": "auto", "steps": 4}
    config = write_config(tmp_path, tiny_family, sampler=sampler, budget={"trials": 12})
    done = run_cli("search", config, "--run", tmp_path / "run", "--check")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    order = (
        "loading PyTorch and transformers ...", "opening the models ...", "opening the tasks ...",
        "preparing a look at the search ...", "hashing the files of the models ...", "measuring the sources ...",
        "scoring base and parents ...", "scoring the baselines outside the space ...", "trying the baselines ...",
        "choosing where races look, and making the greedy soup ...", "learning the coefficients ...", "searching ...",
        "judging: finalists and baselines on the selection items ...",
        "judging: the chosen model and the baselines on the holdout items ...", "report ...",
    )  # fmt: skip
    places = [lines.index(line) for line in order]
    assert places == sorted(places), done.stdout
    trials = [line for line in lines if line.startswith("trial ")]
    assert not any("/min" in line or "per minute" in line for line in trials[:2]), trials
    assert "per minute" in trials[-1]


def test_a_time_limit_with_room_for_few_candidates_is_told_with_what_would_be_enough() -> None:
    assert room(left=100.0, reserve=20.0, trial=2.0, workers=1, baselines=10) == 30
    assert too_short(100.0, 20.0, 2.0, 1, 10, proposed=0, elapsed=5.0) is None
    said = too_short(50.0, 20.0, 2.0, 1, 10, proposed=0, elapsed=5.0)
    assert said is not None
    assert "room for about 5 candidates" in said
    assert "--timeout 85s" in said, "5 + 20 + 30 trials of 2 s"
    assert too_short(50.0, 20.0, 2.0, 4, 10, proposed=0, elapsed=5.0) is None, "four workers try as many as needed"
    late = too_short(10.0, 20.0, 2.0, 1, 10, proposed=0, elapsed=5.0)
    assert late is not None
    assert "room for no candidate" in late
    assert "the result comes late" in late


def test_a_search_without_time_says_so_before_it_starts_and_its_verdict_is_that_too_little_was_searched(
    tiny_family: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_family)
    done = run_cli("search", config, "--run", tmp_path / "run", "--timeout", "1s", "--check")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = next(k for k, line in enumerate(lines) if "leaves room for about 0 candidates" in line)
    assert "give it" in lines[told + 1]
    assert told < lines.index(f"run folder: {tmp_path / 'run'}")
    assert any(line.startswith("note: the time limit leaves room for no candidate") for line in lines)
    assert verdict_of(tmp_path / "run")["outcome"] == "too little searched"
    again = run_cli("resume", tmp_path / "run", "--trials", "40")
    assert again.returncode == 0, again.stderr
    assert verdict_of(tmp_path / "run")["outcome"] != "too little searched"
