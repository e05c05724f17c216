"""One driver at a time: a lease among the study's attributes, beaten while its holder lives.

No clocks are compared: those of two machines differ, and any may be set back.  A holder of this machine is dead when
its process is; one of another machine when its count of beats has stood still for three of its intervals.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from evomerge.errors import EvomergeError
from evomerge.search.storage.database import Storage, storage_of
from evomerge.search.storage.optuna_private import STUDY_ATTRIBUTES, key_of_study

LEASE = "evomerge:lease"
LOOKS = 15  # at a holder's beats, five in each of three intervals


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    machine: what tells its process numbers from others'.  started: of the process, in ticks since the boot.  every:
    seconds between beats.  clock: its time of the last beat, for people.
    """

    host: str
    machine: str
    pid: int
    started: int
    token: str
    every: float
    beat: int
    clock: float

    @property
    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is no more; False also where that cannot be known."""
        return bool(self.machine) and self.machine == machine_id() and process_start(self.pid) != self.started


def parse(text: str | None) -> Holder | None:
    """A stored lease, None for what is not one."""
    try:
        return Holder(**json.loads(text or ""))
    except (ValueError, TypeError):
        return None


def machine_id() -> str:
    """This boot of this machine and, in a container, its own process numbers; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None if there is no such process or only its exit code."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Lease:
    """A lease that this process holds.  All that it writes to the study is refused once another process has taken over.

    before: the holder that it was taken over from, if there was one.
    """

    def __init__(self, study: optuna.Study, holder: Holder, before: Holder | None) -> None:
        self.name = study.study_name
        self.storage: Storage = storage_of(study)
        self.study_id = key_of_study(study)
        self.holder = holder
        self.before = before
        self.beaten = time.monotonic()
        self.storage.refuse_writes_unless(self.check_held)

    def beat_in_time(self) -> None:
        """Beat if the last one is `every` seconds ago; to be called more often than that."""
        if time.monotonic() - self.beaten >= self.holder.every:
            self.beat()

    def beat(self) -> None:
        """Say that this process lives.  EvomergeError if another one has taken over."""
        new = replace(self.holder, beat=self.holder.beat + 1, clock=time.time())

        def attempt(again: bool) -> None:
            with self.storage.engine.begin() as connection:
                if not swap(connection, self.study_id, self.holder.text, new.text):
                    text = stored(connection, self.study_id)
                    if not (again and text == new.text):  # stored before; the answer was lost
                        raise self.lost(text)

        self.storage.patiently(attempt)
        self.holder, self.beaten = new, time.monotonic()

    def check_held(self, connection: Connection) -> None:
        """EvomergeError, in the midst of a transaction, if another process has taken over."""
        text = stored(connection, self.study_id, hold=True)
        holder = parse(text)
        if holder is None or holder.token != self.holder.token:
            raise self.lost(text)

    def lost(self, text: str | None) -> EvomergeError:
        other = parse(text)
        who = f"process {other.pid} on {other.host}" if other else "another process"
        return EvomergeError(
            f"study {self.name!r}: {who} took over while this process was not heard of; nothing more is written here. "
            "What was finished is in the study"
        )

    def release(self) -> None:
        """Give the lease back, if the database answers; a lease that is not given back runs out."""
        self.storage.refuse_writes_unless(None)
        try:
            with self.storage.engine.begin() as connection:
                swap(connection, self.study_id, self.holder.text, None)
        except SQLAlchemyError:
            return


def lease(study: optuna.Study, every: float = 5.0, check: Callable[[], None] = lambda: None) -> Lease:
    """Hold the study for this process.  EvomergeError if a living process holds it.

    every: seconds between the calls of `beat` that the caller will make.  check: raises to end the waiting for a sign
    of life from another machine, which takes three intervals.
    """
    storage, study_id = storage_of(study), key_of_study(study)
    seen = look(storage, study_id)
    before = parse(seen)
    if seen is not None and not (before and before.is_dead):
        if before and before.machine == machine_id() != "":
            raise refused(study, before)
        watch(study, seen, before.every if before else every, check)
    mine = Holder(
        host=socket.gethostname(),
        machine=machine_id(),
        pid=os.getpid(),
        started=process_start(os.getpid()) or 0,
        token=secrets.token_hex(8),
        every=every,
        beat=0,
        clock=time.time(),
    )

    def attempt(again: bool) -> bool:
        try:
            with storage.engine.begin() as connection:
                if swap(connection, study_id, seen, mine.text):
                    return True
        except IntegrityError:  # the table takes one row of each name, and somebody was quicker
            pass
        return again and look(storage, study_id) == mine.text  # stored before; the answer was lost

    if not storage.patiently(attempt):
        raise refused(study, parse(look(storage, study_id)))
    return Lease(study, mine, before)


def watch(study: optuna.Study, seen: str, every: float, check: Callable[[], None]) -> None:
    """Wait until the holder could have beaten three times.  EvomergeError if it did."""
    storage, looks = storage_of(study), 0
    while looks < LOOKS:
        asked = time.monotonic()
        time.sleep(3 * every / LOOKS)
        check()
        if (text := look(storage, key_of_study(study))) != seen:
            raise refused(study, parse(text))
        # While the database was gone, or this process stopped, the holder may have been too.
        looks = looks + 1 if time.monotonic() - asked < every else 0


def refused(study: optuna.Study, holder: Holder | None) -> EvomergeError:
    who = f"process {holder.pid} on {holder.host}" if holder else "another process"
    return EvomergeError(
        f"study {study.study_name!r}: {who} is working on it; wait for its end or stop it, then run this command again"
    )


def look(storage: Storage, study_id: int) -> str | None:
    """The stored lease, read anew."""

    def read(again: bool) -> str | None:
        with storage.engine.connect() as connection:
            return stored(connection, study_id)

    return storage.patiently(read)


def row_of(study_id: int) -> Any:
    return (STUDY_ATTRIBUTES.c.study_id == study_id) & (STUDY_ATTRIBUTES.c.key == LEASE)


def stored(connection: Connection, study_id: int, hold: bool = False) -> str | None:
    """The stored lease; hold: and nobody may change it before the transaction ends."""
    query = select(STUDY_ATTRIBUTES.c.value_json).where(row_of(study_id))
    text: str | None = connection.execute(query.with_for_update(read=True) if hold else query).scalar_one_or_none()
    return text


def swap(connection: Connection, study_id: int, old: str | None, new: str | None) -> bool:
    """Replace the stored lease if it is `old`; whether it was.  Without `old` IntegrityError if there is one."""
    if old is None:
        connection.execute(insert(STUDY_ATTRIBUTES).values(study_id=study_id, key=LEASE, value_json=new))
        return True
    mine = row_of(study_id) & (STUDY_ATTRIBUTES.c.value_json == old)
    replaced = delete(STUDY_ATTRIBUTES) if new is None else update(STUDY_ATTRIBUTES).values(value_json=new)
    return bool(connection.execute(replaced.where(mine)).rowcount)
