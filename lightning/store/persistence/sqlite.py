"""Records in one SQLite file: no server to run, and what was acknowledged survives `kill -9` and a power failure.

One thread writes, and commits all writes that wait for it together (`sqlite_writer`); reads go past it on connections
of their own (`sqlite_readers`), for SQLite's write-ahead log lets them. A write is a function that is called in the
writer's thread with the current record: reading it, asking the transition, and storing what came of it is one
transaction. The numbers that order things are given out there, too.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from lightning.store.persistence import sqlite_changes as changes
from lightning.store.persistence import sqlite_rows as rows
from lightning.store.persistence.abc import (
    ClaimTransition,
    Persistence,
    RolloutChange,
    RolloutTransition,
    Settlement,
    SpanTransition,
    Totals,
    WorkerTransition,
)
from lightning.store.persistence.sqlite_file import (
    Durability,
    FileLock,
    LogKeeper,
    check_place,
    check_room,
    open_reader,
    open_writer,
    snapshot,
)
from lightning.store.persistence.sqlite_readers import Read, ReadPool
from lightning.store.persistence.sqlite_retention import DROPPED_ROLLOUTS, EVICTED_SPANS, RetentionKeeper
from lightning.store.persistence.sqlite_search import (
    ATTEMPT_STATUS_COUNTER,
    STATUS_COUNTER,
    find_rollouts,
    is_text,
)
from lightning.store.persistence.sqlite_statements import select
from lightning.store.persistence.sqlite_writer import Counters, GroupCommitWriter, Session
from lightning.store.queries import RolloutQuery
from lightning.store.records import (
    ResourcesRecord,
    RolloutRecord,
    SpanReceipt,
    SpanRecord,
    WorkerRecord,
)
from lightning.store.retention import Retention

T = TypeVar("T")

IN_MEMORY = ":memory:"
_LARGEST_INTEGER = 2**63 - 1
_MAX_LOOKUPS_AT_ONCE = 64
"""More are not looked up on the caller's event loop but in a thread."""


