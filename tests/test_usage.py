"""What a search used: counted where it happens, added up over trials, told in the end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from searches import ROOT, finished_search, run_cli, write_config

from evomerge.config.running import PriceConfig
from evomerge.config.tasks import TaskConfig
from evomerge.evaluate.clock import Clock, Counts, forwards_of
from evomerge.evaluate.engine import Engine
from evomerge.evaluate.loglikelihood import Plan, Row, plan_batches
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.evaluate.tasks import items_of
from evomerge.merge.live import open_live_model
from evomerge.report.progress import seconds_text
from evomerge.report.status import read_status
from evomerge.report.usage_text import count_text, usage_text
from evomerge.search.budget.meter import Meter, nvml_counter
from evomerge.search.budget.usage import Elapsed, Stopwatch, Usage, used_by
from evomerge.search.monitor.monitor import price_of
from evomerge.search.run import open_run
from evomerge.search.storage.trial_record import record_of

whole = st.integers(0, 10**9)
amounts = whole.map(float)
usages = st.builds(Usage, amounts, amounts, amounts, whole, whole, whole, whole, st.none() | amounts)


@given(usages, usages, usages)
def test_usages_add_up_in_any_order(a: Usage, b: Usage, c: Usage) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a + Usage() == a


@given(usages)
def test_a_usage_is_read_back_and_unknown_energy_is_no_zero(used: Usage) -> None:
    assert Usage.from_dict(used.as_dict()) == used
    assert ("joules" in used.as_dict()) == (used.joules is not None)
    assert Usage.from_dict({**used.as_dict(), "of a later version": 1}) == used


def test_a_stopwatch_goes_on_from_earlier_sessions_and_counts_the_devices_that_are_held() -> None:
    times = iter([100.0, 110.0, 110.0, 110.0, 125.0])
    watch = Stopwatch(devices=2, clock=lambda: next(times))
    watch.add_earlier(Elapsed(1000.0, 3000.0))
    assert watch.elapsed == Elapsed(1010.0, 3020.0)
    watch.set_devices(4)
    assert watch.elapsed == Elapsed(1025.0, 3080.0)


# --- Forwards and tokens ---


@pytest.fixture(scope="module")
def opened(tiny_family: Path) -> tuple[Any, Any]:
    return open_live_model(tiny_family / "rev", None, "float32", torch.device("cpu"))


@pytest.mark.parametrize("steps", [True, False], ids=["own generation", "lm-eval's"])
def test_every_forward_is_counted_with_its_tokens(
    opened: tuple[Any, Any], steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted by the plan of the batches is what a hook on the model sees."""
    model, tokenizer = opened
    (task,) = open_tasks([TaskConfig(task=str(ROOT / "evals" / "tiny" / "rev.yaml"))])
    engine = Engine(model, tokenizer, 128)
    if not steps:
        monkeypatch.setattr(engine, "capabilities", replace(engine.capabilities, steps=False))
    work = engine.prepare(task, items_of(task, task.docs)[:12], everything=True)
    assert work.rows
    assert work.prompts
    clock, seen = Clock(), Counts()
    with forwards_of(model, seen):
        engine.score(work, clock)
    assert (clock.counts.forwards, clock.counts.padded) == (seen.forwards, seen.padded)
    assert 0 < clock.counts.tokens <= clock.counts.padded


def test_padding_is_no_token() -> None:
    """The same rows one by one and together: as many real tokens, and padding only beside the longest."""
    rows = [Row(tuple(range(n)), 1) for n in (4, 7, 9)]
    for budget, padded in ((1, 3 + 6 + 8), (100, 3 * 8)):
        batches = plan_batches(rows, Plan(budget, torch.device("cpu"), vocabulary=10, packs=False))
        assert sum(b.tokens for b in batches) == 3 + 6 + 8
        assert sum(b.inputs.numel() for b in batches) == padded


def test_a_meter_counts_what_was_done_before_an_error() -> None:
    counts = Counts(forwards=7, tokens=70, padded=90)
    meter = Meter(counts, torch.device("cpu"))

    def broken_job() -> None:
        with meter:
            counts.add(5, 8)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        broken_job()
    used = meter.used
    assert (used.forwards, used.tokens, used.padded, used.joules) == (1, 5, 8, None)
    assert 0 < used.seconds == used.worker_seconds < 5
    assert used.peak_bytes > 50_000_000, "this process holds torch"


def test_without_an_energy_counter_there_is_no_energy() -> None:
    assert nvml_counter(torch.device("cuda", 97))() is None


# --- A run ---


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    price = {"per_device_hour": 3600.0, "currency": "EUR"}
    folder = tmp_path_factory.mktemp("usage")
    return finished_search(write_config(folder, tiny_family, budget={"trials": 8}, price=price))


def test_a_runs_usage_is_that_of_its_trials_and_its_other_evaluations(finished: Path) -> None:
    status = read_status(open_run(finished))
    each = [record_of(t).used or Usage() for t in status.trials]
    assert any(u.forwards for u in each)
    assert all(u.tokens <= u.padded and u.peak_bytes for u in each if u.forwards)  # parents were scored before
    trials = used_by(status.trials, {})
    assert trials.forwards == sum(u.forwards for u in each)
    assert status.used.forwards > trials.forwards, "baselines and finalists were evaluated outside of trials"
    assert status.used.worker_seconds < status.used.device_seconds == status.used.seconds
    assert status.price == (pytest.approx(status.used.device_seconds), "EUR")


def test_status_report_and_card_tell_it(finished: Path, tmp_path: Path) -> None:
    status = read_status(open_run(finished))
    told = usage_text(status.used, status.price)
    assert f"{count_text(status.used.tokens)} tokens" in told
    assert told in run_cli("status", finished).stdout
    assert told in (finished / "report.html").read_text()
    assert run_cli("export", finished, "--out", tmp_path / "merged").returncode == 0
    assert f"The search ran 8 trials and used: {told}." in (tmp_path / "merged" / "README.md").read_text()


def test_an_export_needs_no_study(finished: Path, tmp_path: Path) -> None:
    """The recipe is in the run folder; a database that cannot be reached costs the card a line."""
    (finished / "config.yaml").write_text(
        (finished / "config.yaml").read_text() + "storage: postgresql://nobody@127.0.0.1:1/x\n"
    )
    assert run_cli("export", finished, "--out", tmp_path / "merged").returncode == 0
    assert "The search ran" not in (tmp_path / "merged" / "README.md").read_text()


def test_numbers_are_said_as_a_person_says_them() -> None:
    assert [count_text(x) for x in (950, 12_345, 4.5e6, 2e9, 3e12)] == ["950", "12.3k", "4.5M", "2.0G", "3.0T"]
    assert [seconds_text(x) for x in (5, 600, 12_000)] == ["5s", "10m", "3h 20m"]
    used = Usage(7200, 5400, 7200, 10, 1000, 1200, 2 * 10**9, 7.2e6)
    assert usage_text(used, price_of(7200, PriceConfig(per_device_hour=2.5, currency="EUR"))) == (
        "2h 0m wall time, 2h 0m device time (75% of it computing), 1.0k tokens in 10 forwards, "
        "peak memory 2.0GB, 2 kWh, 5.00 EUR"
    )
