"""Group commit: one thread writes, and all writes that wait for it share a transaction.

What makes a write durable, waiting for the disk, costs the same for one as for a hundred. So while a transaction is
being committed the next writes gather, and go into the next one together; each returns once it is committed.

The interpreter lets one thread run at a time, and SQLite gives way several times in every statement. A writer that
began with the first of the writes that an event loop is about to make would fight with it for each statement. So a loop
hands over what it has gathered once a turn, and mostly has nothing to do by the time the writer begins.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lightning.store.persistence.sqlite_file import as_backend_error
from lightning.store.persistence.sqlite_rows import StoredRollout
from lightning.store.persistence.sqlite_statements import select
from lightning.store.records import WorkerRecord

T = TypeVar("T")

_MAX_WRITES_PER_TRANSACTION = 1024


class Counters:
    """Numbers of the whole store: changed in memory, and saved by the transaction that changed them."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._saved: dict[str, int] = dict(select(connection, "counters"))
        self._values = dict(self._saved)
        self.changes = 0
        """How often any of them was changed."""

    def add(self, name: str, amount: int = 1) -> int:
        """Change a number, from 0 if there is none; returns what it is now."""
        self.changes += 1
        value = self._values[name] = self._values.get(name, 0) + amount
        return value

    def save(self, connection: sqlite3.Connection) -> None:
        """Write what changed, at the end of a transaction."""
        for name, value in self._values.items():
            if self._saved.get(name) != value:
                select(connection, "save_counter", name, value)

    def commit(self) -> None:
        """The transaction succeeded."""
        self._saved = dict(self._values)

    def undo(self) -> None:
        """The transaction failed."""
        self._values = dict(self._saved)


@dataclass(frozen=True)
class Session:
    """What a write works with, in the writer's thread and inside its transaction."""

    connection: sqlite3.Connection
    counters: Counters
    known_rollouts: dict[str, StoredRollout] = field(default_factory=dict)
    """Rollouts as they stand in the file, which nobody else writes to."""
    known_workers: dict[str, tuple[int, tuple[Any, ...], WorkerRecord]] = field(default_factory=dict)
    """Workers as they stand there: ordinal, columns, record."""


@contextmanager
def transaction(session: Session) -> Iterator[None]:
    """Commit what is done inside, or, if it raises, none of it."""
    connection, counters = session.connection, session.counters
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        counters.save(connection)
        connection.execute("COMMIT")
    except BaseException:
        counters.undo()
        session.known_rollouts.clear()
        session.known_workers.clear()
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    counters.commit()


Work = Callable[[Session], T]


@dataclass(frozen=True)
class _Write(Generic[T]):
    work: Work[T]
    future: asyncio.Future[T]
    loop: asyncio.AbstractEventLoop


@dataclass(frozen=True)
class _Outcome:
    write: _Write[Any]
    value: Any = None
    error: Exception | None = None

    def tell(self) -> None:
        """On the loop of the caller."""
        future = self.write.future
        if future.done():  # the caller was cancelled
            return
        if self.error is None:
            future.set_result(self.value)
        else:
            future.set_exception(self.error)


