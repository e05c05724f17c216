"""The SQL statements of a search on Optuna's tables; each function is called inside a transaction of `database.py`.

The lowest of the three layers of a write: `study.py` says what is stored, `database.py` opens the transaction, and the
functions here write the rows.  Optuna's own storage runs several queries a parameter, which costs more than a small
model's merge.  The tables stay as Optuna made them, so its tools read a study as any other.
"""

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain, groupby
from operator import itemgetter
from sys import intern
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import ColumnElement, Connection, Select, Table, delete, insert, select, update

from evomerge.errors import EvomergeError
from evomerge.search.storage.compact import numbers_of
from evomerge.search.storage.optuna_private import (
    PARAMETERS,
    STUDIES,
    STUDY_ATTRIBUTES,
    SYSTEM_ATTRIBUTES,
    TRIALS,
    USER_ATTRIBUTES,
    VALUES,
    columns_to_value,
    value_to_columns,
)
from evomerge.search.storage.trial_record import RECORD, read_record

PART = 2000  # rows that are held at a time


def lock(connection: Connection, study_id: int) -> None:
    """Keep other writers of the study out until the transaction ends."""
    mine = STUDIES.c.study_id == study_id
    connection.execute(update(STUDIES).where(mine).values(study_name=STUDIES.c.study_name))


def begin_trial(connection: Connection, study_id: int, trial: FrozenTrial, again: bool) -> int:
    """Insert a running trial with its number; returns the database's key of it.

    again: whether an earlier attempt may have stored it.
    EvomergeError if the number is not the next one of the study.
    """
    newest = select(TRIALS.c.trial_id, TRIALS.c.number).where(TRIALS.c.study_id == study_id)
    last = connection.execute(newest.order_by(TRIALS.c.trial_id.desc()).limit(1)).first()
    if again and last is not None and last.number == trial.number:
        return int(last.trial_id)
    if (last.number if last is not None else -1) != trial.number - 1:
        raise EvomergeError(
            f"trial {trial.number}: another program has added trials to this study; let one at a time work on it, "
            "and go on with `evomerge resume`"
        )
    row = {"study_id": study_id, "number": trial.number, "state": TrialState.RUNNING, "datetime_start": now()}
    key = connection.execute(insert(TRIALS).values(row)).inserted_primary_key
    assert key is not None
    describe_trial(connection, key[0], trial)
    return int(key[0])


def describe_trial(connection: Connection, trial_id: int, trial: FrozenTrial) -> None:
    """Make a stored trial a running one with the parameters and attributes of `trial` and no others."""
    connection.execute(update(TRIALS).where(TRIALS.c.trial_id == trial_id).values(state=TrialState.RUNNING))
    for table in (PARAMETERS, USER_ATTRIBUTES, SYSTEM_ATTRIBUTES):
        connection.execute(delete(table).where(table.c.trial_id == trial_id))
    rows = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": axis.to_internal_repr(trial.params[name]),
            "distribution_json": text_of(axis),
        }
        for name, axis in trial.distributions.items()
    ]
    if rows:
        connection.execute(insert(PARAMETERS), rows)
    add_attributes(connection, USER_ATTRIBUTES, trial_id, trial.user_attrs)
    add_attributes(connection, SYSTEM_ATTRIBUTES, trial_id, trial.system_attrs)


