"""One driver at a time, shown with real processes."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from postgres import running_server
from test_storage import space_of

import evomerge.search.storage.study_lease as module
from evomerge.errors import EvomergeError
from evomerge.search.storage.database import Retry, open_study, sqlite_url
from evomerge.search.storage.study import SearchStudy
from evomerge.search.storage.study_lease import LEASE, Holder, acquire_lease, machine_id, parse, process_start
from evomerge.search.storage.trial_record import TrialRecord

FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.more)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "s.db")
    else:
        with running_server() as server:
            yield server.url


def holder_of(url: str) -> Holder | None:
    """Who holds the study, as Optuna's own attributes say."""
    return parse(json.dumps(open_study(url, "s", create=False).user_attrs.get(LEASE)))


def contend(url: str, start: Any, end: Any, told: Connection) -> None:
    """A driver's beginning: what `lease` said, and then a life until the end."""
    study = open_study(url, "s", create=False)
    start.wait()
    try:
        told.send(acquire_lease(study).holder)
    except EvomergeError as error:
        told.send(str(error))
    end.wait()


def test_of_drivers_that_start_at_the_same_moment_one_wins(url: str) -> None:
    open_study(url, "s", create=True)
    start, end = FORK.Barrier(4), FORK.Event()
    pipes = [FORK.Pipe(duplex=False) for _ in range(4)]
    drivers = [FORK.Process(target=contend, args=(url, start, end, there)) for _, there in pipes]
    for driver in drivers:
        driver.start()
    said = [here.recv() for here, _ in pipes]
    end.set()
    for driver in drivers:
        driver.join()
    winners = [s for s in said if isinstance(s, Holder)]
    assert len(winners) == 1
    assert holder_of(url) == winners[0]
    refusal = f"study 's': process {winners[0].pid} on {winners[0].host} is working on it"
    assert sum(str(s).startswith(refusal) for s in said) == 3


def test_a_killed_holder_is_followed_at_once_and_a_living_one_never(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.db")
    study = open_study(url, "s", create=True)
    here, there = FORK.Pipe(duplex=False)
    driver = FORK.Process(target=contend, args=(url, FORK.Barrier(1), FORK.Event(), there))
    driver.start()
    first = here.recv()
    assert driver.pid is not None
    os.kill(driver.pid, signal.SIGSTOP)  # suspended is not dead
    with pytest.raises(EvomergeError, match=f"process {driver.pid} on "):
        acquire_lease(study, every=60)
    os.kill(driver.pid, signal.SIGKILL)
    while process_start(driver.pid) is not None:
        time.sleep(0.01)
    started = time.monotonic()
    mine = acquire_lease(study, every=60)  # its parent has not asked for its exit code yet
    assert time.monotonic() - started < 30
    assert mine.before == first
    driver.join()
    mine.beat()
    mine.release()
    assert holder_of(url) is None
    assert acquire_lease(study).before is None


def test_a_process_number_that_was_given_out_again_is_not_the_holder(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.db")
    study = open_study(url, "s", create=True)
    other = replace(acquire_lease(study).holder, started=1)
    study.set_user_attr(LEASE, json.loads(other.text))
    assert acquire_lease(open_study(url, "s", create=False), every=60).before == other


def elsewhere(every: float) -> Holder:
    """A holder on another machine_id whose clock is years off."""
    return Holder("far", "far", os.getpid(), 1, "0" * 16, every, 0, clock=1.0)


def test_a_holder_elsewhere_is_followed_when_its_beats_stand_still(tmp_path: Path) -> None:
    study = open_study(sqlite_url(tmp_path / "s.db"), "s", create=True)
    study.set_user_attr(LEASE, json.loads(elsewhere(0.2).text))
    started = time.monotonic()
    assert acquire_lease(study, every=0.01).before == elsewhere(0.2)
    assert time.monotonic() - started >= 0.6


def test_a_holder_elsewhere_that_beats_keeps_the_study_also_over_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server() as server:
        retry = Retry(lambda: None, lambda line: None)
        study = open_study(server.url, "s", create=True, retry=retry)
        with monkeypatch.context() as patch:
            patch.setattr(module, "machine_id", lambda: "far")
            held = acquire_lease(open_study(server.url, "s", create=True, retry=retry), every=0.5)

        def outage() -> None:
            server.kill()
            beat.start()
            time.sleep(1.5)
            server.start()

        # It comes when three intervals are nearly over, and after it the holder is given its time again.
        beat, gone = threading.Thread(target=held.beat), threading.Timer(1.3, outage)
        gone.start()
        with pytest.raises(EvomergeError, match="is working on it"):
            acquire_lease(study)
        gone.join()
        beat.join()


def suspended(url: str, told: Connection) -> None:
    """A driver elsewhere that is stopped for a while, and what each of its writes says afterwards."""
    module.machine_id = lambda: "far"  # type: ignore[assignment]
    study = SearchStudy(open_study(url, "s", create=True), space_of(sampler="random"))
    begun = study.begin(None)
    held = acquire_lease(study.stored, every=0.1)
    told.send(held.holder)
    os.kill(os.getpid(), signal.SIGSTOP)
    for work in (
        held.beat,
        lambda: study.finish(begun, 1.0, TrialRecord()),
        lambda: study.begin(None),
        lambda: study.stored.set_user_attr("x", 1),
        held.release,
    ):
        try:
            told.send(str(work()))
        except EvomergeError as error:
            told.send(error.args[0])


def test_a_holder_that_was_suspended_and_followed_writes_nothing_more(url: str) -> None:
    here, there = FORK.Pipe(duplex=False)
    driver = FORK.Process(target=suspended, args=(url, there))
    driver.start()
    there.close()
    assert driver.pid is not None
    first = here.recv()
    os.waitpid(driver.pid, os.WUNTRACED)
    study = SearchStudy(open_study(url, "s", create=True), space_of(sampler="random"))
    mine = acquire_lease(study.stored)
    assert mine.before == first
    os.kill(driver.pid, signal.SIGCONT)
    said = [here.recv() for _ in range(5)]
    for text in said[:4]:
        assert text.startswith(f"study 's': process {os.getpid()} on {mine.holder.host} took over")
    assert said[4] == "None"
    assert [t.state.name for t in study.stored.get_trials()] == ["RUNNING"]
    assert set(study.stored.user_attrs) == {LEASE}
    assert holder_of(url) == mine.holder


def test_this_system_tells_its_processes_apart() -> None:
    assert machine_id()
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(2**22 + 1) is None
