"""Group commit, a full disk, closing and restarting: what was acknowledged is there, and nothing is half done."""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning.store import SQLiteLightningStore, lifecycle
from lightning.store.persistence import sqlite_file
from lightning.store.persistence.abc import BackendError, BackendFullError
from lightning.store.persistence.sqlite import SQLitePersistence
from lightning.store.persistence.sqlite_writer import GroupCommitWriter, Session
from lightning.store.queries import Page, RolloutQuery
from lightning.store.records import ConfigRecord, RolloutRecord, SpanRecord
from lightning.testing import FakeClock
from lightning.types import PromptTemplate, RolloutConfig, Span

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 20.0
CONFIG = ConfigRecord(None, None, 1, ())
EVERYTHING = RolloutQuery(None, None, None, False, Page(None, False, -1, 0))


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[SQLitePersistence]:
    backend = SQLitePersistence(tmp_path / "store.db")
    await backend.open()
    yield backend
    await backend.close()


def writer_of(backend: SQLitePersistence) -> GroupCommitWriter:
    """Where tests get at the writer's own connection."""
    return backend._writer


def record(name: str, size_bytes: int = 1) -> RolloutRecord:
    return RolloutRecord(name, b"x" * size_bytes, "queuing", 0.0, CONFIG)


def span(number: int, size_bytes: int = 1000) -> SpanRecord:
    return SpanRecord("at-1", f"{number:016x}", 0, b"x" * size_bytes)


class Refused(ValueError):
    """Raised by transitions here."""


def refuse(*_: Any) -> Any:
    raise Refused("this one is refused")


@asynccontextmanager
async def held_up(backend: SQLitePersistence) -> AsyncIterator[Callable[[], None]]:
    """The writer is busy until what this gives is called, so that writes gather."""
    loop = asyncio.get_running_loop()
    started, go_on = asyncio.Event(), threading.Event()

    def hold(session: Session) -> None:
        loop.call_soon_threadsafe(started.set)
        assert go_on.wait(DEADLINE_SECONDS)

    holding = asyncio.create_task(writer_of(backend).submit(hold))
    await started.wait()
    try:
        yield go_on.set
    finally:
        go_on.set()
        await holding


async def until_waiting(backend: SQLitePersistence, count: int) -> None:
    """Return once so many writes wait for the writer."""
    while len(writer_of(backend)._waiting) < count:  # noqa: ASYNC110  # nothing tells of it, and it takes no time
        await asyncio.sleep(0)


async def trace(backend: SQLitePersistence) -> list[str]:
    """The statements that the writer executes from now on."""
    statements: list[str] = []

    def begin(session: Session) -> None:
        session.connection.set_trace_callback(statements.append)

    await writer_of(backend).submit(begin)
    statements.clear()
    return statements


# --- Group commit ----------------------------------------------------------------------------------------------


async def test_writes_that_wait_are_one_transaction(backend: SQLitePersistence) -> None:
    statements = await trace(backend)
    async with held_up(backend) as let_go:
        tasks = [asyncio.create_task(backend.insert_rollouts([record(f"ro-{index}")])) for index in range(50)]
        await until_waiting(backend, 50)
        let_go()
        inserted = await asyncio.gather(*tasks)
    assert [records[0].rollout_id for records in inserted] == [f"ro-{index}" for index in range(50)]
    assert statements.count("COMMIT") <= 2  # that which held it up, and theirs


async def test_a_loop_hands_over_at_once_what_it_gathers_in_a_turn(backend: SQLitePersistence) -> None:
    statements = await trace(backend)
    await asyncio.gather(*(backend.insert_rollouts([record(f"ro-{index}")]) for index in range(50)))
    assert statements.count("COMMIT") == 1


