"""A study in its database: trials in hand in any number, crashes at any moment, a driver at a time."""

import json
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from postgres import PASSWORD, QUOTED, Proxy, Server, running_server

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.search.space.space import Group, Space
from evomerge.search.storage.database import Retry, open_study, sqlite_url, storage_of
from evomerge.search.storage.study import Begun, SearchStudy, in_full, trial_seconds
from evomerge.search.storage.study_lease import LEASE, acquire_lease, parse
from evomerge.search.storage.trial_record import Seconds, TrialRecord, record_of


def space_of(dimensions: int = 3, sampler: str = "cma-es", population: int | None = 4) -> Space:
    """A space of that many axes from 0 to 1, without any model."""
    config = SearchConfig.model_validate(
        {
            "name": "x",
            "base": "b",
            "sources": [{"name": "a", "path": "a"}],
            "method": "linear",
            "tasks": [{"task": "t"}],
            "sampler": {"name": sampler, "population": population if sampler == "cma-es" else None},
        }
    )
    groups = tuple(Group("weight", f"s{k}", "default", "model", 0.0, 1.0, (f"w{k}",)) for k in range(dimensions))
    return Space(config, 1, groups)


def opened(url: str, **options: Any) -> SearchStudy:
    return SearchStudy(open_study(url, "s", create=True), space_of(**options))


def fitness(begun: Begun) -> float:
    return -sum((value - 0.3 - 0.1 * k) ** 2 for k, value in enumerate(begun.params.values()))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_trials_may_end_in_any_order_and_the_process_at_any_moment(tmp_path_factory: Any, seed: int) -> None:
    """Trials begin, end, fail and are stopped at random; now and then the process state is thrown away."""
    rng = random.Random(seed)
    url = sqlite_url(tmp_path_factory.mktemp("study") / "s.db")
    study = opened(url, sampler="random")
    hand: dict[int, Begun] = {}
    ended: list[tuple[int, float | None]] = []
    points: dict[int, dict[str, float]] = {}
    while len(ended) < 14:
        action = rng.random()
        if action < 0.08:
            study = opened(url, sampler="random")
            assert study.count == len(ended)
            again = [study.begin(None) for _ in range(rng.randint(0, len(hand)))]
            assert [b.number for b in again] == sorted(hand)[: len(again)]
            hand = {b.number: b for b in again}
        elif action < 0.55 or not hand:
            begun = study.begin((f"b{study.count}", dict.fromkeys(study.space.axes, 0.5)) if action < 0.2 else None)
            hand[begun.number] = begun
            assert points.setdefault(begun.number, begun.params) == begun.params
        else:
            begun = hand.pop(rng.choice(sorted(hand)))
            value = None if rng.random() < 0.2 else rng.choice([0.25, rng.random()])
            record = TrialRecord(
                partial=0.5 if (stopped := rng.random() < 0.2) else None,
                broken="x" if not stopped and rng.random() < 0.2 else None,
                seconds=Seconds(total=0.5),
            )
            study.finish(begun, value, record)
            ended.append((begun.number, value))
        for seen in (study, opened(url, sampler="random")) if rng.random() < 0.1 else (study,):
            check_books(seen, ended)
            assert {t.number for t in seen.trials} == set(range(len(points)))
            assert all(t.params == points[t.number] for t in seen.trials)
            assert all(t.state == TrialState.RUNNING for t in seen.trials if t.number not in dict(ended))


def check_books(study: SearchStudy, ended: list[tuple[int, float | None]]) -> None:
    """What is kept beside the trials is what one would compute from them."""
    assert [(t.number, t.value) for t in study.finished] == ended
    assert [record_of(t).order for t in study.finished] == list(range(len(ended)))
    assert study.complete == [t for t in study.trials if in_full(t)]
    assert study.best == max(study.complete, key=lambda t: (t.value, -t.number), default=None)
    assert study.penalty == min((v for _, v in ended if v is not None), default=None)
    assert study.seconds == pytest.approx(sum(map(trial_seconds, study.trials)))
    names = {t.user_attrs["baseline"]: t for t in study.trials if "baseline" in t.user_attrs}
    assert set(study.baselines) == set(names)
    for name, trial in names.items():
        assert study.of_baseline(name) == (trial if trial.state.is_finished() else None)


