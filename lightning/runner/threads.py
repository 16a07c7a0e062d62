"""Threads for code that blocks: reused one task after the other, interruptible, and left behind if they will not stop.

Executors of the standard library are no use for that: they wait for their threads at exit, and cannot replace one that
hangs. Nor is asyncio's default executor, which the agent's own libraries need.
"""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any

_JOIN_SECONDS = 1.0


class AgentInterrupted(BaseException):
    """Raised in the code of a plain-function agent whose attempt is over. Not an `Exception`, so that code which
    catches those, to try again, ends too."""


class _Job:
    """One call and where its outcome goes."""

    def __init__(self, call: Callable[[], Any], context: Context) -> None:
        self._call = call
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._outcome: tuple[Any, BaseException | None] = (None, AgentInterrupted())
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def run(self) -> None:
        try:
            self._outcome = (self._context.run(self._call), None)
        except BaseException as error:  # noqa: BLE001  # the caller gets it
            self._outcome = (None, error)

    def deliver(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is interested any more
            self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        if self.future.done():
            return
        result, error = self._outcome
        if error is None:
            self.future.set_result(result)
        elif isinstance(error, StopIteration) or not isinstance(error, Exception):
            self.future.set_exception(CallEnded(error))
        else:
            self.future.set_exception(error)


class CallEnded(Exception):
    """The call ended by an exception that must not travel through an event loop; it is the `cause`."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


class BlockingThread:
    """A daemon thread that runs calls one at a time.

    Args:
        name: Of the thread, for people who debug.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # taken by callers only, never by the thread itself: an interruption may strike wherever that is
        self._lock = threading.Lock()
        self._latest: _Job | None = None
        self._interrupted = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def reusable(self) -> bool:
        """Whether it may be given another call: one that was interrupted ends with the call it is in."""
        return not self._interrupted

    def call(self, function: Callable[[], Any], context: Context) -> asyncio.Future[Any]:
        """Run `function` within `context`. Cancelling the future does not reach the thread, `interrupt` does.

        Raises:
            RuntimeError: The thread was interrupted.
        """
        job = _Job(function, context)
        with self._lock:
            if self._interrupted:
                raise RuntimeError("the thread was interrupted; take another")
            self._latest = job
            self._jobs.put(job)
        return job.future

    def interrupt(self, call: asyncio.Future[Any]) -> None:
        """Raise `AgentInterrupted` in this call, as soon as it executes Python code; nothing if it is done.

        Code that hangs in a C function notices only when that returns.
        """
        with self._lock:
            job = self._latest
            if self._interrupted or job is None or job.future is not call or call.done():
                return
            self._interrupted = True
            assert self._thread.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(AgentInterrupted)
            )

    def stop(self) -> None:
        """End the thread after the calls that it was given. Does not wait."""
        self._jobs.put(None)

    def join(self, timeout: float) -> bool:
        """Wait for the thread to end; returns whether it did."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job.run()
                job.deliver()
        except AgentInterrupted:
            # It struck outside of the call: before it began, or just when it had ended. It comes once only, and no
            # call is taken after it, so it is the latest that still needs an answer.
            assert self._latest is not None
            self._latest.deliver()


class BlockingThreads:
    """Threads to take and to give back, so that code finds itself on the one it was on before, if it can.

    Args:
        name: Of the threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._free: list[BlockingThread] = []

    def take(self) -> BlockingThread:
        """The thread given back last, or a new one."""
        return self._free.pop() if self._free else BlockingThread(self._name)

    def give_back(self, thread: BlockingThread) -> None:
        """Keep a thread for later; one that was interrupted ends with the code it is in."""
        if thread.reusable:
            self._free.append(thread)
        else:
            thread.stop()

    def close(self) -> None:
        """End the free threads."""
        free, self._free = self._free, []
        for thread in free:
            thread.stop()
        for thread in free:
            thread.join(_JOIN_SECONDS)
