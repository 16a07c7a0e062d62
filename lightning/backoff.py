"""Going on while the store is out of reach: what tells that it is, and how long to wait before asking again."""

from __future__ import annotations

import asyncio
import logging
import random

STORE_AWAY: tuple[type[Exception], ...] = (ConnectionError,)
"""Errors that say that the store cannot be reached now and may be later (`StoreUnavailableError` is one)."""

_FIRST_SECONDS = 0.1
_LAST_SECONDS = 2.0


class Backoff:
    """Delays that double from 0.1 to 2 s, shortened at random so that many clients do not come back at once."""

    def __init__(self) -> None:
        self._next = _FIRST_SECONDS
        self._lost = False

    def log_first(self, logger: logging.Logger, message: str, *arguments: object) -> None:
        """Warn, unless that was done already since the last `recovered`."""
        if not self._lost:
            self._lost = True
            logger.warning(message, *arguments)

    def recovered(self) -> bool:
        """Start over; returns whether there was anything to recover from."""
        lost, self._lost = self._lost, False
        self._next = _FIRST_SECONDS
        return lost

    def next_delay(self) -> float:
        """Seconds to wait before the next try."""
        delay = self._next * random.uniform(0.5, 1.0)
        self._next = min(self._next * 2, _LAST_SECONDS)
        return delay

    async def sleep(self) -> None:
        """Wait for `next_delay()`."""
        await asyncio.sleep(self.next_delay())
