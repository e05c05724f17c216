"""A study in a file: made whole, in write-ahead mode, and known when it is damaged."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages import RDBStorage

from evomerge.files import sync


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
    """A new SQLite database, which is whole from the moment it has its name: an empty file has lost its study."""
    aside = file.with_name(f"{file.name}.{os.getpid()}.new")

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(aside)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    try:
        RDBStorage(f"sqlite:///{aside}", {"creator": connect}).engine.dispose()
        sync(aside)
        with suppress(FileExistsError):  # another process was quicker
            os.link(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def is_damage(error: BaseException) -> bool:
    """Whether SQLite finds no database, or only a part of one, in its file."""
    text = f"{error} {error.__cause__}"
    return any(sign in text for sign in ("malformed", "not a database", "Could not decode", "disk I/O error"))


def write_ahead(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()