@pytest.mark.parametrize("sampler", ["cma-es", "tpe", "nsga-ii", "qmc", "random"])
def test_a_row_without_parameters_gets_the_point_that_its_number_would_have_had(tmp_path: Path, sampler: str) -> None:
    whole = opened(sqlite_url(tmp_path / "whole.db"), sampler=sampler)
    expected = [whole.begin(None) for _ in range(4)]
    study = opened(sqlite_url(tmp_path / "s.db"), sampler=sampler)
    for _ in range(3):
        study.begin(None)
    study.stored.ask()  # a row of Optuna's own making: running, without parameters
    again = opened(sqlite_url(tmp_path / "s.db"), sampler=sampler)
    resumed = [again.begin(None) for _ in range(4)]
    assert [(b.number, b.params) for b in resumed] == [(b.number, b.params) for b in expected]
    there = open_study(sqlite_url(tmp_path / "s.db"), "s", create=False).get_trials()
    assert [(t.state, t.params) for t in there] == [(TrialState.RUNNING, b.params) for b in expected]


def test_a_point_that_a_person_enqueued_with_optuna_is_tried(tmp_path: Path) -> None:
    study = opened(sqlite_url(tmp_path / "s.db"))
    wanted = dict.fromkeys(study.space.axes, 0.75)
    study.stored.enqueue_trial(wanted)
    again = opened(sqlite_url(tmp_path / "s.db"))
    begun = again.begin(None)
    assert (begun.number, begun.params) == (0, wanted)
    again.finish(begun, 1.0, TrialRecord())
    assert opened(sqlite_url(tmp_path / "s.db")).best.params == wanted  # type: ignore[union-attr]


def test_optunas_own_storage_reads_what_ours_does(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.db")
    study = opened(url)
    for number in range(6):
        begun = study.begin(("mine", dict.fromkeys(study.space.axes, 0.5)) if number == 2 else None)
        if number != 4:
            value = None if number == 1 else float("-inf") if number == 5 else fitness(begun)
            study.finish(begun, value, TrialRecord(seconds=Seconds(total=1.5)))
    theirs = optuna.load_study(storage=optuna.storages.RDBStorage(url), study_name="s").get_trials()
    assert open_study(url, "s", create=False).get_trials() == theirs
    assert len(theirs) == 6
    complete = (TrialState.COMPLETE,)
    ours = open_study(url, "s", create=False)
    assert ours.get_trials(states=complete) == [t for t in theirs if t.state in complete]
    assert ours.best_trial.number == theirs[max(0, 2, 3, key=lambda n: theirs[n].value)].number  # type: ignore[return-value, arg-type]


def test_trials_that_another_program_added_are_noticed(tmp_path: Path) -> None:
    study = opened(sqlite_url(tmp_path / "s.db"))
    study.begin(None)
    open_study(sqlite_url(tmp_path / "s.db"), "s", create=False).ask()
    with pytest.raises(Exception, match="trial 1: another program has added trials"):
        study.begin(None)
    engine = storage_of(study.stored).engine
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("select count(*) from trials")).scalar() == 2


def test_a_study_is_resumed_without_unpickling_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = sqlite_url(tmp_path / "s.db")
    study = opened(url)
    for _ in range(9):
        begun = study.begin(None)
        study.finish(begun, fitness(begun), TrialRecord())
    expected = study.begin(None)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    again = opened(url)
    begun = again.begin(None)
    assert begun == expected
    again.finish(begun, 1.0, TrialRecord())
    assert again.begin(None).number == 10


def filled(file: Path) -> None:
    """A study file with trials in it, as it lies there when no process has it open."""
    study = opened(sqlite_url(file), sampler="random", dimensions=8)
    for number in range(20):
        study.finish(study.begin(None), float(number), TrialRecord(items="x" * 3000))
    storage_of(study.stored).engine.dispose()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_study_is_one_message(tmp_path: Path, share: float) -> None:
    file = tmp_path / "s.db"
    filled(file)
    os.truncate(file, int(share * file.stat().st_size))
    for create in (True, False):
        with pytest.raises(EvomergeError, match=r"s\.db: the study in it is damaged \(.*put back a copy of the file"):
            open_study(sqlite_url(file), "s", create=create).get_trials()


