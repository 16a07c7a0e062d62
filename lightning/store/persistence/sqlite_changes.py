"""What is written for each primitive: functions that run in the writer's thread, within its transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from lightning.store import lifecycle
from lightning.store.persistence import sqlite_rows as rows
from lightning.store.persistence.abc import (
    ClaimTransition,
    RolloutChange,
    RolloutTransition,
    Settlement,
    SpanTransition,
    WorkerTransition,
)
from lightning.store.persistence.sqlite_rows import StoredRollout
from lightning.store.persistence.sqlite_search import ATTEMPT_STATUS_COUNTER, STATUS_COUNTER
from lightning.store.persistence.sqlite_statements import insert, select, select_many, update
from lightning.store.persistence.sqlite_writer import Session
from lightning.store.records import (
    AttemptRecord,
    ResourcesRecord,
    RolloutRecord,
    SpanReceipt,
    SpanRecord,
    WorkerRecord,
)

_LARGEST_INTEGER = 2**63 - 1
_MAX_KNOWN_WORKERS = 4096
_MAX_KNOWN_ROLLOUTS = 4096
_MAX_KNOWN_ROLLOUT_BYTES = 16 * 1024
_MAX_KNOWN_ATTEMPTS = 16


def insert_rollouts(
    session: Session, records: Sequence[RolloutRecord], settle: Settlement | None
) -> list[RolloutRecord]:
    """See `Persistence.insert_rollouts`."""
    connection, counters = session.connection, session.counters
    ids = [record.rollout_id for record in records]
    known = [row[0] for row in select_many(connection, "known_rollout_ids", ids)]
    stored = rows.rollouts_by_id(connection, known) if known else {}
    new: list[StoredRollout] = []
    for record in records:
        if record.rollout_id not in stored:
            record = record._replace(revision=counters.add("revision"))
            stored[record.rollout_id] = record
            position = counters.add("queue_position") if lifecycle.is_queued(record) else None
            new.append(StoredRollout(counters.add("ordinal"), position, record))
            counters.add(STATUS_COUNTER + record.status)
    insert(
        connection,
        "insert_rollouts",
        [
            (item.ordinal, item.record.rollout_id, *rows.rollout_values(item.record, item.queue_position))
            for item in new
        ],
    )
    insert(connection, "insert_payloads", [(item.ordinal, *rows.payload_values(item.record)) for item in new])
    for item in new:
        _insert_attempts(session, item.ordinal, item.record.attempts)
        _settle(session, settle, None, item.record)
    return [stored[rollout_id] for rollout_id in ids]


def _insert_attempts(session: Session, ordinal: int, attempts: Sequence[AttemptRecord]) -> None:
    if not attempts:
        return
    insert(session.connection, "insert_attempts", [(ordinal, *attempt) for attempt in attempts])
    session.counters.add("attempts", len(attempts))
    for attempt in attempts:
        session.counters.add(ATTEMPT_STATUS_COUNTER + attempt.status)


def change_rollout(
    session: Session, rollout_id: str, transition: RolloutTransition, settle: Settlement | None
) -> RolloutChange | None:
    """See `Persistence.change_rollout`."""
    stored = _find_rollout(session, rollout_id)
    return None if stored is None else _replace(session, stored, transition(stored.record), settle)


def claim_rollouts(
    session: Session, limit: int, transition: ClaimTransition, settle: Settlement | None
) -> list[RolloutChange]:
    """See `Persistence.claim_rollouts`."""
    found = select(session.connection, "head_of_queue", min(limit, _LARGEST_INTEGER))
    heads = rows.read_rollouts(session.connection, found)
    claimed = [transition(head.record, taken) for taken, head in enumerate(heads)]
    return [_replace(session, head, after, settle) for head, after in zip(heads, claimed, strict=True)]


def _replace(
    session: Session, stored: StoredRollout, after: RolloutRecord, settle: Settlement | None
) -> RolloutChange:
    """Store what became of a rollout, writing only what is different."""
    connection, counters, before = session.connection, session.counters, stored.record
    if after is before:
        return RolloutChange(before, before)
    after = after._replace(revision=counters.add("revision"))
    position = stored.queue_position
    if after.status != before.status:
        counters.add(STATUS_COUNTER + before.status, -1)
        counters.add(STATUS_COUNTER + after.status)
        if not lifecycle.is_queued(after):
            position = None
        elif position is None:
            position = counters.add("queue_position")
    key = {"ordinal": stored.ordinal}
    columns = stored.columns or rows.rollout_values(before, stored.queue_position)
    values = rows.rollout_values(after, position)
    update(connection, "rollout", rows.ROLLOUT_COLUMNS, columns, values, key)
    if after.input is not before.input or after.metadata is not before.metadata:
        payload = rows.payload_values(before), rows.payload_values(after)
        update(connection, "rollout_payload", rows.PAYLOAD_COLUMNS, *payload, key)
    for old, new in zip(before.attempts, after.attempts, strict=False):
        if old is not new:
            place = {"rollout": stored.ordinal, "sequence_id": old.sequence_id}
            update(connection, "attempt", rows.ATTEMPT_COLUMNS, old, new, place)
            if new.status != old.status:
                counters.add(ATTEMPT_STATUS_COUNTER + old.status, -1)
                counters.add(ATTEMPT_STATUS_COUNTER + new.status)
    _insert_attempts(session, stored.ordinal, after.attempts[len(before.attempts) :])
    _settle(session, settle, before, after)
    _remember(session, StoredRollout(stored.ordinal, position, after, values))
    return RolloutChange(before, after)


def _find_rollout(session: Session, rollout_id: str) -> StoredRollout | None:
    return session.known_rollouts.get(rollout_id) or rows.rollout_by_id(session.connection, rollout_id)


def _remember(session: Session, stored: StoredRollout) -> None:
    """Keep what is being worked on, and so will change again soon, from being read again each time; unless it is large.

    What has finished is forgotten for another reason, too: it may be dropped.
    """
    known, record = session.known_rollouts, stored.record
    if lifecycle.is_queued(record) or lifecycle.is_finished(record) or not _is_small(record):
        known.pop(record.rollout_id, None)
        return
    if len(known) >= _MAX_KNOWN_ROLLOUTS:
        known.clear()
    known[record.rollout_id] = stored


def _is_small(record: RolloutRecord) -> bool:
    payloads = (record.input, record.metadata, *(attempt.metadata for attempt in record.attempts))
    size_bytes = sum(len(payload) for payload in payloads if payload is not None)
    return size_bytes <= _MAX_KNOWN_ROLLOUT_BYTES and len(record.attempts) <= _MAX_KNOWN_ATTEMPTS


def _settle(
    session: Session, settle: Settlement | None, before: RolloutRecord | None, after: RolloutRecord
) -> None:
    by_worker: dict[str, list[WorkerTransition]] = {}
    for worker_id, transition in () if settle is None else settle(before, after):
        by_worker.setdefault(worker_id, []).append(transition)
    for worker_id, transitions in by_worker.items():
        change_worker(session, worker_id, *transitions)


def append_spans(
    session: Session,
    rollout_id: str,
    attempt_id: str,
    spans: Sequence[SpanRecord],
    transition: SpanTransition,
    settle: Settlement | None,
) -> tuple[RolloutChange, list[SpanReceipt]] | None:
    """See `Persistence.append_spans`."""
    connection, counters = session.connection, session.counters
    stored = _find_rollout(session, rollout_id)
    if stored is None:
        return None
    attempt = stored.record.find_attempt(attempt_id)
    known: set[str] = set()
    if attempt is not None and attempt.last_span_sequence_id:  # else it has none yet
        ids = [span.span_id for span in spans]
        found = select_many(connection, "known_span_ids", ids, stored.ordinal, attempt.sequence_id)
        known = {span_id for (span_id,) in found}
    fresh: dict[str, SpanRecord] = {}
    for span in spans:
        if span.span_id not in known:
            fresh.setdefault(span.span_id, span)
    after, sequence_ids = transition(stored.record, list(fresh.values()))
    numbers = dict(zip(fresh, sequence_ids, strict=True))
    if fresh and attempt is not None:
        place = (stored.ordinal, attempt.sequence_id)
        values = [(*place, span_id, numbers[span_id], span.payload) for span_id, span in fresh.items()]
        insert(connection, "insert_spans", values)
        counters.add("spans", len(fresh))
        counters.add("span_bytes", sum(len(span.payload) for span in fresh.values()))
    change = _replace(session, stored, after, settle)
    receipts = []
    for span in spans:
        sequence_id = numbers.pop(span.span_id, None)
        receipts.append(SpanReceipt(sequence_id or 0, sequence_id is not None))
    return change, receipts


def insert_resources(session: Session, record: ResourcesRecord) -> bool:
    """See `Persistence.insert_resources`."""
    connection = session.connection
    (newest,) = select(connection, "newest_version", record.resources_id).fetchone()
    if record.version != (newest or 0) + 1:
        return False
    times = record.create_time, record.update_time
    inserted = select(
        connection, "insert_resources", record.resources_id, record.version, *times, record.request_digest
    )
    named = [(inserted.lastrowid, position, *item) for position, item in enumerate(record.resources)]
    insert(connection, "insert_resource", named)
    session.counters.add("resources")
    return True


def change_worker(session: Session, worker_id: str, *transitions: WorkerTransition) -> WorkerRecord:
    """See `Persistence.change_worker`; several transitions are made one after another."""
    connection, known_workers = session.connection, session.known_workers
    known = known_workers.get(worker_id) or _read_worker(connection, worker_id)
    before = after = WorkerRecord(worker_id) if known is None else known[-1]
    for transition in transitions:
        after = transition(after)
    if known is None:
        values = rows.worker_values(after)
        insert(connection, "insert_workers", [(None, worker_id, *values)])
        session.counters.add("workers")
    elif after is not before:
        ordinal, stored, _ = known
        values = rows.worker_values(after, stored[-1] if after.leases is before.leases else None)
        update(connection, "worker", rows.WORKER_COLUMNS, stored, values, {"ordinal": ordinal})
        if len(known_workers) >= _MAX_KNOWN_WORKERS:
            known_workers.clear()
        known_workers[worker_id] = ordinal, values, after
    return after


def _read_worker(
    connection: sqlite3.Connection, worker_id: str
) -> tuple[int, tuple[Any, ...], WorkerRecord] | None:
    row = select(connection, "worker_by_id", worker_id).fetchone()
    if row is None:
        return None
    ordinal, _, *values = row
    return ordinal, tuple(values), rows.read_worker(row)
