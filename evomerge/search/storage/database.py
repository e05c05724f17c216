"""The database of a study: opened at a URL, waited for while its server is gone, written in whole transactions.

The middle one of the three layers of a write: `study.py` says what is stored, the transaction is opened here, and the
functions of `sql_statements.py` write the rows.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import unquote

import optuna
import sqlalchemy
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from evomerge.config.database_url import masked, passwords
from evomerge.errors import EvomergeError, first_line
from evomerge.search.storage import sql_statements
from evomerge.search.storage.optuna_private import TRIALS, DatabaseStorage, storage_behind
from evomerge.search.storage.sqlite import create_file, disk_failed, file_of, is_damage, what_is_damaged, write_ahead
from evomerge.system import limit_of_a_file

T = TypeVar("T")
P = ParamSpec("P")
Work = Callable[[sqlalchemy.Connection, bool], T]
"""What a transaction does.  The second argument: whether an earlier attempt may have been committed."""


@dataclass(frozen=True)
class Retry:
    """How to repeat operations on a server that is gone, until it is back.

    check: called again and again; raises to end the waiting.
    log: called with one line for the user when the waiting begins and ends.
    """

    check: Callable[[], None]
    log: Callable[[str], None]


def retrying(method: "Callable[Concatenate[Any, P], T]") -> "Callable[Concatenate[Storage, P], T]":
    """A method of Optuna's storage that is repeated while its server is gone."""

    def call(self: "Storage", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.retried(lambda again: method(self, *args, **kwargs))

    return call


class Storage(DatabaseStorage):
    """Optuna's storage, with reads and writes of a search in few statements.

    With `retry`, an operation on a server that is gone is repeated until it succeeds, whether or not an earlier
    attempt was committed before its answer was lost.  SQLite has no server: its errors surface at once.
    """

    def __init__(self, url: str, retry: Retry | None = None, create: bool = True) -> None:
        self.retry = retry
        self.gone = False
        self.check_writer: Callable[[sqlalchemy.Connection], None] | None = None
        self.in_file = url.startswith("sqlite")
        arguments, prepare = connecting(url)
        options = {"connect_args": arguments, "pool_pre_ping": not self.in_file}
        super().__init__(url, options, skip_table_creation=not create)
        if prepare is not None:
            sqlalchemy.event.listen(self.engine, "connect", prepare)
            self.engine.dispose()  # connections made before the listener

    create_new_study = retrying(RDBStorage.create_new_study)
    get_all_studies = retrying(RDBStorage.get_all_studies)
    get_study_directions = retrying(RDBStorage.get_study_directions)
    get_study_id_from_name = retrying(RDBStorage.get_study_id_from_name)
    get_study_name_from_id = retrying(RDBStorage.get_study_name_from_id)
    get_study_system_attrs = retrying(RDBStorage.get_study_system_attrs)
    get_study_user_attrs = retrying(RDBStorage.get_study_user_attrs)
    get_trial = retrying(RDBStorage.get_trial)

    def retried(self, work: Callable[[bool], T]) -> T:
        """Call `work(again)` and return its result; repeat it while the server is gone.

        again: whether it was tried before.  EvomergeError if the database is damaged or answers with an error.
        """
        tries = 0
        while True:
            try:
                found = work(tries > 0)
            except json.JSONDecodeError as error:
                raise damaged(self.url, error) from error
            except (SQLAlchemyError, StorageInternalError) as error:
                if self.in_file and is_damage(error):
                    raise damaged(self.url, error) from error
                if self.in_file:
                    raise
                if self.retry is None or not is_lost(error):
                    text = scrubbed(database_said(error), self.url)
                    raise EvomergeError(f"storage {masked(self.url)}: does not answer as it should ({text})") from error
                tries += 1
                self.wait(self.retry, error, tries)
                continue
            if self.gone and self.retry is not None:
                self.gone = False
                self.retry.log("the database answers again")
            return found

    def wait(self, retry: Retry, error: Exception, tries: int) -> None:
        """Wait before the next attempt: a tenth of a second at first, a second later."""
        if not self.gone:
            self.gone = True
            retry.log(f"the database does not answer; waiting ({scrubbed(database_said(error), self.url)})")
        for _ in range(min(10, tries)):
            retry.check()
            time.sleep(0.1)

    def refuse_damage(self) -> None:
        """Read the whole file of an SQLite database; EvomergeError if a part of it does not fit the others."""

        def look(again: bool) -> str | None:
            with self.engine.connect() as connection:
                return what_is_damaged(connection)

        if self.in_file and (found := self.retried(look)) is not None:
            raise damaged(self.url, EvomergeError(found))

    def refuse_writes_unless(self, check: Callable[[sqlalchemy.Connection], None] | None) -> None:
        """From now on call `check` inside every transaction that writes to a study, before it writes.

        check: raises EvomergeError if this process may not write any more; None: it may.
        """
        self.check_writer = check

    def writing(self, study_id: int, work: Work[T]) -> T:
        """Do `work` in one transaction, while no other process writes to the study; return its result.

        What was written is on the disk when this returns.
        """

        def attempt(again: bool) -> T:
            with self.engine.begin() as connection:
                sql_statements.lock(connection, study_id)
                if self.check_writer is not None:
                    self.check_writer(connection)
                return work(connection, again)

        found = self.retried(attempt)
        if self.in_file:  # a commit in WAL mode survives the process; after a checkpoint also a power cut
            self.retried(lambda again: self.checkpoint())
        return found

    def checkpoint(self) -> None:
        """Write what is in SQLite's write-ahead log into the file, and both to the disk."""
        with self.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    def begin_trial(self, study_id: int, trial: FrozenTrial) -> int:
        """Store a running trial with all its parameters, at its number; returns the database's key of it."""
        return self.writing(study_id, lambda c, again: sql_statements.begin_trial(c, study_id, trial, again))

    def describe_trial(self, study_id: int, trial_id: int, trial: FrozenTrial) -> None:
        """Give a stored trial its parameters and attributes."""
        self.writing(study_id, lambda c, again: sql_statements.describe_trial(c, trial_id, trial))

    def finish_trial(self, study_id: int, trial_id: int, value: float | None, attributes: dict[str, Any]) -> None:
        """End a stored trial with its user attributes; without a value it has failed."""
        self.writing(study_id, lambda c, again: sql_statements.finish_trial(c, trial_id, value, attributes, again))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute of a study."""
        self.writing(study_id, lambda c, again: sql_statements.set_study_attribute(c, study_id, key, value))

    def trials_of(self, study_id: int) -> list[FrozenTrial]:
        """All trials of a study, by their keys; `optuna.Study` would keep them too, as long as it lives."""
        return self.read_trials(TRIALS.c.study_id == study_id)

    def read_trials(self, chosen: sqlalchemy.ColumnElement[bool]) -> list[FrozenTrial]:
        """The trials of which `chosen` is true, by their keys.  EvomergeError if their rows are damaged."""

        def read(again: bool) -> list[FrozenTrial]:
            try:
                with self.engine.connect() as connection:
                    return sql_statements.read_trials(connection, chosen)
            except (ValueError, LookupError, TypeError) as error:  # of what is in the rows
                raise damaged(self.url, error) from error

        return self.retried(read)


def open_storage(url: str, retry: Retry | None = None, create: bool = True) -> Storage:
    """Open a database of any kind that Optuna supports; SQLite in WAL mode.

    url: as SQLAlchemy takes it, with its password.
    retry: how to wait for a server that is gone (default: an error at once).
    create: make the file and the tables if they are missing.

    EvomergeError if it cannot be opened, or is missing and `create` is false.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if (file := file_of(url)) is not None:
            if not file.exists():
                if not create:
                    raise EvomergeError(f"storage {masked(url)}: there is no such file; put back a copy of it")
                create_file(file)
            elif not file.is_file():
                raise EvomergeError(f"{file}: cannot be read (not an ordinary file)")
            elif file.stat().st_size == 0:
                raise damaged(url, EvomergeError("it is empty"))
        return Storage(url, retry, create)
    except (SQLAlchemyError, OptunaError, RuntimeError, ImportError, ValueError, OSError) as error:
        if file_of(url) is not None and is_damage(error):
            raise damaged(url, error) from error
        reason = scrubbed(database_said(error), url)
        if "version_info" in reason:
            raise EvomergeError(f"storage {masked(url)}: holds no studies") from error
        raise EvomergeError(f"storage {masked(url)}: cannot be opened ({reason})") from error


def damaged(url: str, error: BaseException) -> EvomergeError:
    """The error for a study that cannot be read: a damaged file, a limit of the shell for files, a disk that fails."""
    said = scrubbed(database_said(error), url)
    limit = limit_of_a_file()
    if "disk I/O error" in said and limit is not None:
        return EvomergeError(
            f"{file_of(url)}: cannot be written; this shell limits a file to {limit / 1e6:.1f} MB (ulimit -f). Nothing "
            "that was finished is lost; raise the limit and try again"
        )
    if (file := file_of(url)) is not None and disk_failed(file, error):
        return EvomergeError(
            f"{file}: cannot be read or written ({said}); nothing that was finished is lost. Mend the disk and "
            "run the command again"
        )
    return EvomergeError(
        f"{file_of(url) or 'storage ' + masked(url)}: the study in it is damaged ({said}); "
        "put back a copy of the file, or start anew with another run folder"
    )


def open_study(url: str, name: str, create: bool, retry: Retry | None = None) -> optuna.Study:
    """Open the study `name` in the database at `url`, see `open_storage`.  create: make it if it is missing.

    EvomergeError if it cannot be opened, or is missing and `create` is false.
    """
    storage = open_storage(url, retry, create)
    if create:
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        raise EvomergeError(f"storage {masked(url)}: holds no study {name!r}; put back a copy of it") from None


def storage_of(study: optuna.Study) -> Storage:
    """The database that a study of `open_study` lies in."""
    storage = storage_behind(study)
    assert isinstance(storage, Storage), "studies are opened by open_study only"
    return storage


def sqlite_url(path: Path) -> str:
    """The URL of a database file, whatever characters its path has."""
    address = sqlalchemy.engine.URL.create("sqlite", database=str(path.resolve()))
    return address.render_as_string(hide_password=False)


def connecting(url: str) -> tuple[dict[str, Any], Callable[[Any, object], None] | None]:
    """The arguments for a database's driver, and a function that prepares each new connection (None: nothing to do)."""
    address = sqlalchemy.engine.make_url(url)
    if address.get_backend_name() == "sqlite":
        return {"timeout": 60}, write_ahead
    for name in ("psycopg", "sqlalchemy.pool"):  # they print tracebacks of connections that break
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        # Without these a connection to a server that vanished without a word waits for hours.
        wanted = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
        return {k: v for k, v in wanted.items() if k not in address.query}, never_wait_long
    return {}, None


def never_wait_long(connection: Any, record: object) -> None:
    """Limit the time that a process suspended inside a transaction can block others."""
    cursor = connection.cursor()
    cursor.execute("SET lock_timeout = '10s'")
    cursor.execute("SET idle_in_transaction_session_timeout = '30s'")
    cursor.close()
    connection.commit()


def is_lost(error: BaseException) -> bool:
    """Whether a statement failed because its server is gone, shutting down, or not yet started again."""
    if isinstance(error, StorageInternalError):
        return error.__cause__ is not None and is_lost(error.__cause__)
    broken = isinstance(error, DBAPIError) and error.connection_invalidated
    return broken or isinstance(error, (OperationalError, InterfaceError))


def database_said(error: BaseException) -> str:
    """The database's own message, in one line, without the statement that SQLAlchemy quotes."""
    cause: BaseException = error
    if isinstance(cause, StorageInternalError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, DBAPIError) and cause.orig is not None:
        cause = cause.orig
    return first_line(cause)


def scrubbed(text: str, url: str) -> str:
    """An error's text, in which every part of the URL's password is replaced."""
    found = passwords(url)
    secrets = {*found, *(part for password in found for part in password.split("@"))}
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if len(secret) > 2:
            text = text.replace(secret, "***")
    return masked(text)
