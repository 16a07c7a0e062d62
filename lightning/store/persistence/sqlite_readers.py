"""Reading beside the writer: connections of their own, each of which sees what was committed when a read begins."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lightning.store.persistence.sqlite_file import as_backend_error

T = TypeVar("T")

Read = Callable[[sqlite3.Connection], T]

_THREADS = 2
_MAX_IDLE_CONNECTIONS = 8


class ReadPool:
    """Connections that are used by one thread at a time, and as many of them as there are readers at a time.

    Args:
        open: Makes a connection.
    """

    def __init__(self, open: Callable[[], sqlite3.Connection]) -> None:
        self._open = open
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._process = os.getpid()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="lightning-sqlite-reader")

    def look(self, read: Read[T]) -> T:
        """Read at once, in this thread: for look-ups that take microseconds, less than changing threads would."""
        connection = self._take()
        try:
            return read(connection)
        except sqlite3.Error as error:
            raise as_backend_error(error) from error
        finally:
            self._give_back(connection)

    async def search(self, read: Read[T]) -> T:
        """Read in another thread: for what may take long."""
        self._check_usable()
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.look, read)

    def close(self) -> None:
        """Wait for the reads that are under way, and close all connections."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        self._threads.shutdown()
        for connection in idle:
            connection.close()

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("this store was opened by another process; a forked process must open its own")
        if self._closed:
            raise RuntimeError("the store was closed")

    def _take(self) -> sqlite3.Connection:
        with self._lock:
            self._check_usable()
            if self._idle:
                return self._idle.pop()
        try:
            return self._open()
        except sqlite3.Error as error:
            raise as_backend_error(error) from error

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()
