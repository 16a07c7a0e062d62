"""The stop event of a job: set once by whoever ends it, seen by everybody."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import weakref
from multiprocessing import context, reduction
from typing import Any, Protocol, runtime_checkable

_READ_SIZE_BYTES = 4096


@runtime_checkable
class ExecutionEvent(Protocol):
    """What bundles are given to learn, and to say, that the job should end."""

    def set(self) -> None:
        """Ask everybody to come to an end."""

    def clear(self) -> None:
        """Take it back."""

    def is_set(self) -> bool:
        """Whether the job should end."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block the thread until it is set, at most `timeout` seconds (None: for ever); returns whether it is."""


class ThreadingEvent:
    """An `ExecutionEvent` for the threads of one process."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._event.wait(timeout)


class MultiprocessingEvent:
    """An `ExecutionEvent` for several processes; each one that it is handed to while being started sees the same.

    It is a pipe that is readable while the event is set. The event of `multiprocessing` takes a lock for every look
    at it, which a process that is killed at the wrong moment never gives back, and then everybody hangs. Here there
    is nothing to hold, no named semaphore to leak, and an event loop can wait for it (`fileno`).

    Args:
        ctx: A context of `multiprocessing`, accepted for the peer's sake: it works with every start method.
    """

    def __init__(self, ctx: context.BaseContext | None = None) -> None:
        self._adopt(*os.pipe())

    def _adopt(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        for fd in (reader, writer):
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
        self._finalizer = weakref.finalize(self, _close, reader, writer)

    def fileno(self) -> int:
        """A file descriptor that is readable while the event is set. Wait for it, but do not read from it."""
        return self._reader

    def set(self) -> None:
        if not self.is_set():
            os.write(self._writer, b"!")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, _READ_SIZE_BYTES):
                pass

    def is_set(self) -> bool:
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        return bool(poll.poll(None if timeout is None else max(timeout, 0) * 1000))

    def __reduce__(self) -> tuple[Any, ...]:
        context.assert_spawning(self)
        return _rebuild, (reduction.DupFd(self._reader), reduction.DupFd(self._writer))


def _rebuild(reader: Any, writer: Any) -> MultiprocessingEvent:
    event = MultiprocessingEvent.__new__(MultiprocessingEvent)
    event._adopt(reader.detach(), writer.detach())
    return event


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
