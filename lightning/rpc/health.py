"""Standard health checking, per service."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health


class Health(health.aio.HealthServicer):
    """Standard health checking, whose watches end with the server."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[None]] = set()
        self._ended = False

    async def Watch(self, request: Any, context: Any) -> None:
        watch = asyncio.ensure_future(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await watch
        except asyncio.CancelledError:
            if not self._ended:
                raise
        finally:
            self._watches.discard(watch)

    def end_watches(self) -> None:
        """End the calls that watch."""
        self._ended = True
        for watch in self._watches:
            watch.cancel()
