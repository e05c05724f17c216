"""One driver at a time: the lease of a study, an attribute of it that its holder renews as long as it lives.

No clocks are compared, because those of two machines differ and any may be set back.  A holder on this machine is dead
when its process is.  A holder on another machine is dead when its heartbeat, a number that it counts up, has not
changed for three of its intervals.
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
READS = 15  # of a holder's heartbeat, five in each of three intervals


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease.

    host: the name of its machine.
    machine: what tells its process numbers from those of other machines and containers, see `machine_id`.
    pid: its process number.
    started: when the process started, in clock ticks since the machine's boot.
    token: random, to tell it from another lease of the same process.
    every: seconds between two heartbeats.
    beat: how many heartbeats there were.
    clock: seconds since the epoch at the latest heartbeat, by its own clock; shown to people and never compared.
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
        """The lease as it is stored."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine that has ended; False also where that cannot be known."""
        return bool(self.machine) and self.machine == machine_id() and process_start(self.pid) != self.started


def parse(text: str | None) -> Holder | None:
    """The holder of a stored lease, None if the text is no lease."""
    try:
        return Holder(**json.loads(text or ""))
    except (ValueError, TypeError):
        return None


def machine_id() -> str:
    """This machine since its boot and, in a container, the container; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None if it does not exist or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Lease:
    """A lease that this process holds.

    Once another process has taken over, every write of this one to the study raises EvomergeError.

    before: the dead holder that it was taken over from, None if there was none.
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
        """Renew the lease if that was last done `every` seconds ago; to be called more often than that."""
        if time.monotonic() - self.beaten >= self.holder.every:
            self.beat()

    def beat(self) -> None:
        """Renew the lease.  EvomergeError if another process has taken over."""
        new = replace(self.holder, beat=self.holder.beat + 1, clock=time.time())

        def attempt(again: bool) -> None:
            with self.storage.engine.begin() as connection:
                if not replace_lease(connection, self.study_id, self.holder.text, new.text):
                    text = stored(connection, self.study_id)
                    if not (again and text == new.text):  # stored before; the answer was lost
                        raise self.lost(text)

        self.storage.retried(attempt)
        self.holder, self.beaten = new, time.monotonic()

    def check_held(self, connection: Connection) -> None:
        """EvomergeError if another process has taken over; called inside the transaction of every write."""
        text = stored(connection, self.study_id, hold=True)
        holder = parse(text)
        if holder is None or holder.token != self.holder.token:
            raise self.lost(text)

    def lost(self, text: str | None) -> EvomergeError:
        """The error that another process has taken over.  text: the stored lease."""
        return EvomergeError(
            f"study {self.name!r}: {described(parse(text))} took over while this process gave no sign of life; this "
            "process writes nothing more. What was finished is in the study"
        )

    def release(self) -> None:
        """Give the lease back, if the database answers; one that is not given back expires."""
        self.storage.refuse_writes_unless(None)
        try:
            with self.storage.engine.begin() as connection:
                replace_lease(connection, self.study_id, self.holder.text, None)
        except SQLAlchemyError:
            return


def acquire_lease(study: optuna.Study, every: float = 5.0, check: Callable[[], None] = lambda: None) -> Lease:
    """Take the lease of a study for this process.  EvomergeError if a living process holds it.

    every: seconds between the calls of `Lease.beat` that the caller will make.
    check: called while this waits to see whether a holder on another machine lives, which takes three of that holder's
        intervals; raises to end the waiting.
    """
    storage, study_id = storage_of(study), key_of_study(study)
    seen = read_lease(storage, study_id)
    before = parse(seen)
    if seen is not None and not (before and before.is_dead):
        if before and before.machine == machine_id() != "":
            raise refused(study, before)
        wait_for_heartbeat(study, seen, before.every if before else every, check)
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
                if replace_lease(connection, study_id, seen, mine.text):
                    return True
        except IntegrityError:  # the table takes one row of each name, and another process was quicker
            pass
        return again and read_lease(storage, study_id) == mine.text  # stored before; the answer was lost

    if not storage.retried(attempt):
        raise refused(study, parse(read_lease(storage, study_id)))
    return Lease(study, mine, before)


def wait_for_heartbeat(study: optuna.Study, seen: str, every: float, check: Callable[[], None]) -> None:
    """Wait for three of the holder's intervals, and raise EvomergeError if it renews its lease meanwhile.

    seen: the stored lease.  every: seconds between the holder's heartbeats.
    """
    storage, reads = storage_of(study), 0
    while reads < READS:
        asked = time.monotonic()
        time.sleep(3 * every / READS)
        check()
        if (text := read_lease(storage, key_of_study(study))) != seen:
            raise refused(study, parse(text))
        # While the database was gone, or this process was suspended, the holder may have been unable to write.
        reads = reads + 1 if time.monotonic() - asked < every else 0


def refused(study: optuna.Study, holder: Holder | None) -> EvomergeError:
    """The error that another process holds the lease."""
    return EvomergeError(
        f"study {study.study_name!r}: {described(holder)} is working on it; wait for its end or stop it, then run this "
        "command again"
    )


def described(holder: Holder | None) -> str:
    return f"process {holder.pid} on {holder.host}" if holder else "another process"


def read_lease(storage: Storage, study_id: int) -> str | None:
    """The stored lease, None if there is none."""

    def read(again: bool) -> str | None:
        with storage.engine.connect() as connection:
            return stored(connection, study_id)

    return storage.retried(read)


def row_of(study_id: int) -> Any:
    return (STUDY_ATTRIBUTES.c.study_id == study_id) & (STUDY_ATTRIBUTES.c.key == LEASE)


def stored(connection: Connection, study_id: int, hold: bool = False) -> str | None:
    """The stored lease.  hold: nobody may change it before the transaction ends."""
    query = select(STUDY_ATTRIBUTES.c.value_json).where(row_of(study_id))
    text: str | None = connection.execute(query.with_for_update(read=True) if hold else query).scalar_one_or_none()
    return text


def replace_lease(connection: Connection, study_id: int, old: str | None, new: str | None) -> bool:
    """Replace the stored lease by `new` (None: delete it) if it is `old`; returns whether it was.

    old: None to store a lease where there is none; IntegrityError if there is one.
    """
    if old is None:
        connection.execute(insert(STUDY_ATTRIBUTES).values(study_id=study_id, key=LEASE, value_json=new))
        return True
    mine = row_of(study_id) & (STUDY_ATTRIBUTES.c.value_json == old)
    replaced = delete(STUDY_ATTRIBUTES) if new is None else update(STUDY_ATTRIBUTES).values(value_json=new)
    return bool(connection.execute(replaced.where(mine)).rowcount)
