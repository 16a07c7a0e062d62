"""Time that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable
from itertools import count

from lightning.store.clock import Clock


class FakeClock(Clock):
    """A clock for tests.

    Args:
        start: The time it shows at first, in seconds since the epoch.
    """

    def __init__(self, start: float = 1_000_000.0) -> None:
        self._now = start
        self._lock = threading.Lock()
        self._tie_breaker = count()
        self._alarms: list[tuple[float, int, asyncio.AbstractEventLoop, Callable[[], None]]] = []
        self._cancelled: set[int] = set()

    def now(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> Callable[[], None]:
        loop = asyncio.get_running_loop()
        number = next(self._tie_breaker)
        with self._lock:
            if when > self._now:
                heapq.heappush(self._alarms, (when, number, loop, callback))
                return lambda: self._cancelled.add(number)
        return loop.call_soon(callback).cancel

    def advance(self, seconds: float) -> None:
        """Move time forward and let the event loops know whose moments have come.

        Who waited for such a moment runs when its event loop gets to it, so await something before you look.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds}")
        with self._lock:
            self._now += seconds
            while self._alarms and self._alarms[0][0] <= self._now:
                _, number, loop, callback = heapq.heappop(self._alarms)
                if number in self._cancelled:
                    self._cancelled.discard(number)
                elif not loop.is_closed():
                    loop.call_soon_threadsafe(callback)
