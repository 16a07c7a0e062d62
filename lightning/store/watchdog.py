"""Closing attempts whose time is up, on an idle store too."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from lightning.store.broker import BrokerClosed, EventBroker

logger = logging.getLogger(__name__)

WATCHDOG_TOPIC = "watchdog"
_MARGIN_SECONDS = 0.001
"""A deadline has passed strictly after its time; wake up a little later than it."""
_RETRY_SECONDS = 0.5


class Watchdog:
    """Sleeps until the first deadline, has what is due expired, and sleeps again.

    It runs as a task on the event loop of whoever first caused a deadline, and only while there are deadlines; when
    that loop is closed, the next deadline starts it anew on another.

    Args:
        broker: Wakes it when an earlier deadline appears; its clock tells the time.
        expire: Expires everything that is due and returns the next deadline, None if there is none.
    """

    def __init__(self, broker: EventBroker, expire: Callable[[], Awaitable[float | None]]) -> None:
        self._broker = broker
        self._expire = expire
        self._lock = threading.Lock()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next: float | None = None
        self._expiry: Future[None] | None = None
        """Done when what is being expired now is."""

    def watch(self, deadline: float | None) -> None:
        """There is something to expire after `deadline`."""
        if deadline is None:
            return
        with self._lock:
            earlier = self._next is None or deadline < self._next
            if earlier:
                self._next = deadline
            if self._loop is None or self._loop.is_closed() or self._task is None or self._task.done():
                self._loop = asyncio.get_running_loop()
                self._task = self._loop.create_task(self._run(), name="lightning-watchdog")
                return
        if earlier:
            self._broker.publish(WATCHDOG_TOPIC)

    def attend(self) -> None:
        """See to it that somebody watches, where the event loop of who did is closed."""
        if self._next is not None and self._loop is not None and self._loop.is_closed():
            self.watch(self._next)

    async def catch_up(self) -> None:
        """Return when nothing is overdue any more: what is due has been expired, by this call or by another."""
        while True:
            with self._lock:
                running = self._expiry
                due = self._next
                if running is None:
                    if due is None or self._broker.clock.now() <= due:
                        return
                    self._next = None
                    self._expiry = Future()
            if running is None:
                await self._expire_now(due)
                return
            await asyncio.shield(asyncio.wrap_future(running))

    async def _expire_now(self, due: float | None) -> None:
        deadline = due  # if this fails, it still is
        try:
            deadline = await self._expire()
        finally:
            with self._lock:
                self._keep_earliest(deadline)
                expiry, self._expiry = self._expiry, None
            if expiry is not None:
                expiry.set_result(None)

    async def close(self) -> None:
        """Stop; nothing expires any more."""
        task, self._task = self._task, None
        if task is None or self._loop is None or self._loop.is_closed():
            return
        if self._loop is asyncio.get_running_loop():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            self._loop.call_soon_threadsafe(task.cancel)

    async def _run(self) -> None:
        with self._broker.subscribe([WATCHDOG_TOPIC]) as wake_up:
            while True:
                with self._lock:
                    until = self._next
                    if until is None and self._expiry is None:
                        self._task = None
                        return
                try:
                    if until is not None and self._broker.clock.now() <= until:
                        await wake_up.wait(until + _MARGIN_SECONDS)
                    else:
                        await self.catch_up()
                except BrokerClosed:
                    return
                except Exception:
                    # A backend that is away for a moment must not leave attempts running for ever.
                    logger.exception("expiring attempts failed; trying again in %s s", _RETRY_SECONDS)
                    with self._lock:
                        if self._next is not None:
                            self._next = max(self._next, self._broker.clock.now() + _RETRY_SECONDS)

    def _keep_earliest(self, deadline: float | None) -> None:
        if deadline is not None and (self._next is None or deadline < self._next):
            self._next = deadline
