"""Every primitive of SQLite does what that of memory does, after any history; see `histories.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
from histories import HISTORIES, Operation, check_deadline, compare, everything, outcome
from hypothesis import HealthCheck, given, settings

from lightning.store import lifecycle
from lightning.store.persistence.abc import RolloutChange, Totals
from lightning.store.persistence.memory import MemoryPersistence
from lightning.store.persistence.sqlite import SQLitePersistence
from lightning.store.records import RolloutRecord, WorkerRecord


@given(HISTORIES)
@settings(max_examples=300, deadline=None)
def test_in_memory(history: list[Operation]) -> None:
    async def run() -> None:
        backend = SQLitePersistence(":memory:")
        await backend.open()
        try:
            await compare(history, backend)
        finally:
            await backend.close()

    asyncio.run(run())


@given(HISTORIES, HISTORIES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_a_file_that_is_closed_and_opened_again(
    tmp_path_factory: pytest.TempPathFactory, before: list[Operation], later: list[Operation]
) -> None:
    path = tmp_path_factory.mktemp("differential") / "store.db"

    async def run(history: Sequence[Operation], skip: int) -> dict[str, Any]:
        """Replays the whole history in the model, and what is new of it in the file."""
        model = MemoryPersistence(
            eviction_threshold_bytes=2**40, safe_threshold_bytes=2**40, capacity_bytes=2**40
        )
        backend = SQLitePersistence(path, durability="normal")
        await backend.open()
        try:
            for number, operation in enumerate(history):
                expected = await outcome(operation, model, number)
                if number >= skip:
                    assert await outcome(operation, backend, number) == expected, operation
            found = await everything(backend)
            assert found == await everything(model)
            await check_deadline(backend, found["rollouts"])
            return found
        finally:
            await backend.close()

    asyncio.run(run(before, 0))
    asyncio.run(run([*before, *later], len(before)))


def test_every_field_of_a_record_is_kept() -> None:
    """A field that is added to a record and forgotten here would be lost in silence."""
    from lightning.store.persistence import sqlite_rows as rows

    kept = {*rows.ROLLOUT_COLUMNS, *rows.PAYLOAD_COLUMNS, "rollout_id"}
    assert set(RolloutRecord._fields) <= kept
    kept = set(rows.ATTEMPT_COLUMNS)
    assert set(lifecycle.AttemptRecord._fields) == kept
    kept = {*rows.WORKER_COLUMNS, "worker_id"}
    assert set(WorkerRecord._fields) == kept
    assert {field.name for field in fields(RolloutChange)} == {"before", "after"}
    assert {field.name for field in fields(Totals)} == {
        "rollouts_by_status",
        "attempts",
        "spans",
        "resources",
        "workers",
        "span_bytes",
        "evicted_spans",
        "dropped_rollouts",
        "attempts_by_status",
        "queued_since",
        "limits",
    }
