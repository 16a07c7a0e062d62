"""No statement costs more because more is stored: SQLite searches for what it needs, and sorts nothing."""

from __future__ import annotations

import sqlite3

from lightning.store.persistence.sqlite_file import open_writer
from lightning.store.persistence.sqlite_statements import QUERIES, with_rows

READ_WHOLE = {
    "all_resources": "SCAN resources",
    "all_workers": "SCAN worker",
    "counters": "SCAN counter",  # a few dozen, however much is stored
    "latest_resources": "SCAN resources",  # backwards, and ends at the first
    # the index holds those rollouts alone whose spans are being deleted
    "spans_of_dropped": "SCAN dropped USING INDEX dropped_with_spans",
    "note_spans_deleted": "SCAN dropped USING INDEX dropped_with_spans",
}
"""What goes through a table or an index from its beginning, on purpose."""


def plan(connection: sqlite3.Connection, name: str) -> list[str]:
    statement = with_rows(name, 2) if "VALUES …" in QUERIES[name] else QUERIES[name]
    statement = statement.replace("(…)", "(?, ?)")
    steps = connection.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?"))
    return [step for *_, step in steps]


def test_no_statement_scans_or_sorts_what_grows() -> None:
    connection = open_writer(None, "normal")
    try:
        costly = {
            name: step
            for name in QUERIES
            for step in plan(connection, name)
            if ("SCAN" in step and "CONSTANT ROW" not in step) or "TEMP B-TREE" in step
        }
    finally:
        connection.close()
    assert costly == READ_WHOLE
