"""A database in a file (SQLite): how it is created, opened, and found to be damaged."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages import RDBStorage

from evomerge.files.write import FAILED_DISK, sync


def file_of(url: str) -> Path | None:
    """The file of an SQLite database, None for any other."""
    try:
        address = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return None
    name = address.database or ""
    is_file = address.get_backend_name() == "sqlite" and name and not name.startswith((":", "file:"))
    return Path(name) if is_file else None


def create_file(file: Path) -> None:
    """Create a database with Optuna's tables, complete from the moment at which it has its name.

    So an empty file is always one that has lost its study.
    """
    aside = file.with_name(f"{file.name}.{os.getpid()}.new")

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(aside)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    try:
        RDBStorage("sqlite://", {"creator": connect, "poolclass": sqlalchemy.pool.NullPool}).engine.dispose()
        sync(aside)
        with suppress(FileExistsError):  # another process was quicker
            os.link(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def is_damage(error: BaseException) -> bool:
    """Whether an error says that the file holds no database, or only a part of one."""
    text = f"{error} {error.__cause__}"
    return any(sign in text for sign in ("malformed", "not a database", "Could not decode", "disk I/O error"))


def disk_failed(file: Path, error: BaseException) -> bool:
    """Whether the disk does not read or write, as an error of SQLite or opening the file says.

    SQLite takes what a failing disk gives for damage.  When the end of the file is missing, the disk has not failed.
    """
    try:
        file.open("rb").close()
    except OSError as failure:
        if failure.errno in FAILED_DISK:
            return True
    seen: BaseException | None = error
    while seen is not None:
        name = getattr(getattr(seen, "orig", seen), "sqlite_errorname", "")
        if name.startswith("SQLITE_IOERR"):
            return bool(name != "SQLITE_IOERR_SHORT_READ")
        seen = seen.__cause__
    return False


def what_is_damaged(connection: sqlalchemy.Connection) -> str | None:
    """What SQLite finds wrong in the whole file (0.4 s for 100 MB); None if nothing.

    A copy that was made while a search wrote, file after file, may open and hold parts of several moments.
    """
    found = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one())
    return None if found == "ok" else " ".join(found.split())


def write_ahead(connection: Any, record: object) -> None:
    """Prepare a new connection: readers do not wait for a writer, and a commit does not wait for the disk."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
