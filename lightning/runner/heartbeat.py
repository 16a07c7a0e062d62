"""A worker's heartbeat: says that it lives and what it executes, and brings back what it is told."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from lightning.backoff import STORE_AWAY, Backoff
from lightning.runner.snapshot import system_snapshot
from lightning.runner.threads import BlockingThread
from lightning.store.contract import LightningStore
from lightning.types import AttemptRef, WorkerCommand, WorkerHeartbeat

logger = logging.getLogger(__name__)

STALE_MARGIN_SECONDS = 1.0
_SNAPSHOT_WAIT_SECONDS = 1.0
"""How long a heartbeat waits for its measurements: they can hang with a file system, it must not."""


class Heartbeat:
    """Sends a worker's heartbeats.

    Measurements are taken in a thread of their own. Those older than interval + jitter + 1 s when they could be sent
    are stale: the heartbeat then goes without them, which leaves the former ones in place.

    Args:
        store: Who is told.
        worker_id: The worker.
        instance_id: The process.
        attempts: Tells which attempts are in execution.
        obey: Is given each command that a reply brings.
        interval: Seconds between two heartbeats.
        jitter: Seconds by which each interval is longer or shorter at random, at most.
        include_gpu: Whether to measure GPUs.
    """

    def __init__(
        self,
        store: LightningStore,
        *,
        worker_id: str,
        instance_id: str,
        attempts: Callable[[], list[AttemptRef]],
        obey: Callable[[WorkerCommand], None],
        interval: float,
        jitter: float,
        include_gpu: bool = False,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._instance_id = instance_id
        self._attempts = attempts
        self._obey = obey
        self._interval = interval
        self._jitter = jitter
        self._include_gpu = include_gpu
        self._silent_after = interval + jitter + STALE_MARGIN_SECONDS
        self._thread = BlockingThread("lightning-snapshot")
        self._measuring: asyncio.Future[tuple[float, dict[str, Any]]] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._first = asyncio.Event()

    async def run(self) -> None:
        """Send heartbeats until cancelled, the first at once. No error ends it."""
        backoff = Backoff()
        while True:
            try:
                await self.beat()
            except STORE_AWAY as error:
                backoff.log_first(logger, "worker %s: no heartbeat: %s", self._worker_id, error)
                await asyncio.sleep(min(backoff.next_delay(), self._interval))
                continue
            except Exception:
                logger.exception("worker %s: a heartbeat failed", self._worker_id)
            else:
                if backoff.recovered():
                    logger.info("worker %s: heartbeats reach the store again", self._worker_id)
            await asyncio.sleep(max(0.0, self._interval + random.uniform(-self._jitter, self._jitter)))

    async def beat(self) -> None:
        """Send one heartbeat and obey its reply.

        Raises:
            ConnectionError: The store cannot be reached.
        """
        async with self._one_at_a_time:
            stats = await self._measure()
            heartbeat = WorkerHeartbeat(
                worker_id=self._worker_id,
                instance_id=self._instance_id,
                attempts=self._attempts(),
                heartbeat_stats=stats,
                silent_after_seconds=self._silent_after,
            )
            try:
                reply = await asyncio.wait_for(self._store.send_heartbeat(heartbeat), self._silent_after)
            except asyncio.TimeoutError:
                raise ConnectionError(f"the store did not answer within {self._silent_after} s") from None
        self._first.set()
        for command in reply.commands:
            self._obey(command)

    async def wait_first(self) -> None:
        """Return once a heartbeat has reached the store."""
        await self._first.wait()

    def close(self) -> None:
        """End the thread; call it when nothing is to be sent any more."""
        self._thread.stop()

    async def _measure(self) -> dict[str, Any] | None:
        if self._measuring is None:
            self._measuring = self._thread.call(self._take_snapshot, copy_context())
        await asyncio.wait({self._measuring}, timeout=_SNAPSHOT_WAIT_SECONDS)
        if not self._measuring.done():
            return None
        measured, self._measuring = self._measuring, None
        try:
            taken_at, stats = measured.result()
        except Exception:
            logger.exception("worker %s: cannot measure this machine", self._worker_id)
            return None
        return stats if time.monotonic() - taken_at <= self._silent_after else None

    def _take_snapshot(self) -> tuple[float, dict[str, Any]]:
        return time.monotonic(), system_snapshot(self._include_gpu)
