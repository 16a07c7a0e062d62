"""Finished rollouts are dropped by age or by size, whole, bit by bit, and who asks for one is told."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import SQLiteLightningStore
from lightning.store.persistence import sqlite_retention
from lightning.store.persistence.sqlite import SQLitePersistence
from lightning.store.persistence.sqlite_file import open_writer
from lightning.store.persistence.sqlite_writer import Counters, Session, transaction
from lightning.store.retention import Retention
from lightning.testing import FakeClock
from lightning.types import AttemptedRollout, RolloutConfig, Span

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 40.0
DAY_SECONDS = 86_400.0


def spans_for(rollout: AttemptedRollout, count: int, size_bytes: int = 10) -> list[Span]:
    return [
        Span(
            rollout_id=rollout.rollout_id,
            attempt_id=rollout.attempt.attempt_id,
            sequence_id=0,
            trace_id="1".rjust(32, "0"),
            span_id=f"{number:016x}",
            name="step",
            attributes={"text": "x" * size_bytes},
        )
        for number in range(count)
    ]


async def finished(store: Any, spans: int, size_bytes: int = 10) -> str:
    """Have a rollout done; returns its id."""
    rollout = await store.start_rollout("task")
    await store.add_many_spans(spans_for(rollout, spans, size_bytes))
    await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    return str(rollout.rollout_id)


async def until(store: Any, **expected: int) -> dict[str, Any]:
    """Return the statistics once they say so."""
    with anyio.fail_after(DEADLINE_SECONDS):
        while True:
            statistics = await store.statistics()
            if all(statistics[name] == value for name, value in expected.items()):
                return dict(statistics)
            await asyncio.sleep(0.01)


def rows_left(path: Path) -> dict[str, int]:
    connection = sqlite3.connect(path)
    tables = ("rollout", "rollout_payload", "attempt", "span")
    counts = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    return counts


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(tmp_path: Path, clock: FakeClock) -> AsyncIterator[SQLiteLightningStore]:
    store = SQLiteLightningStore(tmp_path / "store.db", clock=clock, retain="7d")
    yield store
    await store.close()


async def test_what_ended_long_ago_is_dropped_with_its_spans(
    store: SQLiteLightningStore, clock: FakeClock, tmp_path: Path
) -> None:
    many = 3 * sqlite_retention._SPANS_PER_STEP
    old = [await finished(store, many), await finished(store, 1)]
    running = await store.start_rollout("task")
    await store.add_many_spans(spans_for(running, 5))
    clock.advance(6 * DAY_SECONDS)
    recent = await finished(store, 2)
    assert (await until(store, dropped_rollouts=0))["total_rollouts"] == 4
    clock.advance(1.5 * DAY_SECONDS)
    statistics = await until(store, dropped_rollouts=2, evicted_spans=many + 1)
    assert statistics["rollouts_by_status"] == {"running": 1, "succeeded": 1}
    assert statistics["attempts_by_status"] == {"running": 1, "succeeded": 1}
    assert (statistics["total_spans"], statistics["total_attempts"]) == (7, 2)
    assert [rollout.rollout_id for rollout in await store.query_rollouts()] == [running.rollout_id, recent]
    assert len(await store.query_spans(recent)) == 2
    assert len(await store.query_spans(running.rollout_id)) == 5
    assert await store.get_rollout_by_id(old[0]) is None
    await store.close()
    assert rows_left(tmp_path / "store.db") == {"rollout": 2, "rollout_payload": 2, "attempt": 2, "span": 7}


async def test_who_asks_for_what_was_dropped_is_told(store: SQLiteLightningStore, clock: FakeClock) -> None:
    gone = await finished(store, 1)
    clock.advance(8 * DAY_SECONDS)
    await until(store, dropped_rollouts=1)
    server = LightningStoreServer(store, port=0)
    await server.start()
    client = LightningStoreClient(server.endpoint)
    said = f"unknown rollout '{gone}': it had finished, and was dropped with its spans by this store, which keeps"
    for question in (
        client.query_spans(gone),
        client.query_attempts(gone),
        client.wait_for_rollouts(rollout_ids=[gone], timeout=0),
        client.update_rollout(gone, metadata={}),
    ):
        with pytest.raises(ValueError, match=f"{said} finished ones for 7d"):
            await question
    with pytest.raises(ValueError, match="unknown rollout 'ro-never'$"):
        await client.query_spans("ro-never")
    await client.close()
    await server.close()


async def test_an_open_attempt_of_a_finished_rollout_is_waited_for(
    store: SQLiteLightningStore, clock: FakeClock
) -> None:
    """It has a deadline, and may have spans to come."""
    rollout = await store.start_rollout("task", config=RolloutConfig(timeout_seconds=30 * DAY_SECONDS))
    second = await store.start_attempt(rollout.rollout_id)
    await store.update_attempt(rollout.rollout_id, second.attempt.attempt_id, status="succeeded")
    finish_order = await finished(store, 1)
    clock.advance(8 * DAY_SECONDS)
    await until(store, dropped_rollouts=1)
    assert await store.get_rollout_by_id(finish_order) is None
    assert await store.get_rollout_by_id(rollout.rollout_id) is not None
    clock.advance(30 * DAY_SECONDS)
    await until(store, dropped_rollouts=2)


async def test_a_store_keeps_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = SQLiteLightningStore(path, durability="normal", retain="2MB")
    running = await store.start_rollout("task")
    await store.add_many_spans(spans_for(running, 10, 10_000))
    done = [await finished(store, 20, 10_000) for _ in range(60)]  # 12 MB
    statistics = await settled(store)
    assert statistics["total_spans"] == 10 + 20 * (statistics["total_rollouts"] - 1)
    left = [rollout.rollout_id for rollout in await store.query_rollouts()]
    assert left == [running.rollout_id, *done[len(done) - len(left) + 1 :]], (
        "those that ended first went first"
    )
    assert 0 < len(left) < 20
    await store.close()
    connection = sqlite3.connect(path)
    assert sqlite_retention.used_bytes(connection) <= 2_000_000
    connection.close()


async def settled(store: SQLiteLightningStore) -> dict[str, Any]:
    """The statistics once nothing more is dropped."""
    opened = store._persistence
    assert isinstance(opened, SQLitePersistence)

    def is_settled(session: Session) -> bool:
        (waiting,) = session.connection.execute("SELECT count(*) FROM dropped WHERE has_spans = 1").fetchone()
        return not waiting and sqlite_retention.used_bytes(session.connection) <= 2_000_000

    with anyio.fail_after(DEADLINE_SECONDS):
        while not await opened._writer.submit(is_settled):  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.01)
    return dict(await store.statistics())


async def test_a_step_is_small_and_goes_on_after_a_restart(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "store.db"
    spans = 2 * sqlite_retention._SPANS_PER_STEP + 1
    store = SQLiteLightningStore(path, clock=clock)
    await finished(store, spans)
    for _ in range(sqlite_retention._ROLLOUTS_PER_STEP):
        await finished(store, 0)

    await store.close()
    connection = open_writer(path, "full")
    session = Session(connection, Counters(connection))
    for step, table, change in (
        (lambda: sqlite_retention.drop_rollouts(session, clock.now() + 1), "rollout", 32),
        (lambda: sqlite_retention.delete_spans(session), "span", 256),
    ):
        (before,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        with transaction(session):
            assert step()
        (after,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        assert before - after == change
    connection.close()
    store = SQLiteLightningStore(path, clock=clock, retain="1h")
    statistics = await until(store, evicted_spans=spans, total_spans=0)
    assert statistics["dropped_rollouts"] == sqlite_retention._ROLLOUTS_PER_STEP
    await store.close()


async def test_a_failure_is_logged_and_tried_again(
    store: SQLiteLightningStore,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sqlite_retention, "_RETRY_SECONDS", 0.0)
    drop = sqlite_retention.drop_rollouts
    failures = [sqlite3.OperationalError("database or disk is full")]

    def fail_once(session: Session, ended_before: float) -> bool:
        dropped = drop(session, ended_before)
        if dropped and failures:
            raise failures.pop()
        return dropped

    monkeypatch.setattr(sqlite_retention, "drop_rollouts", fail_once)
    await finished(store, 1)
    clock.advance(8 * DAY_SECONDS)
    await until(store, dropped_rollouts=1, total_rollouts=0, evicted_spans=1)
    assert "dropping finished rollouts failed" in caplog.text


async def test_only_so_many_are_remembered(
    store: SQLiteLightningStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_retention, "_REMEMBERED", 1)
    gone = []
    for _ in range(3):
        gone.append(await finished(store, 1))
        clock.advance(8 * DAY_SECONDS)
        await until(store, dropped_rollouts=len(gone), evicted_spans=len(gone))
    with pytest.raises(ValueError, match="it had finished"):
        await store.query_spans(gone[-1])
    with pytest.raises(ValueError, match=f"unknown rollout '{gone[0]}'$"):
        await store.query_spans(gone[0])


@pytest.mark.parametrize(
    ("given", "seconds", "size_bytes"),
    [
        ("7d", 7 * DAY_SECONDS, None),
        ("1.5h", 5400.0, None),
        (" 30 m ", 1800.0, None),
        ("10GB", None, 10**10),
        ("1MiB", None, 2**20),
        (["2w", "500 MB"], 14 * DAY_SECONDS, 5 * 10**8),
    ],
)
def test_amounts(given: Any, seconds: float | None, size_bytes: int | None) -> None:
    retention = Retention.of(given)
    assert (retention.seconds, retention.size_bytes) == (seconds, size_bytes)


@pytest.mark.parametrize(
    "given", ["", "7", "d", "-1d", "0GB", "7 days", "10gb", ["1d", "2h"], ["1GB", "1MB"], [], [7], [None]]
)
def test_what_is_no_amount(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retain"):
        SQLiteLightningStore(tmp_path / "store.db", retain=given)