async def test_a_write_that_is_refused_takes_no_other_with_it(backend: SQLitePersistence) -> None:
    await backend.insert_rollouts([record("ro-0")])
    async with held_up(backend) as let_go:
        first = asyncio.create_task(backend.insert_rollouts([record("ro-1")]))
        await until_waiting(backend, 1)
        bad = asyncio.create_task(backend.change_rollout("ro-0", refuse))
        await until_waiting(backend, 2)
        last = asyncio.create_task(backend.insert_rollouts([record("ro-2")]))
        await until_waiting(backend, 3)
        let_go()
        outcomes = await asyncio.gather(first, bad, last, return_exceptions=True)
    assert isinstance(outcomes[1], Refused)
    records, total = await backend.find_rollouts(EVERYTHING)
    assert [found.rollout_id for found in records] == ["ro-0", "ro-1", "ro-2"]
    assert [found.revision for found in records] == [1, 2, 3]
    assert total == 3


async def test_a_write_that_fails_halfway_is_undone_alone(backend: SQLitePersistence) -> None:
    def halfway(session: Session) -> None:
        session.counters.add("revision", 100)
        session.connection.execute("INSERT INTO rollout_payload VALUES (999, 'x', NULL)")
        session.connection.execute("INSERT INTO rollout_payload VALUES (999, 'again', NULL)")

    async with held_up(backend) as let_go:
        first = asyncio.create_task(backend.insert_rollouts([record("ro-1")]))
        bad = asyncio.create_task(writer_of(backend).submit(halfway))
        last = asyncio.create_task(backend.insert_rollouts([record("ro-2")]))
        await until_waiting(backend, 3)
        let_go()
        outcomes = await asyncio.gather(first, bad, last, return_exceptions=True)
    assert isinstance(outcomes[1], BackendError)
    assert "UNIQUE constraint failed" in str(outcomes[1])
    records, _ = await backend.find_rollouts(EVERYTHING)
    assert [(found.rollout_id, found.revision) for found in records] == [("ro-1", 1), ("ro-2", 2)]
    assert (await backend.totals()).rollouts_by_status == {"queuing": 2}
    left = await backend._search(
        lambda connection: connection.execute("SELECT count(*) FROM rollout_payload").fetchone()
    )
    assert left == (2,)


async def test_what_was_undone_of_a_worker_is_not_remembered(backend: SQLitePersistence) -> None:
    await backend.insert_rollouts([record("ro-1")])
    for stats in (b"{}", b"[]"):  # by the second it is known
        await backend.change_worker("w", lambda worker, stats=stats: worker._replace(heartbeat_stats=stats))
    with pytest.raises(Refused):
        await backend.change_rollout(
            "ro-1",
            lambda found: found._replace(mode="val"),
            lambda _, __: [("w", lambda worker: worker._replace(heartbeat_stats=b"half")), ("v", refuse)],
        )
    kept = await backend.change_worker("w", lambda worker: worker._replace(last_busy_time=1.0))
    assert (kept.heartbeat_stats, await backend.get_worker("w")) == (b"[]", kept)


async def test_what_was_undone_of_a_rollout_is_not_remembered(backend: SQLitePersistence) -> None:
    def begin(found: RolloutRecord, _: int) -> RolloutRecord:
        return lifecycle.begin_attempt(found, "at-1", "v", None, 0.0)

    def rename(mode: Any) -> Callable[[RolloutRecord], RolloutRecord]:
        return lambda found: found._replace(mode=mode, attempts=(found.attempts[0]._replace(metadata=b"{}"),))

    await backend.insert_rollouts([record("ro-1")])
    (claim,) = await backend.claim_rollouts(1, begin)  # by now it is known
    with pytest.raises(Refused):
        await backend.change_rollout("ro-1", rename("val"), lambda _, __: [("w", lambda w: w), ("v", refuse)])
    assert await backend.get_rollout("ro-1") == claim.after
    change = await backend.change_rollout("ro-1", rename("test"))
    assert change is not None
    assert change.before == claim.after
    assert await backend.get_rollout("ro-1") == change.after


async def test_a_rollout_is_read_from_the_file_once_while_it_is_worked_on(
    backend: SQLitePersistence,
) -> None:
    def beat(found: RolloutRecord) -> RolloutRecord:
        return lifecycle.refresh_attempt(found, f"at-{found.rollout_id}", 1.0)

    sizes = {"ro-small": 1, "ro-large": 100_000}
    await backend.insert_rollouts([record(name, size_bytes) for name, size_bytes in sizes.items()])
    await backend.claim_rollouts(
        2, lambda found, _: lifecycle.begin_attempt(found, f"at-{found.rollout_id}", "v", None, 0.0)
    )
    statements = await trace(backend)
    reads = {}
    for name in sizes:
        for _ in range(3):
            await backend.change_rollout(name, beat)
        reads[name] = sum(statement.startswith("SELECT * FROM stored_rollout") for statement in statements)
        statements.clear()
    assert reads == {"ro-small": 0, "ro-large": 3}  # memory is for many, not for large ones


