"""The SQL that rests in files: the schema's versions, and the statements by name."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import chain
from typing import Any, TypeVar

T = TypeVar("T")

_MAX_VALUES_PER_STATEMENT = 500
_MAX_ROWS_PER_STATEMENT = 64
"""Many rows in one statement mean one pass through SQLite, during which no other thread can get in between. Wide rows
of so many stay below the number of parameters that any SQLite takes."""

_MANY_VALUES = "(…)"
_MANY_ROWS = "VALUES …"
_COLUMNS = re.compile(r"\(([^()]*)\)\s*VALUES …")


def _read(name: str) -> str:
    folder = resources.files(__package__) / "schema"
    return (folder / name).read_text(encoding="utf-8")


def _named(text: str) -> dict[str, str]:
    _, *parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return {name: sql.strip().rstrip(";") for name, sql in zip(parts[::2], parts[1::2], strict=True)}


QUERIES = _named(_read("queries.sql"))


def migrations() -> list[tuple[int, str]]:
    """The versions of the schema, oldest first: the number, and the SQL that leads to it from the one before."""
    folder = resources.files(__package__) / "schema"
    names = sorted(entry.name for entry in folder.iterdir() if re.match(r"\d{4}_.*\.sql$", entry.name))
    return [(int(name[:4]), _read(name)) for name in names]


def select(connection: sqlite3.Connection, name: str, *values: Any) -> sqlite3.Cursor:
    """Run a statement by name."""
    return connection.execute(QUERIES[name], values)


def select_many(
    connection: sqlite3.Connection, name: str, values: Sequence[Any], *before: Any
) -> Iterator[Any]:
    """The rows of a statement with `(…)` for all `values`, however many; `before` are the parameters ahead of them."""
    for part in _parts(values, _MAX_VALUES_PER_STATEMENT):
        yield from connection.execute(_with_values(name, len(part)), (*before, *part))


def execute_many(connection: sqlite3.Connection, name: str, values: Sequence[Any]) -> None:
    """Run a statement with `(…)`, for all `values`, however many."""
    for part in _parts(values, _MAX_VALUES_PER_STATEMENT):
        connection.execute(_with_values(name, len(part)), part)


def insert(connection: sqlite3.Connection, name: str, rows: Sequence[Sequence[Any]]) -> None:
    """Insert all rows with a statement that has `VALUES …`."""
    for part in _parts(rows, _MAX_ROWS_PER_STATEMENT):
        connection.execute(with_rows(name, len(part)), tuple(chain.from_iterable(part)))


def update(
    connection: sqlite3.Connection,
    table: str,
    columns: Sequence[str],
    before: Sequence[Any],
    after: Sequence[Any],
    key: dict[str, Any],
) -> None:
    """Write those columns of a row that differ: an index is maintained only if its columns are written."""
    changed = [index for index, value in enumerate(after) if value != before[index]]
    if changed:
        statement = _update(table, tuple(columns[index] for index in changed), tuple(key))
        connection.execute(statement, [*(after[index] for index in changed), *key.values()])


@functools.lru_cache(maxsize=256)
def _update(table: str, columns: tuple[str, ...], key: tuple[str, ...]) -> str:
    assignments = ", ".join(f"{column} = ?" for column in columns)
    condition = " AND ".join(f"{column} = ?" for column in key)
    return f"UPDATE {table} SET {assignments} WHERE {condition}"


@functools.lru_cache(maxsize=1024)
def _with_values(name: str, count: int) -> str:
    return QUERIES[name].replace(_MANY_VALUES, f"({', '.join('?' * count)})")


@functools.lru_cache(maxsize=1024)
def with_rows(name: str, count: int) -> str:
    """A statement that has `VALUES …`, for so many rows."""
    statement = QUERIES[name]
    columns = _COLUMNS.search(statement)
    assert columns is not None
    row = f"({', '.join('?' * len(columns.group(1).split(',')))})"
    return statement.replace(_MANY_ROWS, f"VALUES {', '.join([row] * count)}")


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    if len(items) <= size:  # as nearly always
        if items:
            yield items
        return
    for start in range(0, len(items), size):
        yield items[start : start + size]
