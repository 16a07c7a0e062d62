"""One execution: the thread that conducts it, the first failure that ends it, and the signals that do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from lightning.execution.bundles import BundleRun, BundleStart, CallerThread
from lightning.execution.events import ExecutionEvent, MultiprocessingEvent
from lightning.execution.signals import SignalWatch

logger = logging.getLogger(__name__)

_LAST_CHANCE_SECONDS = 2.0
"""How long a bundle may unwind after everything else of an interrupted job is gone."""

T = TypeVar("T")


class JobEnded(Exception):
    """The job is over before its time; `Job.failure` says why. Unwinds the job's own code and nothing else."""


class _Interrupted(Exception):
    """The job was ended by a signal, which takes its course once the job is gone."""


async def first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    """Wait until one of these is done, or `timeout` seconds have passed (None: for ever); leaves them all alone."""
    await asyncio.wait(set(futures), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


class Job:
    """Conducts one execution from a thread with an event loop of its own, so that a bundle that blocks the caller's
    thread never stands in the way of watching and stopping the others.

    Everything but `execute` is to be used on that loop.

    Args:
        event: Set when the job should end; by the job, or by a bundle.
        graceful_timeout: How long a bundle may take to end after it was asked to, and again after it was cancelled,
            in seconds.
        terminate_timeout: How long one that was interrupted by force may take then, in seconds.
        drains: Whether SIGTERM, unlike anything else that ends the job, leaves the event alone, so that work in hand
            can be finished.
        poll_interval: How often an event of a foreign kind is looked at, in seconds.
    """

    def __init__(
        self,
        event: ExecutionEvent,
        *,
        graceful_timeout: float,
        terminate_timeout: float,
        drains: bool = False,
        poll_interval: float = 0.05,
    ) -> None:
        self.event = event
        self.graceful_timeout = graceful_timeout
        self.terminate_timeout = terminate_timeout
        self.drains = drains
        self.poll_interval = poll_interval
        self.caller = CallerThread()
        self.failure: asyncio.Future[BaseException]
        """The first thing that ended the job before its time."""
        self.stopping: asyncio.Future[None]
        """Done when the event was set."""
        self.urgent: asyncio.Event
        """Set when there is no more time for order: the user asked twice."""
        self.signal: int | None = None
        """The signal that ended the job."""
        self._interrupted = False
        self._watch = SignalWatch(self._heed)
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- For the caller's thread -----------------------------------------------------------------------------------

    def execute(self, conduct: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `conduct` in the job's thread and wait for its end.

        Raises:
            BaseException: What ended the job, if it did not end by itself.
        """
        job = BundleRun(lambda: self._main(conduct))
        with self._watch:
            job.run_in_thread("lightning-job")
            self.caller.serve(job)
        if job.error is not None:
            raise job.error
        if self.failure.done() and not isinstance(self.failure.result(), _Interrupted):
            raise self.failure.result()
        if self._watch.signals:
            self._watch.resume()

    def _heed(self, own: bool) -> None:
        """In the main thread, between any two instructions."""
        loop, run = self._loop, self.caller.current
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the job ends this moment
                loop.call_soon_threadsafe(self._note_signals)
        if (own or len(self._watch.signals) > 1) and run is not None and run.interruptible:
            self._interrupted = True
            raise KeyboardInterrupt

    # --- On the job's loop -------------------------------------------------------------------------------------

    async def _main(self, conduct: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self.failure, self.stopping = self._loop.create_future(), self._loop.create_future()
        self.urgent = asyncio.Event()
        watcher = asyncio.create_task(self._watch_event())
        if self._watch.active:
            self._loop.add_reader(self._watch.fileno(), self._read_signals)
        self._note_signals()
        try:
            await conduct()
        except JobEnded:
            pass
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            self.fail(error)
        finally:
            watcher.cancel()
        await self._leave_if_stuck()
        if self._watch.active:
            self._loop.remove_reader(self._watch.fileno())
        self._loop = None

    async def _leave_if_stuck(self) -> None:
        """Nothing of the job is left but a bundle that hangs in a call from which not even an interrupt brings it back:
        go on without its thread if that is its own; else, if somebody wants this program to end, end it without it."""
        run = self.caller.current
        if run is None or not (run.has_own_thread or self._watch.signals):
            return
        await first_of(run.end(), timeout=_LAST_CHANCE_SECONDS)
        if run.ended.done():
            return
        if run.has_own_thread:
            logger.warning("a bundle hangs; its thread is left behind")
        else:
            logger.critical("the program is ended by force: a bundle hangs in the main thread")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + self._watch.signals[0])

    async def _watch_event(self) -> None:
        """The event may be set by anybody, in any thread or process."""
        if isinstance(self.event, MultiprocessingEvent):
            loop, seen = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(self.event.fileno(), seen.set)
            try:
                await seen.wait()
            finally:
                loop.remove_reader(self.event.fileno())
        else:
            while not self.event.is_set():  # noqa: ASYNC110 - it is set in other threads
                await asyncio.sleep(self.poll_interval)
        self.stopping.set_result(None)

    def _read_signals(self) -> None:
        self._watch.read()
        self._note_signals()

    def _note_signals(self) -> None:
        signals = self._watch.signals
        if signals and not self.failure.done():
            self.signal = signals[0]
            self.fail(_Interrupted(signal.Signals(self.signal).name))
        if len(signals) > 1:
            self.urgent.set()

    def fail(self, error: BaseException) -> None:
        """End the job. The first error wins; a later one is most often its consequence, and is only logged."""
        if not (self.drains and isinstance(error, _Interrupted) and self.signal == signal.SIGTERM):
            self.event.set()
        if not self.failure.done():
            self.failure.set_result(error)
        elif error is not self.failure.result():
            logger.debug("while the job was ending", exc_info=error)

    async def unless_failed(self, awaitable: Awaitable[T]) -> T:
        """Wait for `awaitable`; when the job fails before, cancel it and wait for its clean-up.

        Raises:
            JobEnded: The job has failed.
        """
        task = asyncio.ensure_future(awaitable)
        try:
            await first_of(task, self.failure)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if self.failure.done():
            if not task.cancelled() and task.exception() is not None:
                logger.debug("while the job was ending", exc_info=task.exception())
            raise JobEnded
        return task.result()

    async def pause(self, awaitable: asyncio.Future[Any], timeout: float) -> bool:
        """Wait for a future, at most `timeout` seconds, and no more when it is urgent; returns whether it is done."""
        hurry = asyncio.ensure_future(self.urgent.wait())
        try:
            await first_of(awaitable, hurry, timeout=timeout)
        finally:
            hurry.cancel()
        return awaitable.done()

    async def run_in_caller(self, start: BundleStart) -> None:
        """Run a bundle in the thread that called `execute`, until it ends, or `graceful_timeout` after `event` is set.

        Raises:
            JobEnded: The bundle raised something, which is the job's failure now, or the job failed otherwise.
        """
        run = self.caller.submit(start)
        ended = run.end()
        try:
            await self.unless_failed(first_of(ended, self.stopping))
            await self.unless_failed(self.pause(ended, self.graceful_timeout))
        finally:
            await self._end(run, ended)
        if self._interrupted and isinstance(run.error, KeyboardInterrupt):
            # by `_end` alone: the user's Ctrl-C is the job's failure already
            logger.warning("a bundle did not end when it was told to, and was interrupted")
        elif run.error is not None:
            self.fail(run.error)
            raise JobEnded

    async def _end(self, run: BundleRun, ended: asyncio.Future[None]) -> None:
        if ended.done():
            return
        run.cancel()
        if await self.pause(ended, self.graceful_timeout):
            return
        if self._watch.active and run.interruptible and not self._interrupted:
            # it blocks the main thread, so cancelling did not reach it: interrupt it as Ctrl-C would without us
            self._watch.interrupt()
        if not await self.pause(ended, self.terminate_timeout) and not self.urgent.is_set():
            logger.error(
                "a bundle in the caller's thread does not end; everything else is being stopped without it"
            )