class GroupCommitWriter:
    """The thread that writes.

    Args:
        open: Called in that thread, first; what it raises, `opened` raises.
        tidy: Called in that thread between transactions, and at first; returns after how many seconds it must be called
            again though nothing was written, None if it need not be.
        close: Called in that thread, last, unless `open` failed.
    """

    def __init__(
        self,
        open: Callable[[], Session],
        tidy: Callable[[Session], float | None],
        close: Callable[[Session], None],
    ) -> None:
        self._open = open
        self._tidy = tidy
        self._close = close
        self._process = os.getpid()
        self._changed = threading.Condition()
        """Guards what follows, and tells the thread that there is something to do."""
        self._gathered: dict[asyncio.AbstractEventLoop, list[_Write[Any]]] = {}
        """What each loop has not handed over yet."""
        self._waiting: list[_Write[Any]] = []
        self._stopping = False
        self.opened = _uncancellable_future()
        """Done when the connection is ready to write."""
        self.closed = _uncancellable_future()
        """Done when the thread has nothing more to do."""
        self._thread = threading.Thread(target=self._main, name="lightning-sqlite-writer", daemon=True)
        self._thread.start()

    async def submit(self, work: Work[T]) -> T:
        """Do `work` in a transaction, and return what it returned once that is committed.

        If it raises, nothing of it is done. It may be done more than once, but has an effect only once.

        Raises:
            RuntimeError: The store was closed.
            BackendError: The database cannot be written.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if os.getpid() != self._process:
            raise RuntimeError("this store was opened by another process; a forked process must open its own")
        with self._changed:
            if self._stopping:
                raise closed_error()
            if loop not in self._gathered:
                self._gathered[loop] = []
                loop.call_soon(self._hand_over, loop)
            self._gathered[loop].append(_Write(work, future, loop))
        return await future

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._changed:
            self._waiting += self._gathered.pop(loop, ())
            self._changed.notify()

    def stop(self) -> None:
        """Take no more writes, and end when those that wait are done: see `closed`. Harmless when called twice."""
        with self._changed:
            self._stopping = True
            for loop in list(self._gathered):
                self._hand_over(loop)
            self._changed.notify()

    def join(self) -> None:
        """Wait for the thread to end."""
        if os.getpid() == self._process and self._thread is not threading.current_thread():
            self._thread.join()

    def _main(self) -> None:
        try:
            self._run()
        finally:
            self.stop()
            self._refuse_rest()
            self.closed.set_result(None)

    def _run(self) -> None:
        try:
            session = self._open()
        except Exception as error:  # noqa: BLE001  # it is raised by whoever opened the store
            self.opened.set_exception(error)
            return
        self.opened.set_result(None)
        try:
            wait = self._tidy(session)
            while (writes := self._take(wait)) is not None:
                if writes:
                    _deliver(_execute(session, writes))
                wait = self._tidy(session)
        finally:
            self._close(session)

    def _refuse_rest(self) -> None:
        """Leave nobody waiting if the thread ends before its time."""
        with self._changed:
            refused, self._waiting = self._waiting, []
        _deliver([_Outcome(write, error=closed_error()) for write in refused])

    def _take(self, wait_seconds: float | None) -> list[_Write[Any]] | None:
        """Wait for a write, and take it with all others that are there: none after a time, None to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping, wait_seconds)
            writes = self._waiting[:_MAX_WRITES_PER_TRANSACTION]
            del self._waiting[:_MAX_WRITES_PER_TRANSACTION]
            return None if self._stopping and not writes else writes


def closed_error() -> RuntimeError:
    """What is raised by what comes too late."""
    return RuntimeError("the store was closed")


def _uncancellable_future() -> Future[None]:
    """Many may wait for it, and one of them who is cancelled must not cancel it."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _execute(session: Session, writes: list[_Write[Any]]) -> list[_Outcome]:
    """Do the writes in one transaction, or, if that fails, each in one of its own."""
    try:
        return _execute_together(session, writes)
    except Exception as error:  # noqa: BLE001  # it is raised by whoever wanted it written
        if len(writes) == 1:
            return [_Outcome(writes[0], error=as_backend_error(error))]
    return [outcome for write in writes for outcome in _execute(session, [write])]


def _execute_together(session: Session, writes: list[_Write[Any]]) -> list[_Outcome]:
    with transaction(session):
        return [_execute_one(session, write) for write in writes]


def _execute_one(session: Session, write: _Write[Any]) -> _Outcome:
    """Do a write. Raises what it raises if it has left something behind that must be rolled back."""
    connection, counters = session.connection, session.counters
    before = connection.total_changes, counters.changes
    try:
        return _Outcome(write, write.work(session))
    except sqlite3.Error:
        raise
    except Exception as error:
        if before != (connection.total_changes, counters.changes):
            raise
        return _Outcome(write, error=error)


def _deliver(outcomes: list[_Outcome]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome.write.loop, []).append(outcome)
    for loop, of_loop in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            loop.call_soon_threadsafe(_tell, of_loop)


def _tell(outcomes: list[_Outcome]) -> None:
    for outcome in outcomes:
        outcome.tell()
