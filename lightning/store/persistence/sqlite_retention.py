"""Dropping finished rollouts, in steps so small that nobody has to wait.

A rollout goes first, whole: from then on it does not exist. Its spans, which may be many, follow bit by bit, and only
when they are gone is it decided what else must go. Every step is a transaction, and after each the writer is left to
others for a multiple of the time that the step took.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Callable

from lightning.store.persistence.sqlite_search import ATTEMPT_STATUS_COUNTER, STATUS_COUNTER
from lightning.store.persistence.sqlite_statements import execute_many, insert, select, select_many
from lightning.store.persistence.sqlite_writer import Session, transaction
from lightning.store.retention import Retention

logger = logging.getLogger(__name__)

DROPPED_ROLLOUTS = "dropped_rollouts"
EVICTED_SPANS = "evicted_spans"

_ROLLOUTS_PER_STEP = 32
_SPANS_PER_STEP = 256
_REMEMBERED = 100_000
"""So many dropped rollouts are remembered, to be named to whoever asks for one."""
_REST_FACTOR = 3.0
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 30.0


class RetentionKeeper:
    """Drops what need not be kept.

    Args:
        retention: What is kept.
        now: Tells the time, in seconds since the epoch.
    """

    def __init__(self, retention: Retention, now: Callable[[], float]) -> None:
        self._retention = retention
        self._now = now
        self._rests_until = 0.0

    def tend(self, session: Session) -> float:
        """Take a step if it is time. Call it between two transactions; returns after how many seconds to call again."""
        began = time.monotonic()
        if began < self._rests_until:
            return self._rests_until - began
        try:
            with transaction(session):
                busy = delete_spans(session) or self._drop(session)
            rest = (time.monotonic() - began) * _REST_FACTOR if busy else _LOOK_SECONDS
        except sqlite3.Error:
            logger.warning(
                "dropping finished rollouts failed; trying again in %s s", _RETRY_SECONDS, exc_info=True
            )
            rest = _RETRY_SECONDS
        self._rests_until = time.monotonic() + rest
        return rest

    def _drop(self, session: Session) -> bool:
        kept = self._retention
        dropped = kept.seconds is not None and drop_rollouts(session, self._now() - kept.seconds)
        if not dropped and kept.size_bytes is not None and used_bytes(session.connection) > kept.size_bytes:
            dropped = drop_rollouts(session, math.inf)
        return dropped


def used_bytes(connection: sqlite3.Connection) -> int:
    """How much of the file is in use; what has been deleted is used again before the file grows."""
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_bytes)


def drop_rollouts(session: Session, ended_before: float) -> bool:
    """Drop a few of those that ended before then, the first to have ended first; whether there were any."""
    connection, counters = session.connection, session.counters
    found = select(connection, "ended_first", ended_before, _ROLLOUTS_PER_STEP).fetchall()
    ordinals = [ordinal for ordinal, _, _ in found]
    for _, _, status in found:
        counters.add(STATUS_COUNTER + status, -1)
    for (status,) in select_many(connection, "statuses_of_attempts", ordinals):
        counters.add(ATTEMPT_STATUS_COUNTER + status, -1)
        counters.add("attempts", -1)
    for statement in ("delete_rollouts", "delete_payloads", "delete_attempts"):
        execute_many(connection, statement, ordinals)
    marks = [(counters.add(DROPPED_ROLLOUTS), ordinal, rollout_id, 1) for ordinal, rollout_id, _ in found]
    insert(connection, "insert_dropped", marks)
    if marks:
        select(connection, "forget_dropped", marks[-1][0] - _REMEMBERED)
    return bool(found)


def delete_spans(session: Session) -> bool:
    """Delete a few spans of rollouts that were dropped; whether there were any."""
    connection, counters = session.connection, session.counters
    found = select(connection, "spans_of_dropped", _SPANS_PER_STEP).fetchall()
    if found:
        execute_many(connection, "delete_spans", [ordinal for ordinal, _ in found])
        counters.add("spans", -len(found))
        counters.add("span_bytes", -sum(size_bytes for _, size_bytes in found))
        counters.add(EVICTED_SPANS, len(found))
    if len(found) < _SPANS_PER_STEP:
        select(connection, "note_spans_deleted")
    return bool(found)