def test_a_file_whose_parts_are_of_two_moments_is_refused_before_a_search_goes_on(tmp_path: Path) -> None:
    """A copy of a running search may be such a file.  Trials can be read from it, since only an index is behind."""
    file = tmp_path / "s.db"
    filled(file)
    storage = storage_of(open_study(sqlite_url(file), "s", create=False))
    storage.refuse_damage()
    with storage.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        root = connection.exec_driver_sql("SELECT rootpage FROM sqlite_master WHERE name = 'ix_trials_study_id'")
        size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
        start = (root.scalar_one() - 1) * size
    storage.engine.dispose()
    before = file.read_bytes()[start : start + size]
    study = SearchStudy(open_study(sqlite_url(file), "s", create=False), space_of(8, "random"))
    study.finish(study.begin(None), 0.5, TrialRecord())
    storage_of(study.stored).engine.dispose()
    whole = file.read_bytes()
    assert whole[start : start + size] != before
    file.write_bytes(whole[:start] + before + whole[start + size :])
    study_of_both = open_study(sqlite_url(file), "s", create=False)
    with pytest.raises(EvomergeError, match=r"s\.db: the study in it is damaged \(row \d+ missing from index"):
        storage_of(study_of_both).refuse_damage()


def test_garbage_in_a_study_is_read_over_or_one_message(tmp_path: Path) -> None:
    file = tmp_path / "s.db"
    filled(file)
    whole, rng, refused = file.read_bytes(), random.Random(1), 0
    for place in range(0, len(whole), max(1, len(whole) // 24)):
        file.write_bytes(whole[:place] + rng.randbytes(700) + whole[place + 700 :])
        for rest in ("-wal", "-shm"):
            file.with_name(file.name + rest).unlink(missing_ok=True)
        try:
            study = SearchStudy(open_study(sqlite_url(file), "s", create=True), space_of(8, "random"))
            study.finish(study.begin(None), 0.5, TrialRecord())
        except EvomergeError:
            refused += 1
    assert refused > 5
    file.write_bytes(b"this is no database" * 1000)
    with pytest.raises(EvomergeError, match=r"s\.db: the study in it is damaged \(file is not a database\)"):
        open_study(sqlite_url(file), "s", create=True)


def test_a_new_file_is_never_seen_unfinished(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.db")
    with pytest.raises(EvomergeError, match="there is no such file"):
        open_study(url, "s", create=False)
    assert list(tmp_path.iterdir()) == []
    open_study(url, "s", create=True)
    assert {f.name.removeprefix("s.db") for f in tmp_path.iterdir()} <= {"", "-wal", "-shm"}
    with pytest.raises(EvomergeError, match="holds no study 'other'"):
        open_study(url, "other", create=False)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://me:top/sec@ret@127.0.0.1:1/db",
        "postgresql+psycopg://me:topsecret@127.0.0.1:1/db",
        "postgresql+psycopg://me:topsecret@127.0.0.1:port/db",
        "postgresql+psycopg://me@127.0.0.1:1/db?password=topsecret",
        "postgresql+psycopg://me:top%2Fsecret@127.0.0.1:1/db",
        "nodatabase://me:topsecret@127.0.0.1/db",
        "mysql://me:topsecret@127.0.0.1/db",
        "sqlite:////nowhere/at/all.db?password=topsecret",
    ],
)
def test_a_database_that_cannot_be_opened_is_one_message_without_its_password(url: str) -> None:
    for create in (True, False):
        with pytest.raises(EvomergeError, match=r"^storage ") as caught:
            open_study(url, "s", create=create)
        assert not any(part in str(caught.value) for part in ("secret", "top/", "sec@", "ret@", "sec%", "/sec"))
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as started:
        yield started


def test_a_killed_server_is_waited_for_and_no_trial_is_lost_or_doubled(server: Server) -> None:
    log: list[str] = []
    retry = Retry(lambda: None, log.append)
    study = SearchStudy(open_study(server.url, "killed", create=True, retry=retry), space_of(sampler="random"))
    held = acquire_lease(study.stored)
    rng = random.Random(5)
    ended = threading.Event()

    def havoc() -> None:
        for _ in range(5):
            time.sleep(rng.uniform(0.05, 0.6))
            server.kill()
            time.sleep(rng.uniform(0.2, 0.8))
            server.start()
        ended.set()

    thread = threading.Thread(target=havoc)
    thread.start()
    told: dict[int, float] = {}
    hand: list[Begun] = []
    try:
        while not ended.is_set() or len(told) < 40:
            while len(hand) < 3:
                hand.append(study.begin(None))
            begun = hand.pop(rng.randrange(3))
            told[begun.number] = rng.random()
            study.finish(begun, told[begun.number], TrialRecord(seconds=Seconds(total=0.1)))
            study.stored.set_user_attr(f"note:{begun.number}", begun.number)
            held.beat()
    finally:
        thread.join()
    noted = {f"note:{number}": number for number in told}
    for begun in hand:
        told[begun.number] = 0.5
        study.finish(begun, 0.5, TrialRecord())
    held.release()
    after = optuna.load_study(storage=server.url, study_name="killed")
    assert {t.number: t.value for t in after.get_trials()} == told
    assert sorted(told) == list(range(len(told)))
    assert [t.params for t in after.get_trials()] == [t.params for t in study.trials]
    assert after.user_attrs == noted
    assert log[1::2] == ["the database answers again"] * (len(log) // 2)
    assert all(line.startswith("the database does not answer; waiting (") for line in log[::2])
    assert not any(word in line for line in log for word in ("ss@w", QUOTED))


def test_what_was_committed_when_the_answer_was_lost_is_not_done_twice(server: Server) -> None:
    proxy, log = Proxy(server.port), list[str]()
    url = server.url.replace(f":{server.port}/", f":{proxy.port}/")
    retry = Retry(lambda: None, log.append)
    study = SearchStudy(open_study(url, "lost", create=True, retry=retry), space_of(sampler="random"))

    def losing(work: Callable[[], Any]) -> Any:
        before = proxy.lost
        proxy.to_lose = 2
        found = work()
        assert proxy.lost == before + 2, "no answer was lost"
        return found

    held = losing(lambda: acquire_lease(study.stored))
    losing(held.beat)
    begun = [losing(lambda: study.begin(None)) for _ in range(3)]
    losing(lambda: study.finish(begun[1], 0.25, TrialRecord()))
    losing(lambda: study.finish(begun[0], None, TrialRecord()))
    losing(lambda: study.stored.set_user_attr("note", [1, 2]))
    proxy.close()
    after = optuna.load_study(storage=server.url, study_name="lost")
    assert [(t.number, t.value, t.state.name) for t in after.get_trials()] == [
        (0, None, "FAIL"),
        (1, 0.25, "COMPLETE"),
        (2, None, "RUNNING"),
    ]
    assert after.user_attrs["note"] == [1, 2]
    assert parse(json.dumps(after.user_attrs[LEASE])) == held.holder


def test_waiting_for_a_server_ends_when_the_person_wants_it(server: Server) -> None:
    class Stop(Exception):
        pass

    calls = [0]

    def check() -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise Stop

    study = open_study(server.url, "stopped", create=True, retry=Retry(check, print))
    server.kill()
    try:
        with pytest.raises(Stop):
            study.set_user_attr("x", 1)
    finally:
        server.start()


def test_a_transaction_that_hangs_in_a_suspended_process_holds_nobody_up_for_long(server: Server) -> None:
    study = SearchStudy(
        open_study(server.url, "held", create=True, retry=Retry(lambda: None, print)), space_of(sampler="random")
    )
    other = storage_of(open_study(server.url, "held", create=True)).engine.connect()
    other.execute(sqlalchemy.text("set idle_in_transaction_session_timeout = '500ms'"))  # 30 s otherwise
    other.execute(sqlalchemy.text("update studies set study_name = study_name"))
    assert study.begin(None).number == 0
    other.invalidate()


def test_a_wrong_password_is_one_message_without_it(server: Server) -> None:
    with pytest.raises(EvomergeError, match='password authentication failed for user "evo"') as caught:
        open_study(server.url.replace(QUOTED, QUOTED + "z"), "s", create=True)
    assert "***" in str(caught.value)
    assert not any(part in str(caught.value) for part in (QUOTED, PASSWORD, "ss@w"))


def test_a_database_without_studies_is_not_written_to(server: Server) -> None:
    with psycopg.connect(server.connection("postgres"), autocommit=True) as connection:
        connection.execute("create database strangers")
    with pytest.raises(EvomergeError, match="holds no studies"):
        open_study(server.url.replace("/studies", "/strangers"), "s", create=False)
    with psycopg.connect(server.connection("strangers")) as connection:
        assert connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone() == (0,)


def test_trials_that_are_read_share_their_axes(tmp_path: Path) -> None:
    """In 3,000 dimensions they would take as much memory as all else."""
    url = sqlite_url(tmp_path / "s.db")
    study = opened(url, sampler="random")
    points = [study.begin(None).params for _ in range(2)]
    first, second = open_study(url, "s", create=False).get_trials(deepcopy=False)
    assert first.distributions is second.distributions
    assert [first.params, second.params] == points
