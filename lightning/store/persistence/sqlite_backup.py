"""A copy of a SQLite store as it is at one moment, while its server runs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from lightning.store.new_file import new_file
from lightning.store.persistence.abc import BackendOpenError
from lightning.store.persistence.sqlite_file import as_backend_error, check_schema
from lightning.store.persistence.sqlite_statements import migrations


def back_up(path: Path, target: Path) -> None:
    """Write a copy of the store in the file `path` to the new file `target`, without the room that it does not use.

    The copy has everything that had been acknowledged when this was called. Whoever serves the store goes on meanwhile.

    Raises:
        FileExistsError: There is a `target` already.
        OSError: It cannot be written.
        BackendOpenError: There is no store at `path`, or it is another version's.
        BackendError: Copying failed.
    """
    if not path.is_file():
        raise BackendOpenError(f"there is no store at {path}")
    with new_file(target) as copy:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            _check(connection, path)
            connection.execute("VACUUM INTO ?", (str(copy),))
        except sqlite3.Error as error:
            raise as_backend_error(error) from error
        finally:
            connection.close()


def _check(connection: sqlite3.Connection, path: Path) -> None:
    try:
        check_schema(connection, migrations())
    except (sqlite3.Error, BackendOpenError) as error:
        raise BackendOpenError(f"{path} cannot be opened: {error}") from error
