"""What happens to a store's records without its doing: other servers work on the same data."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable

from lightning.store.broker import EventBroker
from lightning.store.persistence.abc import Announce, Persistence
from lightning.store.watchdog import WATCHDOG_TOPIC, Watchdog

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
_DEADLINES_SECONDS = 1.0
"""How often to look for deadlines that another server has set and may not live to see."""


class OutsideWorld:
    """Listens to a shared backend; does nothing about one that is not.

    It runs as a task on the event loop that first used the store; when that loop is closed, on that of the next caller.

    Args:
        persistence: The backend.
        broker: Knows whether anybody waits.
        watchdog: Is told of deadlines.
        hear: Is told of changes by others.
    """

    def __init__(
        self, persistence: Persistence, broker: EventBroker, watchdog: Watchdog, hear: Announce
    ) -> None:
        self._persistence = persistence
        self._broker = broker
        self._watchdog = watchdog
        self._hear = hear
        self._lock = threading.Lock()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def attend(self) -> None:
        """See to it that somebody listens."""
        loop = self._loop
        if not self._persistence.shared or (loop is not None and not loop.is_closed()):
            return
        with self._lock:
            if not self._closed and (self._loop is None or self._loop.is_closed()):
                self._loop = asyncio.get_running_loop()
                self._task = self._loop.create_task(self._run(), name="lightning-outside")

    async def close(self) -> None:
        """Listen no more."""
        with self._lock:
            self._closed = True
            task, self._task = self._task, None
        if task is None or self._loop is None or self._loop.is_closed():
            return
        if self._loop is asyncio.get_running_loop():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            self._loop.call_soon_threadsafe(task.cancel)

    async def _run(self) -> None:
        duties = (self._watch, self._mind_deadlines)
        # told to end, it is to wait for both: without `return_exceptions` it would leave at the end of the first
        await asyncio.gather(*map(_over_and_over, duties), return_exceptions=True)

    async def _watch(self) -> None:
        await self._persistence.watch(self._hear, lambda: self._broker.is_awaited(except_for=WATCHDOG_TOPIC))

    async def _mind_deadlines(self) -> None:
        while True:
            self._watchdog.watch(await self._persistence.first_deadline())
            await asyncio.sleep(_DEADLINES_SECONDS)


async def _over_and_over(duty: Callable[[], Awaitable[None]]) -> None:
    """Do it again when it fails: a backend that is away for a moment must not leave anybody waiting for ever."""
    while True:
        try:
            await duty()
        except Exception:
            logger.exception("listening to other servers failed; trying again in %s s", _RETRY_SECONDS)
        await asyncio.sleep(_RETRY_SECONDS)