class SQLitePersistence(Persistence):
    """Keeps records in a SQLite database.

    Args:
        path: The file, which is created if there is none; `":memory:"` keeps everything in memory.
        durability: What a power failure may take: with `"full"` nothing that was acknowledged, with `"normal"` the
            last moments before it. The end of the process, however sudden, takes nothing from either.
        retention: What is kept of finished rollouts; None: everything.
        now: Tells the time, in seconds since the epoch.
    """

    name = "sqlite"

    def __init__(
        self,
        path: str | Path,
        *,
        durability: Durability = "full",
        retention: Retention | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        if durability not in ("full", "normal"):
            raise ValueError(f"durability must be 'full' or 'normal', not {durability!r}")
        self._path = None if str(path) == IN_MEMORY else Path(path).expanduser().resolve()
        self.durable = self._path is not None
        self._durability = durability
        self._retention = retention
        self._now = now
        self._opening = threading.Lock()
        self._opened: _Opened | None = None

    async def open(self) -> None:
        """Open the file and bring its schema up to date. Harmless when called twice, or by several callers.

        Raises:
            BackendOpenError: It cannot be opened, or another store has it open.
        """
        with self._opening:
            if self._opened is None:
                keeper = None if self._retention is None else RetentionKeeper(self._retention, self._now)
                self._opened = _Opened(self._path, self._durability, keeper)
            opened = self._opened
        try:
            await asyncio.wrap_future(opened.writer.opened)
        except Exception:
            with self._opening:
                if self._opened is opened:
                    self._opened = None
            raise
        opened.close_with(self)

    async def close(self) -> None:
        with self._opening:
            opened = self._opened
        if opened is not None:
            opened.writer.stop()
            await asyncio.wrap_future(opened.writer.closed)
            opened.writer.join()

    @property
    def _writer(self) -> GroupCommitWriter:
        assert self._opened is not None, "open() comes first"
        return self._opened.writer

    async def _look(self, read: Read[T]) -> T:
        """A look-up that takes microseconds."""
        readers = self._opened.readers if self._opened else None
        if readers is None:  # in memory: there is one connection, and it is the writer's
            return await self._writer.submit(lambda session: read(session.connection))
        return readers.look(read)

    async def _search(self, read: Read[T]) -> T:
        """A read that may take long."""
        readers = self._opened.readers if self._opened else None
        if readers is None:
            return await self._writer.submit(lambda session: read(session.connection))
        return await readers.search(read)

    # --- rollouts ---

    async def insert_rollouts(
        self, records: Sequence[RolloutRecord], settle: Settlement | None = None
    ) -> list[RolloutRecord]:
        return await self._writer.submit(lambda session: changes.insert_rollouts(session, records, settle))

    async def get_rollout(self, rollout_id: str) -> RolloutRecord | None:
        return (await self.get_rollouts([rollout_id])).get(rollout_id)

    async def get_rollouts(self, rollout_ids: Sequence[str]) -> dict[str, RolloutRecord]:
        wanted = [rollout_id for rollout_id in rollout_ids if is_text(rollout_id)]
        few = len(wanted) <= _MAX_LOOKUPS_AT_ONCE
        return await (self._look if few else self._search)(
            lambda connection: rows.rollouts_by_id(connection, wanted)
        )

    async def settled_revision(self) -> int:
        counters = await self._look(lambda connection: dict(select(connection, "counters")))
        return int(counters.get("revision", 0))

    async def get_rollout_of_attempt(self, attempt_id: str) -> RolloutRecord | None:
        if not is_text(attempt_id):
            return None

        def read(connection: sqlite3.Connection) -> RolloutRecord | None:
            with snapshot(connection):
                found = rows.read_rollouts(
                    connection, select(connection, "rollout_by_attempt_id", attempt_id)
                )
            return found[0].record if found else None

        return await self._look(read)

    async def change_rollout(
        self, rollout_id: str, transition: RolloutTransition, settle: Settlement | None = None
    ) -> RolloutChange | None:
        if not is_text(rollout_id):
            return None
        return await self._writer.submit(
            lambda session: changes.change_rollout(session, rollout_id, transition, settle)
        )

    async def claim_rollouts(
        self, limit: int, transition: ClaimTransition, settle: Settlement | None = None
    ) -> list[RolloutChange]:
        return await self._writer.submit(
            lambda session: changes.claim_rollouts(session, limit, transition, settle)
        )

    async def why_gone(self, rollout_id: str) -> str | None:
        if not is_text(rollout_id):
            return None
        found = await self._look(
            lambda connection: select(connection, "dropped_rollout", rollout_id).fetchone()
        )
        if found is None:
            return None
        kept = "" if self._retention is None else f", which keeps finished ones for {self._retention.text}"
        return f"it had finished, and was dropped with its spans by this store{kept}"

    async def find_rollouts(self, query: RolloutQuery) -> tuple[list[RolloutRecord], int]:
        return await self._search(lambda connection: find_rollouts(connection, query))

    async def queue_order(self) -> list[str]:
        return await self._search(lambda connection: [row[0] for row in select(connection, "queue_order")])

    async def due_rollouts(self, now: float, limit: int) -> list[str]:
        return await self._look(
            lambda connection: [row[0] for row in select(connection, "due_rollouts", now, limit)]
        )

    async def first_deadline(self) -> float | None:
        def read(connection: sqlite3.Connection) -> float | None:
            row = select(connection, "first_deadline").fetchone()
            return None if row is None else row[0]

        return await self._look(read)

    # --- spans ---

    async def append_spans(
        self,
        rollout_id: str,
        attempt_id: str,
        spans: Sequence[SpanRecord],
        transition: SpanTransition,
        settle: Settlement | None = None,
    ) -> tuple[RolloutChange, list[SpanReceipt]] | None:
        if not is_text(rollout_id):
            return None
        return await self._writer.submit(
            lambda session: changes.append_spans(session, rollout_id, attempt_id, spans, transition, settle)
        )

    async def find_spans(self, rollout_id: str, attempt_ids: Sequence[str]) -> list[SpanRecord]:
        attempt_ids = [
            attempt_id for attempt_id in attempt_ids if is_text(attempt_id) and is_text(rollout_id)
        ]

        def read(connection: sqlite3.Connection) -> list[SpanRecord]:
            found: list[SpanRecord] = []
            with snapshot(connection):
                for attempt_id in attempt_ids:
                    # sorted here, for SQLite would carry the payloads along while it sorts
                    in_order = sorted(select(connection, "spans_of_attempt", attempt_id, rollout_id))
                    found.extend(
                        SpanRecord(attempt_id, span_id, sequence_id, payload)
                        for sequence_id, _, span_id, payload in in_order
                    )
            return found

        return await self._search(read)

    # --- resources ---

    async def insert_resources(self, record: ResourcesRecord) -> bool:
        return await self._writer.submit(lambda session: changes.insert_resources(session, record))

    async def get_resources(self, resources_id: str, version: int | None) -> ResourcesRecord | None:
        if not is_text(resources_id):
            return None
        if version is None:
            return await self._one_resources("newest_resources", resources_id)
        if not 1 <= version <= _LARGEST_INTEGER:
            return None
        return await self._one_resources("resources_by_version", resources_id, version)

    async def get_latest_resources(self) -> ResourcesRecord | None:
        return await self._one_resources("latest_resources")

    async def _one_resources(self, statement: str, *values: str | int) -> ResourcesRecord | None:
        def read(connection: sqlite3.Connection) -> ResourcesRecord | None:
            with snapshot(connection):
                return rows.read_resources(connection, select(connection, statement, *values).fetchone())

        return await self._look(read)

    async def find_resources(self) -> list[ResourcesRecord]:
        def read(connection: sqlite3.Connection) -> list[ResourcesRecord]:
            with snapshot(connection):
                versions = select(connection, "all_resources").fetchall()
                found = (rows.read_resources(connection, version) for version in versions)
                return [record for record in found if record is not None]

        return await self._search(read)

    # --- workers ---

    async def change_worker(self, worker_id: str, transition: WorkerTransition) -> WorkerRecord:
        return await self._writer.submit(
            lambda session: changes.change_worker(session, worker_id, transition)
        )

    async def get_worker(self, worker_id: str) -> WorkerRecord | None:
        if not is_text(worker_id):
            return None

        def read(connection: sqlite3.Connection) -> WorkerRecord | None:
            row = select(connection, "worker_by_id", worker_id).fetchone()
            return None if row is None else rows.read_worker(row)

        return await self._look(read)

    async def find_workers(self) -> list[WorkerRecord]:
        return await self._search(
            lambda connection: [rows.read_worker(row) for row in select(connection, "all_workers")]
        )

    # --- about itself ---

    async def totals(self) -> Totals:
        counters, queued_since = await self._look(_count)
        return Totals(
            rollouts_by_status=_by_status(counters, STATUS_COUNTER),
            attempts_by_status=_by_status(counters, ATTEMPT_STATUS_COUNTER),
            queued_since=queued_since,
            attempts=counters.get("attempts", 0),
            spans=counters.get("spans", 0),
            resources=counters.get("resources", 0),
            workers=counters.get("workers", 0),
            span_bytes=counters.get("span_bytes", 0),
            evicted_spans=counters.get(EVICTED_SPANS, 0),
            dropped_rollouts=counters.get(DROPPED_ROLLOUTS, 0),
        )

    async def check_writable(self) -> None:
        await self._writer.submit(_write_something)
        if self._path is not None:
            check_room(self._path)


class _Opened:
    """An open database: who holds the file, who writes, who reads."""

    def __init__(self, path: Path | None, durability: Durability, retention: RetentionKeeper | None) -> None:
        self._path = path
        self._durability: Durability = durability
        self._retention = retention
        self._lock: FileLock | None = None
        self._finalizer: weakref.finalize[..., SQLitePersistence] | None = None
        self.readers = None if path is None else ReadPool(lambda: open_reader(path))
        self._log = None if path is None else LogKeeper(path)
        self.writer = GroupCommitWriter(self._open, self._tidy, self._close)

    def close_with(self, owner: SQLitePersistence) -> None:
        """Close when `owner` is forgotten without having been closed, or when the interpreter ends."""
        if self._finalizer is None:
            self._finalizer = weakref.finalize(owner, _stop, self.writer)

    def _open(self) -> Session:
        with ExitStack() as undo:
            if self._path is not None:
                check_place(self._path)
                self._lock = FileLock(self._path)
                undo.callback(self._lock.release)
            connection = open_writer(self._path, self._durability)
            undo.callback(connection.close)
            session = Session(connection, Counters(connection))
            undo.pop_all()
        return session

    def _tidy(self, session: Session) -> float | None:
        if self._log is not None:
            self._log.tidy(session.connection)
        return None if self._retention is None else self._retention.tend(session)

    def _close(self, session: Session) -> None:
        with ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.release)
            stack.callback(
                session.connection.close
            )  # the last one works the log into the file and removes it
            if self.readers is not None:
                stack.callback(self.readers.close)


def _stop(writer: GroupCommitWriter) -> None:
    writer.stop()
    writer.join()


def _count(connection: sqlite3.Connection) -> tuple[dict[str, int], float | None]:
    """The counters, and since when the rollout at the head of the queue has been in it."""
    with snapshot(connection):
        head = select(connection, "queued_since").fetchone()
        return dict(select(connection, "counters")), None if head is None else head[0]


def _write_something(session: Session) -> None:
    session.counters.add("checks")


def _by_status(counters: dict[str, int], prefix: str) -> dict[str, int]:
    found = {name[len(prefix) :]: n for name, n in counters.items() if name.startswith(prefix)}
    return {status: n for status, n in found.items() if n}
