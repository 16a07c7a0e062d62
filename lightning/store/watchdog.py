"""Closing attempts whose time is up, on an idle store too."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable

from lightning.store.broker import BrokerClosed, EventBroker

logger = logging.getLogger(__name__)

_TOPIC = "watchdog"
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

    @property
    def next_deadline(self) -> float | None:
        """No rollout is due before this time, in seconds since the epoch; None: none will be."""
        return self._next

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
            self._broker.publish(_TOPIC)

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
        with self._broker.subscribe([_TOPIC]) as wake_up:
            while True:
                with self._lock:
                    until = self._next
                    if until is None:
                        self._task = None
                        return
                try:
                    if self._broker.clock.now() <= until:
                        await wake_up.wait(until + _MARGIN_SECONDS)
                        continue
                    with self._lock:
                        self._next = None
                    self._keep_earliest(await self._expire())
                except BrokerClosed:
                    return
                except Exception:
                    # A backend that is away for a moment must not leave attempts running for ever.
                    logger.exception("expiring attempts failed; trying again in %s s", _RETRY_SECONDS)
                    self._keep_earliest(self._broker.clock.now() + _RETRY_SECONDS)

    def _keep_earliest(self, deadline: float | None) -> None:
        with self._lock:
            if deadline is not None and (self._next is None or deadline < self._next):
                self._next = deadline
