"""Time that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import count

from lightning.store.clock import Clock


class FakeClock(Clock):
    """A clock for tests. Safe to use from many threads and event loops.

    Args:
        start: The time it shows at first, in seconds since the epoch.
    """

    def __init__(self, start: float = 1_000_000.0) -> None:
        self._now = start
        self._lock = threading.Lock()
        self._numbers = count()
        self._alarms: dict[int, tuple[float, asyncio.AbstractEventLoop, Callable[[], None]]] = {}
        self._watchers: dict[int, tuple[float, asyncio.AbstractEventLoop, asyncio.Event]] = {}

    def now(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> Callable[[], None]:
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        with self._lock:
            if when > self._now:
                self._alarms[number] = (when, loop, callback)
                for latest, watching_loop, event in self._watchers.values():
                    if when <= latest:
                        watching_loop.call_soon_threadsafe(event.set)
                return lambda: self._cancel(number)
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
            due = [(when, number) for number, (when, _, _) in self._alarms.items() if when <= self._now]
            for _, number in sorted(due):
                _, loop, callback = self._alarms.pop(number)
                if not loop.is_closed():
                    loop.call_soon_threadsafe(callback)

    async def until_awaited(self, seconds: float) -> None:
        """Wait until somebody waits for a moment at most `seconds` ahead.

        A test that starts a call with a time limit and then moves time calls this in between: before the call has set
        its alarm, moving time would only move its limit. How long this itself may take is the caller's to limit.
        """
        event = asyncio.Event()
        number = next(self._numbers)
        with self._lock:
            latest = self._now + seconds
            if any(when <= latest for when, _, _ in self._alarms.values()):
                return
            self._watchers[number] = (latest, asyncio.get_running_loop(), event)
        try:
            await event.wait()
        finally:
            with self._lock:
                del self._watchers[number]

    def _cancel(self, number: int) -> None:
        with self._lock:
            self._alarms.pop(number, None)
