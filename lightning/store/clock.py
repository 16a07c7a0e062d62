"""Time as a parameter: everything in the store that reads the clock or waits for a moment does it through a `Clock`.

Tests pass `lightning.testing.FakeClock` and move time by hand.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable


class Clock(ABC):
    """A source of time and of wake-ups."""

    @abstractmethod
    def now(self) -> float:
        """Seconds since the epoch."""

    @abstractmethod
    def call_at(self, when: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Have the running event loop call `callback` once `now()` is at least `when`; returns how to cancel that."""


class SystemClock(Clock):
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> Callable[[], None]:
        return asyncio.get_running_loop().call_later(max(0.0, when - time.time()), callback).cancel
