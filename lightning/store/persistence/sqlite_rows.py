"""Rows to records and back."""

from __future__ import annotations

import functools
import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lightning.store import lifecycle
from lightning.store.persistence.sqlite_file import snapshot
from lightning.store.persistence.sqlite_statements import select, select_many
from lightning.store.records import (
    AppliedRequest,
    AttemptRecord,
    ConfigRecord,
    Lease,
    ResourcesRecord,
    RolloutRecord,
    WorkerRecord,
)

ROLLOUT_COLUMNS = (
    "status",
    "start_time",
    "end_time",
    "mode",
    "resources_id",
    "config",
    "applied",
    "attempts",
    "revision",
    "queue_position",
    "deadline",
)
PAYLOAD_COLUMNS = ("input", "metadata")
ATTEMPT_COLUMNS = AttemptRecord._fields
WORKER_COLUMNS = (
    "heartbeat_stats",
    "last_heartbeat_time",
    "last_dequeue_time",
    "last_busy_time",
    "last_idle_time",
    "silent_after_seconds",
    "leases",
)

_dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class StoredRollout(NamedTuple):
    """A record and where it stands."""

    ordinal: int
    queue_position: int | None
    record: RolloutRecord
    columns: tuple[Any, ...] | None = None
    """What stands in `ROLLOUT_COLUMNS`, if that is known."""


# --- Rollouts ---------------------------------------------------------------------------------------------------


def read_rollouts(connection: sqlite3.Connection, rows: Iterable[Sequence[Any]]) -> list[StoredRollout]:
    """Rollouts from rows of `stored_rollout`, with their attempts."""
    fetched = list(rows)
    with_attempts = [row[0] for row in fetched if row[2]]
    attempts: dict[int, list[AttemptRecord]] = {}
    for ordinal, *fields in select_many(connection, "attempts", with_attempts):
        attempts.setdefault(ordinal, []).append(AttemptRecord(*fields))
    return [_read_rollout(row, tuple(attempts.get(row[0], ()))) for row in fetched]


def rollout_by_id(connection: sqlite3.Connection, rollout_id: str) -> StoredRollout | None:
    """One rollout, or None."""
    found = read_rollouts(connection, select(connection, "rollout_by_id", rollout_id))
    return found[0] if found else None


def rollouts_by_id(connection: sqlite3.Connection, rollout_ids: Sequence[str]) -> dict[str, RolloutRecord]:
    """Those of these rollouts that exist, by id, as they are at one moment."""
    with snapshot(connection):
        found = read_rollouts(connection, select_many(connection, "rollouts_by_id", rollout_ids))
    return {stored.record.rollout_id: stored.record for stored in found}


def rollout_values(record: RolloutRecord, queue_position: int | None) -> tuple[Any, ...]:
    """What stands in `ROLLOUT_COLUMNS`."""
    return (
        record.status,
        record.start_time,
        record.end_time,
        record.mode,
        record.resources_id,
        _write_config(record.config),
        _write_applied(record.applied),
        len(record.attempts),
        record.revision,
        queue_position,
        lifecycle.next_deadline(record),
    )


def payload_values(record: RolloutRecord) -> tuple[Any, ...]:
    """What stands in `PAYLOAD_COLUMNS`."""
    return (record.input, record.metadata)


def _read_rollout(row: Sequence[Any], attempts: tuple[AttemptRecord, ...]) -> StoredRollout:
    (
        ordinal,
        queue_position,
        _,
        rollout_id,
        input,
        status,
        start_time,
        config,
        mode,
        resources_id,
        metadata,
        end_time,
        applied,
        revision,
    ) = row
    record = RolloutRecord(
        rollout_id=rollout_id,
        input=input,
        status=status,
        start_time=start_time,
        config=_read_config(config),
        mode=mode,
        resources_id=resources_id,
        metadata=metadata,
        end_time=end_time,
        attempts=attempts,
        applied=_read_applied(applied),
        revision=revision,
    )
    return StoredRollout(ordinal, queue_position, record)


# Rollouts by the million have few different configs.
@functools.lru_cache(maxsize=1024)
def _write_config(config: ConfigRecord) -> str:
    return _dump(
        [
            config.timeout_seconds,
            config.unresponsive_seconds,
            config.max_attempts,
            list(config.retry_condition),
        ]
    )


@functools.lru_cache(maxsize=1024)
def _read_config(text: str) -> ConfigRecord:
    timeout_seconds, unresponsive_seconds, max_attempts, retry_condition = json.loads(text)
    return ConfigRecord(timeout_seconds, unresponsive_seconds, max_attempts, tuple(retry_condition))


def _write_applied(applied: tuple[AppliedRequest, ...]) -> str | None:
    return _dump([[request.request_digest, request.value] for request in applied]) if applied else None


def _read_applied(text: str | None) -> tuple[AppliedRequest, ...]:
    return () if text is None else tuple(AppliedRequest(digest, value) for digest, value in json.loads(text))


# --- Resources --------------------------------------------------------------------------------------------------


def read_resources(connection: sqlite3.Connection, row: Sequence[Any] | None) -> ResourcesRecord | None:
    """Resources from a row of `resources`; None from None."""
    if row is None:
        return None
    ordinal, resources_id, version, create_time, update_time, request_digest = row
    named = tuple(select(connection, "fields_of_resources", ordinal))
    return ResourcesRecord(resources_id, version, create_time, update_time, named, request_digest)


# --- Workers ----------------------------------------------------------------------------------------------------


def read_worker(row: Sequence[Any]) -> WorkerRecord:
    """A worker from a row of `worker`."""
    _, worker_id, stats, heartbeat, dequeue, busy, idle, silent_after, leases = row
    held = tuple(Lease(*lease) for lease in json.loads(leases))
    return WorkerRecord(worker_id, stats, heartbeat, dequeue, busy, idle, silent_after, held)


@functools.lru_cache(maxsize=4096)
def _write_lease(lease: Lease) -> str:
    """Remembered, for a lease is written again whenever its worker takes another or gives one back."""
    return _dump(lease)


def worker_values(record: WorkerRecord, leases: str | None = None) -> tuple[Any, ...]:
    """What stands in `WORKER_COLUMNS`; `leases` is what stands in the last of them, if that is known."""
    if leases is None:
        leases = f"[{','.join(map(_write_lease, record.leases))}]"
    return (
        record.heartbeat_stats,
        record.last_heartbeat_time,
        record.last_dequeue_time,
        record.last_busy_time,
        record.last_idle_time,
        record.silent_after_seconds,
        leases,
    )
