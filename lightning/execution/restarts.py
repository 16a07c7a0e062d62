"""How often a process that died is started again before it is given up."""

from __future__ import annotations

import time
from collections import deque

RESTART_WINDOW_SECONDS = 60.0
"""A restart counts against the budget for so long."""
_RESTART_DELAYS_SECONDS = (0.0, 1.0, 3.0)
"""Pause before the first, the second, and each further restart within the window."""


class RestartBudget:
    """Of one process.

    Args:
        limit: How often it may be restarted within `RESTART_WINDOW_SECONDS`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._ends: deque[float] = deque()

    @property
    def used(self) -> int:
        """How often it has died within the window, as of the last time."""
        return len(self._ends)

    def spend(self) -> float | None:
        """It died: how many seconds to wait before it is restarted; None if it is not."""
        now = time.monotonic()
        self._ends.append(now)
        while now - self._ends[0] > RESTART_WINDOW_SECONDS:
            self._ends.popleft()
        if len(self._ends) > self.limit:
            return None
        return _RESTART_DELAYS_SECONDS[min(len(self._ends), len(_RESTART_DELAYS_SECONDS)) - 1]
