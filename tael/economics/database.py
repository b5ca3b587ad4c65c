"""Opening an SQLite file that holds secrets or money."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from tael.errors import TaelError

FORMAT = 1
"""In ``user_version``, beside what the file is in ``application_id``."""


def open_database(path: Path | str, application_id: int, schema: str) -> sqlite3.Connection:
    """A connection in autocommit mode, to be used by one thread at a time.

    A new file, made with ``schema``, can be read by its owner only. Commits are on the disk when
    they return: a write-ahead log with ``synchronous=FULL``. Raises TaelError if the file is
    something else or cannot be opened.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # SQLite gives its log and index the mode of the file.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise TaelError(f"cannot open {path}: {error}; check the path and its rights.") from error
    try:
        _prepare(connection, application_id, schema)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise TaelError(f"cannot use {path}: {error}; restore it from a backup.") from error
        if isinstance(error, ValueError):
            raise TaelError(f"{path} {error}.") from error
        raise
    return connection


def _prepare(connection: sqlite3.Connection, application_id: int, schema: str) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    # So that INSERT OR REPLACE sets off the triggers against deleting.
    connection.execute("PRAGMA recursive_triggers = ON")
    connection.execute("BEGIN IMMEDIATE")  # the first of several processes makes the tables
    try:
        (found,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if num_tables == 0:
            for statement in schema.split(";;"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {application_id}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        elif found != application_id:
            raise ValueError("is another kind of database; name another file")
        elif version != FORMAT:
            raise ValueError(f"has format {version}, this Tael knows {FORMAT}; upgrade Tael")
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")