async def test_a_caller_that_is_cancelled_disturbs_nobody(backend: SQLitePersistence) -> None:
    async with held_up(backend) as let_go:
        gone = asyncio.create_task(backend.insert_rollouts([record("ro-1")]))
        stays = asyncio.create_task(backend.insert_rollouts([record("ro-2")]))
        await until_waiting(backend, 2)
        gone.cancel()
        let_go()
        assert (await stays)[0].rollout_id == "ro-2"
    assert gone.cancelled()


async def test_values_beyond_what_sqlite_holds_are_refused_by_name(backend: SQLitePersistence) -> None:
    await backend.insert_rollouts([record("ro-1")])
    await backend.claim_rollouts(1, lambda found, _: lifecycle.begin_attempt(found, "at-1", None, None, 0.0))
    with pytest.raises(ValueError, match="too large to be stored"):
        await backend.change_rollout(
            "ro-1",
            lambda found: found._replace(attempts=(found.attempts[0]._replace(last_span_sequence_id=2**64),)),
        )


async def test_many_threads_and_event_loops(tmp_path: Path) -> None:
    store = SQLiteLightningStore(tmp_path / "store.db")
    claimed: list[str] = []

    async def work() -> None:
        for number in range(20):
            await store.enqueue_rollout(number)
        for _ in range(20):
            rollout = await store.dequeue_rollout("worker")
            assert rollout is not None
            claimed.append(rollout.rollout_id)
            assert await store.get_rollout_by_id(rollout.rollout_id) is not None
            await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")

    threads = [threading.Thread(target=asyncio.run, args=(work(),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    assert len(claimed) == len(set(claimed)) == 120
    assert (await store.statistics())["rollouts_by_status"] == {"succeeded": 120}
    await store.close()


# --- No room left ----------------------------------------------------------------------------------------------


async def limit_pages(backend: SQLitePersistence, spare: int | None) -> None:
    """Let the file grow by so many pages and no further, as a disk would that is nearly full; None: as it likes."""

    def limit(session: Session) -> None:
        (pages,) = session.connection.execute("PRAGMA page_count").fetchone()
        most = 2**31 if spare is None else pages + spare
        session.connection.execute(f"PRAGMA max_page_count = {most}")

    await writer_of(backend).submit(limit)


async def test_a_full_disk_refuses_writes_until_there_is_room(backend: SQLitePersistence) -> None:
    await backend.insert_rollouts([record("ro-1")])
    await backend.claim_rollouts(1, lambda found, _: lifecycle.begin_attempt(found, "at-1", "w", None, 0.0))
    before = await backend.get_rollout("ro-1"), await backend.totals()
    spans = [span(number) for number in range(500)]
    await limit_pages(backend, 40)

    def receive(found: RolloutRecord, fresh: Any) -> Any:
        return lifecycle.receive_spans(found, "at-1", fresh, 1.0)

    for _ in range(3):
        with pytest.raises(BackendFullError, match="no room left"):
            await backend.append_spans("ro-1", "at-1", spans, receive)
        assert (await backend.get_rollout("ro-1"), await backend.totals()) == before
        assert await backend.find_spans("ro-1", ["at-1"]) == []
    assert await backend.append_spans("ro-1", "at-1", spans[:10], receive)  # for so few there is room
    await limit_pages(backend, None)
    assert await backend.append_spans("ro-1", "at-1", spans, receive)
    assert [found.sequence_id for found in await backend.find_spans("ro-1", ["at-1"])] == list(range(1, 501))


async def test_what_fits_is_written_beside_what_does_not(backend: SQLitePersistence) -> None:
    await limit_pages(backend, 40)
    async with held_up(backend) as let_go:
        tasks = [
            asyncio.create_task(backend.insert_rollouts([record(name, size_bytes)]))
            for name, size_bytes in (("ro-1", 10), ("ro-huge", 10**6), ("ro-2", 10))
        ]
        await until_waiting(backend, 3)
        let_go()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [list, BackendFullError, list]
    records, total = await backend.find_rollouts(EVERYTHING)
    assert [found.rollout_id for found in records] == ["ro-1", "ro-2"]
    assert total == 2


# --- The log ---------------------------------------------------------------------------------------------------


def slow_read(connection: sqlite3.Connection) -> None:
    """Keep a snapshot for some milliseconds."""
    with sqlite_file.snapshot(connection):
        connection.execute("SELECT count(*) FROM rollout").fetchone()
        numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000)"
        connection.execute(f"{numbers} SELECT count(*) FROM n").fetchone()


async def test_the_log_stays_short_while_reads_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_CHECKPOINT_PAGES", 16)
    monkeypatch.setattr(sqlite_file, "_KEPT_LOG_BYTES", 2**18)
    monkeypatch.setattr(sqlite_file, "_LONG_LOG_BYTES", 2**20)
    path = tmp_path / "store.db"
    backend = SQLitePersistence(path)
    await backend.open()
    enough = False

    async def read_all_the_time() -> None:
        while not enough:
            await backend._search(slow_read)

    readers = [asyncio.create_task(read_all_the_time()) for _ in range(4)]
    longest = 0
    for number in range(60):
        await backend.insert_rollouts([record(f"ro-{number}", 200_000)])
        longest = max(longest, log_size(path))
    enough = True
    await asyncio.gather(*readers)
    await backend.close()
    assert longest < 6 * 2**20  # of the 12 MB that were written


def log_size(path: Path) -> int:
    return path.with_name(path.name + "-wal").stat().st_size


async def test_trouble_with_the_log_costs_no_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(connection: sqlite3.Connection) -> bool:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite_file, "_LONG_LOG_BYTES", 1000)
    monkeypatch.setattr(sqlite_file, "_restart_log", fail)
    backend = SQLitePersistence(tmp_path / "store.db")
    await backend.open()
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            await backend.insert_rollouts([record(f"ro-{number}")])
        assert (await backend.find_rollouts(EVERYTHING))[1] == 3
    await backend.close()
    assert "could not work the write-ahead log" in caplog.text


# --- Closing and opening again ---------------------------------------------------------------------------------


async def test_closing_finishes_what_waits_and_refuses_what_comes_after(tmp_path: Path) -> None:
    backend = SQLitePersistence(tmp_path / "store.db")
    await backend.open()
    async with held_up(backend) as let_go:
        waiting = [
            asyncio.create_task(backend.insert_rollouts([record(f"ro-{index}")])) for index in range(5)
        ]
        await until_waiting(backend, 5)
        closing = asyncio.create_task(backend.close())
        await asyncio.sleep(0)
        for late in (backend.insert_rollouts([record("ro-late")]), backend.change_rollout("ro-1", refuse)):
            with pytest.raises(RuntimeError, match="the store was closed"):
                await late
        let_go()
        await asyncio.gather(*waiting, closing)
    await backend.close()
    for read in (backend.get_rollout("ro-1"), backend.find_rollouts(EVERYTHING)):
        with pytest.raises(RuntimeError, match="the store was closed"):
            await read
    backend = SQLitePersistence(tmp_path / "store.db")
    await backend.open()
    assert (await backend.find_rollouts(EVERYTHING))[1] == 5
    await backend.close()


async def test_closing_waits_for_reads_that_are_under_way(tmp_path: Path) -> None:
    backend = SQLitePersistence(tmp_path / "store.db")
    await backend.open()
    started, go_on = threading.Event(), threading.Event()

    def read(connection: sqlite3.Connection) -> tuple[int]:
        started.set()
        assert go_on.wait(DEADLINE_SECONDS)
        count: tuple[int] = connection.execute("SELECT count(*) FROM rollout").fetchone()
        return count

    reading = asyncio.create_task(backend._search(read))
    assert await asyncio.to_thread(started.wait, DEADLINE_SECONDS)
    closing = asyncio.create_task(backend.close())
    await asyncio.sleep(0)
    go_on.set()
    assert await reading == (0,)
    await closing
    assert files_in(tmp_path) == ["store.db"]


def files_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


@pytest.mark.parametrize("in_memory", [False, True])
async def test_a_store_that_is_forgotten_closes(tmp_path: Path, in_memory: bool) -> None:
    backend = SQLitePersistence(":memory:" if in_memory else tmp_path / "store.db")
    await backend.open()
    await backend.insert_rollouts([record("ro-1")])
    thread = writer_of(backend)._thread
    del backend
    gc.collect()
    assert not thread.is_alive()
    assert files_in(tmp_path) == ([] if in_memory else ["store.db"])


async def test_several_callers_open_it_once(tmp_path: Path) -> None:
    backend = SQLitePersistence(tmp_path / "store.db")
    impatient = asyncio.create_task(backend.open())
    others = [asyncio.create_task(backend.open()) for _ in range(5)]
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.gather(*others)
    assert await backend.find_rollouts(EVERYTHING) == ([], 0)
    await backend.close()


async def test_everything_goes_on_after_a_restart(tmp_path: Path) -> None:
    clock = FakeClock()
    config = RolloutConfig(timeout_seconds=60, max_attempts=2, retry_condition=["timeout"])

    def start() -> SQLiteLightningStore:
        return SQLiteLightningStore(tmp_path / "store.db", clock=clock)

    store = start()
    first = await store.enqueue_rollout("first", config=config)
    second = await store.enqueue_rollout("second")
    third = await store.enqueue_rollout("third")
    claimed = await store.dequeue_rollout("w")
    assert claimed is not None
    key = {"rollout_id": first.rollout_id, "attempt_id": claimed.attempt.attempt_id}
    stored = await store.add_span(Span(**key, sequence_id=0, trace_id="1" * 32, span_id="1" * 16, name="a"))
    resources = await store.add_resources({"prompt": PromptTemplate(template="{x}", engine="f-string")})
    worker = await store.update_worker("w", {"load": 1.5})
    await store.close()

    store = start()
    assert await store.get_latest_resources() == resources
    assert list(await store.query_spans(first.rollout_id)) == [stored]
    assert await store.get_worker_by_id("w") == worker
    assert await store.get_next_span_sequence_id(*key.values()) == 2
    waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[second.rollout_id], timeout=1e6))
    await asyncio.sleep(0)
    clock.advance(61)
    expired = await asyncio.wait_for(until_status(store, first.rollout_id, "requeuing"), DEADLINE_SECONDS)
    assert expired.attempt.status == "timeout"
    order = [await store.dequeue_rollout("w") for _ in range(4)]
    assert [rollout and rollout.rollout_id for rollout in order] == [
        second.rollout_id,
        third.rollout_id,
        first.rollout_id,
        None,
    ]
    assert order[0] is not None
    await store.update_attempt(second.rollout_id, order[0].attempt.attempt_id, status="succeeded")
    (finished,) = await asyncio.wait_for(waiting, DEADLINE_SECONDS)
    assert finished.rollout_id == second.rollout_id
    await store.close()


async def until_status(store: SQLiteLightningStore, rollout_id: str, status: str) -> Any:
    while True:
        rollout = await store.get_rollout_by_id(rollout_id)
        assert rollout is not None
        if rollout.status == status:
            return rollout
        await asyncio.sleep(0)


async def test_numbers_that_order_things_are_never_given_twice(tmp_path: Path) -> None:
    revisions: list[int] = []
    for opening in range(3):
        backend = SQLitePersistence(tmp_path / "store.db")
        await backend.open()
        for number in range(3):
            (inserted,) = await backend.insert_rollouts([record(f"ro-{opening}-{number}")])
            revisions.append(inserted.revision)
            change = await backend.change_rollout(
                inserted.rollout_id, lambda found: lifecycle.update_rollout(found, {"mode": "val"}, 1.0)
            )
            assert change is not None
            revisions.append(change.after.revision)
        records, _ = await backend.find_rollouts(EVERYTHING)
        assert [found.revision for found in records] == revisions[1::2]
        await backend.close()
    assert revisions == list(range(1, 19))
