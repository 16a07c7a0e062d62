"""`find_rollouts` as SQL."""

from __future__ import annotations

import sqlite3
from typing import Any

from lightning.store.persistence.sqlite_file import snapshot
from lightning.store.persistence.sqlite_rows import read_rollouts
from lightning.store.persistence.sqlite_statements import insert, select, select_many
from lightning.store.queries import Page, RolloutQuery
from lightning.store.records import RolloutRecord

_LARGEST_INTEGER = 2**63 - 1
STATUS_COUNTER = "rollouts."
"""The counters of rollouts by status begin so."""
ATTEMPT_STATUS_COUNTER = "attempts."
"""Those of attempts by status."""


def find_rollouts(connection: sqlite3.Connection, query: RolloutQuery) -> tuple[list[RolloutRecord], int]:
    """The page of the query, and how many match in all."""
    with snapshot(connection):
        if query.rollout_id_in is not None:
            _note_wanted(connection, query.rollout_id_in)
        condition, values = _condition(query)
        by_status_only = query.rollout_id_in is None and query.rollout_id_contains is None
        if by_status_only:
            total = _count_by_status(connection, query.status_in)
        else:
            counted = connection.execute(f"SELECT count(*) FROM rollout WHERE {condition}", values)
            total = counted.fetchone()[0]
        if by_status_only and query.status_in and query.page.sort_by is None:
            statement, values = _merge_statuses(query.status_in, query.page)
        else:
            statement = f"SELECT ordinal FROM rollout WHERE {condition} {_order(query.page)}"
        ordinals = [ordinal for (ordinal,) in connection.execute(statement, [*values, *_cut(query.page)])]
        rows = select_many(connection, "rollouts_by_ordinal", ordinals)
        found = {stored.ordinal: stored.record for stored in read_rollouts(connection, rows)}
    return [found[ordinal] for ordinal in ordinals], total


def _note_wanted(connection: sqlite3.Connection, rollout_ids: tuple[str, ...]) -> None:
    select(connection, "forget_wanted")
    insert(connection, "insert_wanted", [(rollout_id,) for rollout_id in rollout_ids if is_text(rollout_id)])


def _condition(query: RolloutQuery) -> tuple[str, list[Any]]:
    conditions: list[str] = []
    values: list[Any] = []
    if query.status_in is not None:
        conditions.append(f"status IN ({', '.join('?' * len(query.status_in))})")
        values.extend(query.status_in)
    if query.rollout_id_in is not None:
        conditions.append("rollout_id IN temp.wanted")
    if query.rollout_id_contains is not None:
        conditions.append("instr(rollout_id, ?) > 0" if is_text(query.rollout_id_contains) else "? IS NULL")
        values.append(query.rollout_id_contains if is_text(query.rollout_id_contains) else "")
    return (" OR " if query.any_suffices else " AND ").join(conditions) or "TRUE", values


def _count_by_status(connection: sqlite3.Connection, status_in: frozenset[str] | None) -> int:
    return sum(
        count
        for name, count in select(connection, "counters")
        if name.startswith(STATUS_COUNTER) and (status_in is None or name[len(STATUS_COUNTER) :] in status_in)
    )


def _merge_statuses(statuses: frozenset[str], page: Page) -> tuple[str, list[Any]]:
    """One walk along the index for each status, merged: SQLite reads no further than the page, and sorts nothing."""
    walks = " UNION ALL ".join(["SELECT ordinal FROM rollout WHERE status = ?"] * len(statuses))
    return f"{walks} {_order(page)}", list(statuses)


def _order(page: Page) -> str:
    """Missing values come first in SQLite, too; equal ones stay in the order of creation, whatever the direction."""
    direction = "DESC" if page.descending else "ASC"
    order = f"ordinal {direction}" if page.sort_by is None else f"{page.sort_by} {direction}, ordinal"
    return f"ORDER BY {order} LIMIT ? OFFSET ?"


def _cut(page: Page) -> tuple[int, int]:
    return min(page.limit, _LARGEST_INTEGER), min(page.offset, _LARGEST_INTEGER)


def is_text(value: str) -> bool:
    """Whether this can be the name of anything stored: a lone surrogate is not Unicode text, and cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
