"""Standard health checking: whether calls make sense now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from grpc_health.v1 import health, health_pb2

from lightning.backoff import STORE_AWAY
from lightning.rpc.errors import StoreDrainingError, StreamAgedError
from lightning.store.persistence.abc import BackendError

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_FIRST_PROBE_SECONDS = 0.02
_LAST_PROBE_SECONDS = 1.0


class Health(health.aio.HealthServicer):
    """Answers health checks: SERVING, except while the store cannot write, and from the beginning of a drain on.

    Args:
        services: Whose health it is, beside that of the server as a whole.
        check: Raises if the store cannot write.
    """

    def __init__(self, services: Sequence[str], check: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._services = ("", *services)
        self._check = check
        self._watches: set[asyncio.Task[None]] = set()
        self._ended = False
        self._recovery: asyncio.Task[None] | None = None
        self.is_serving = False
        """What checks are answered."""

    async def begin(self) -> None:
        """From now on the server serves."""
        await self._tell(SERVING)

    def suspect(self, error: Exception) -> None:
        """A call failed in the store. If that says that the store cannot write, no calls are wanted until it can."""
        if not isinstance(error, (BackendError, *STORE_AWAY)) or isinstance(
            error, (StoreDrainingError, StreamAgedError)
        ):
            return
        if self._recovery is None and self.is_serving:
            logger.error("not serving: the store failed with %s: %s", type(error).__name__, error)
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def _recover(self) -> None:
        await self._tell(NOT_SERVING)
        pause = _FIRST_PROBE_SECONDS
        while True:
            try:
                await self._check()
                break
            except Exception:  # noqa: BLE001  # whatever it is, it was logged when it began
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PROBE_SECONDS)
        self._recovery = None
        logger.info("serving again")
        await self._tell(SERVING)

    async def drain(self) -> None:
        """From now on the server does not serve, whatever becomes of the store."""
        if self._recovery is not None:
            self._recovery.cancel()
        self.is_serving = False
        await self.enter_graceful_shutdown()

    async def _tell(self, status: Any) -> None:
        self.is_serving = status == SERVING
        for service in self._services:
            await self.set(service, status)

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