def add_attributes(connection: Connection, table: Table, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Insert attributes of a trial.  table: USER_ATTRIBUTES or SYSTEM_ATTRIBUTES."""
    if attributes:
        rows = [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in attributes.items()]
        connection.execute(insert(table), rows)


def finish_trial(
    connection: Connection, trial_id: int, value: float | None, attributes: Mapping[str, Any], again: bool
) -> None:
    """End a running trial with its value and user attributes; without a value it has failed.

    again: whether an earlier attempt may have ended it.  EvomergeError if the trial is not running.
    """
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    mine = (TRIALS.c.trial_id == trial_id) & (TRIALS.c.state == TrialState.RUNNING)
    if not connection.execute(update(TRIALS).where(mine).values(state=state, datetime_complete=now())).rowcount:
        if again:
            return
        raise EvomergeError(
            "another program has ended a trial that was running here; let one at a time work on this study, "
            "and go on with `evomerge resume`"
        )
    connection.execute(
        delete(USER_ATTRIBUTES).where(
            (USER_ATTRIBUTES.c.trial_id == trial_id) & USER_ATTRIBUTES.c.key.in_(list(attributes))
        )
    )
    add_attributes(connection, USER_ATTRIBUTES, trial_id, attributes)
    if value is not None:
        number, kind = value_to_columns(value)
        row = {"trial_id": trial_id, "objective": 0, "value": number, "value_type": kind}
        connection.execute(insert(VALUES).values(row))


def set_study_attribute(connection: Connection, study_id: int, key: str, value: Any) -> None:
    """Set a user attribute of a study."""
    mine = (STUDY_ATTRIBUTES.c.study_id == study_id) & (STUDY_ATTRIBUTES.c.key == key)
    connection.execute(delete(STUDY_ATTRIBUTES).where(mine))
    connection.execute(insert(STUDY_ATTRIBUTES).values(study_id=study_id, key=key, value_json=json.dumps(value)))


@contextmanager
def without_collector() -> Iterator[None]:
    """Turn garbage collection off: it would search hundreds of thousands of new objects, none of which is garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_collector()
def read_trials(connection: Connection, chosen: ColumnElement[bool]) -> list[FrozenTrial]:
    """Read the trials of which a condition on the columns of TRIALS is true, in the order of their keys.

    Intermediate values are not read; a search has none.
    """
    t, p, v = TRIALS.c, PARAMETERS.c, VALUES.c
    # The trials first: everything else of a trial that is finished in this answer is stored by now.
    columns = t.trial_id, t.number, t.state, t.datetime_start, t.datetime_complete
    query: Select[*tuple[Any, ...]] = select(*columns).where(chosen)
    found = {
        key: FrozenTrial(number, state, None, local(began), local(ended), {}, {}, {}, {}, {}, trial_id=key)
        for key, number, state, began, ended in connection.execute(query.order_by(t.trial_id))
    }
    ids = select(t.trial_id).where(chosen)
    query = select(p.trial_id, p.param_name, p.param_value, p.distribution_json).where(p.trial_id.in_(ids))
    parts = connection.execute(query.order_by(p.trial_id, p.param_id)).partitions(PART)
    spaces: dict[Any, dict[str, BaseDistribution]] = {}  # trials with the same axes share them, names and all
    for key, rows in groupby(chain.from_iterable(parts), key=itemgetter(0)):
        _, names, numbers, texts = zip(*rows, strict=True)
        if (trial := found.get(key)) is not None:
            axes = spaces.get((names, texts))
            if axes is None:
                axes = spaces[names, texts] = dict(zip(names, map(axis_of, texts), strict=True))
            trial.distributions = axes
            trial.params = numbers_of(axes, numbers) or {
                name: axis.to_external_repr(number) for (name, axis), number in zip(axes.items(), numbers, strict=True)
            }
    query = select(v.trial_id, v.value, v.value_type).where(v.trial_id.in_(ids))
    for told in connection.execute(query.order_by(v.objective)):
        if (trial := found.get(told[0])) is not None:
            trial.values = [*(trial.values or []), columns_to_value(told[1], told[2])]
    for table in (USER_ATTRIBUTES, SYSTEM_ATTRIBUTES):
        query = select(table.c.trial_id, table.c.key, table.c.value_json).where(table.c.trial_id.in_(ids))
        for row in connection.execute(query):
            if (trial := found.get(row[0])) is not None:
                attributes = trial.user_attrs if table is USER_ATTRIBUTES else trial.system_attrs
                value = json.loads(row[2])
                attributes[intern(row[1])] = read_record(value) if row[1] == RECORD else value
    return list(found.values())


text_of = lru_cache(maxsize=4096)(distribution_to_json)
axis_of = lru_cache(maxsize=4096)(json_to_distribution)


def now() -> datetime:
    """The present time as Optuna stores it: UTC, without a time zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def local(moment: datetime | None) -> datetime | None:
    """A stored time as Optuna returns it: local time, without a time zone."""
    return None if moment is None else moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
