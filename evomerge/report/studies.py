"""The output of `evomerge studies`: the studies in a database; the database does the counting."""

import json
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from optuna.trial import TrialState
from rich.table import Table
from sqlalchemy import Connection, func, select

from evomerge.config.database_url import expanded
from evomerge.errors import EvomergeError
from evomerge.report.progress import Screen
from evomerge.search.run import open_run
from evomerge.search.storage.database import open_storage, sqlite_url
from evomerge.search.storage.optuna_private import STUDIES, STUDY_ATTRIBUTES, TRIALS, USER_ATTRIBUTES, VALUES
from evomerge.search.storage.sql_statements import local
from evomerge.search.storage.study_lease import LEASE, Holder, machine_id, parse
from evomerge.search.storage.trial_record import RECORD, is_in_full

SILENT = 60.0  # seconds after which a driver on another machine counts as silent; clocks differ by less


@dataclass(frozen=True)
class StudyRow:
    """One study.

    holder: the driver that works on the study; None if there is none.
    counts: of trials by state.
    best: the best value of the trials that were scored on all items.
    last: when a trial last began or ended.
    """

    name: str
    holder: Holder | None = None
    counts: dict[TrialState, int] = field(default_factory=dict)
    best: float | None = None
    last: datetime | None = None

    @property
    def state(self) -> str:
        """Whether a driver works on the study, in words."""
        if self.holder is None:
            return "idle"
        if self.holder.is_dead:
            return f"idle (process {self.holder.pid} on {self.holder.host} died)"
        silent = time.time() - self.holder.clock
        if self.holder.machine != machine_id() and silent > SILENT:
            return f"no news from {self.holder.host} for {silent / 60:,.0f} minutes"
        return f"running on {self.holder.host}"


def url_of(place: str) -> str:
    """The URL of a database.

    place: the URL, which may name environment variables; or a study.db; or a run folder.
    EvomergeError if it is none of these.
    """
    if "://" in place:
        return expanded(place)
    path = Path(place)
    if path.is_dir():
        run = open_run(path)
        return run.storage_url(run.config())
    if not path.exists():
        raise EvomergeError(f"--storage: {place!r} is neither a database URL nor a study.db nor a run folder")
    return sqlite_url(path)


def read_studies(place: str) -> list[StudyRow]:
    """Read the studies of a database, sorted by name.  EvomergeError if it cannot be read."""
    storage = open_storage(url_of(place), create=False)

    def read(again: bool) -> list[StudyRow]:
        with storage.engine.connect() as connection:
            return rows(connection)

    return storage.retried(read)


def rows(connection: Connection) -> list[StudyRow]:
    """Read the studies through an open connection."""
    held = select(STUDY_ATTRIBUTES.c.study_id, STUDY_ATTRIBUTES.c.value_json).where(STUDY_ATTRIBUTES.c.key == LEASE)
    holders = {key: parse(text) for key, text in connection.execute(held)}
    t = TRIALS.c
    counted = select(t.study_id, t.state, func.count(), func.max(t.datetime_start), func.max(t.datetime_complete))
    counts: dict[int, dict[TrialState, int]] = {}
    moments: dict[int, list[datetime]] = {}
    for key, state, count, began, ended in connection.execute(counted.group_by(t.study_id, t.state)):
        counts.setdefault(key, {})[state] = count
        moments.setdefault(key, []).extend(moment for moment in (local(began), local(ended)) if moment)
    found = [
        StudyRow(
            name,
            holders.get(key),
            counts.get(key, {}),
            best_value(connection, key),
            max(moments.get(key, []), default=None),
        )
        for key, name in connection.execute(select(STUDIES.c.study_id, STUDIES.c.study_name)).all()
    ]
    return sorted(found, key=lambda row: row.name)


def best_value(connection: Connection, study_id: int) -> float | None:
    """The best value of a trial that was neither stopped by a race nor broken; None if there is none.

    Records are read fifty at a time, from the best value downwards.
    """
    values = select(TRIALS.c.trial_id, VALUES.c.value).join(VALUES, VALUES.c.trial_id == TRIALS.c.trial_id)
    complete = (TRIALS.c.study_id == study_id) & (TRIALS.c.state == TrialState.COMPLETE) & VALUES.c.value.is_not(None)
    ranked = connection.execute(values.where(complete).order_by(VALUES.c.value.desc())).all()
    for first in range(0, len(ranked), 50):
        keys = {row[0]: row[1] for row in ranked[first : first + 50]}
        stored = select(USER_ATTRIBUTES.c.trial_id, USER_ATTRIBUTES.c.value_json).where(
            USER_ATTRIBUTES.c.trial_id.in_(keys), USER_ATTRIBUTES.c.key == RECORD
        )
        partly = {row[0] for row in connection.execute(stored) if not is_in_full(json.loads(row[1]))}
        for key, value in keys.items():
            if key not in partly:
                return float(value)
    return None


def print_studies(place: str) -> None:
    """Print the studies of a database as a table."""
    table = Table("study", "finished", "running", "failed", "best", "state", "last activity")
    for row in (found := read_studies(place)):
        finished = sum(row.counts.get(state, 0) for state in TrialState if state.is_finished())
        table.add_row(
            row.name,
            str(finished),
            str(row.counts.get(TrialState.RUNNING, 0)),
            str(row.counts.get(TrialState.FAIL, 0)),
            "" if row.best is None else f"{row.best:.4f}",
            row.state,
            "" if row.last is None else f"{row.last:%Y-%m-%d %H:%M}",
        )
    Screen(soft_wrap=True).print(table if found else "no studies")
