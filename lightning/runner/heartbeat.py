"""A worker's heartbeat: says that it lives and what it executes, and brings back what it is told."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from lightning.backoff import STORE_AWAY, Backoff
from lightning.runner.snapshot import system_snapshot
from lightning.runner.threads import BlockingThread
from lightning.store.contract import LightningStore
from lightning.types import AttemptRef, CancelAttempt, HeartbeatReply, WorkerCommand, WorkerHeartbeat

logger = logging.getLogger(__name__)

STALE_MARGIN_SECONDS = 1.0
_HEARTBEATS_PER_LEASE = 3
_SHORTEST_PAUSE_SECONDS = 0.05
_SNAPSHOT_WAIT_SECONDS = 1.0
"""How long a heartbeat waits for its measurements: they can hang with a file system, it must not."""


class Heartbeat:
    """Sends a worker's heartbeats, at its interval, and more often while it holds an attempt that would be taken for
    dead in between.

    Measurements are taken in a thread of their own. Those older than interval + jitter + 1 s when they could be sent
    are stale: the heartbeat then goes without them, which leaves the former ones in place.

    Args:
        store: Who is told.
        worker_id: The worker.
        instance_id: The process.
        attempts: Tells which attempts are in execution.
        shortest_lease: The least `unresponsive_seconds` among them; None if they have none.
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
        shortest_lease: Callable[[], float | None],
        obey: Callable[[WorkerCommand], None],
        interval: float,
        jitter: float,
        include_gpu: bool = False,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._instance_id = instance_id
        self._attempts = attempts
        self._shortest_lease = shortest_lease
        self._obey = obey
        self._interval = interval
        self._jitter = jitter
        self._include_gpu = include_gpu
        self._silent_after = interval + jitter + STALE_MARGIN_SECONDS
        self._thread = BlockingThread("lightning-snapshot")
        self._measuring: asyncio.Future[tuple[float, dict[str, Any]]] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._first = asyncio.Event()
        self._lease_begun = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._measured_at = -math.inf

    async def run(self) -> None:
        """Send heartbeats until cancelled, the first at once. No error ends it."""
        self._loop = asyncio.get_running_loop()
        backoff = Backoff()
        while True:
            try:
                await self.beat(measure=time.monotonic() - self._measured_at > self._interval / 2)
            except STORE_AWAY as error:
                backoff.log_first(logger, "worker %s: no heartbeat: %s", self._worker_id, error)
                await asyncio.sleep(min(backoff.next_delay(), self._interval))
                continue
            except Exception:
                logger.exception("worker %s: a heartbeat failed", self._worker_id)
            else:
                if backoff.recovered():
                    logger.info("worker %s: heartbeats reach the store again", self._worker_id)
            await self._pause()

    def lease_begins(self) -> None:
        """An attempt was begun; to be called on any thread."""
        lease = self._shortest_lease()
        if lease is not None and lease < self._interval * _HEARTBEATS_PER_LEASE and self._loop is not None:
            self._loop.call_soon_threadsafe(self._lease_begun.set)

    async def _pause(self) -> None:
        """Until the next heartbeat is due."""
        due = time.monotonic() + max(0.0, self._interval + random.uniform(-self._jitter, self._jitter))
        while True:
            lease = self._shortest_lease()
            if lease is not None:
                pause = max(lease / _HEARTBEATS_PER_LEASE, _SHORTEST_PAUSE_SECONDS)
                due = min(due, time.monotonic() + pause)
            try:
                await asyncio.wait_for(self._lease_begun.wait(), max(0.0, due - time.monotonic()))
            except asyncio.TimeoutError:
                return
            self._lease_begun.clear()

    async def beat(self, *, measure: bool = True) -> None:
        """Send one heartbeat and obey its reply.

        Args:
            measure: Whether to send measurements along.

        Raises:
            ConnectionError: The store cannot be reached.
        """
        async with self._one_at_a_time:
            stats = await self._measure() if measure else None
            reply = await self._send(self._attempts(), stats)
        self._first.set()
        for command in reply.commands:
            self._obey(command)

    async def still_held(self, attempts: list[AttemptRef]) -> list[AttemptRef]:
        """Those of `attempts` that are this process's to execute. Raises as `beat`."""
        reply = await self._send(attempts, None)
        gone = {command.attempt_id for command in reply.commands if isinstance(command, CancelAttempt)}
        return [ref for ref in attempts if ref.attempt_id not in gone]

    async def _send(self, attempts: list[AttemptRef], stats: dict[str, Any] | None) -> HeartbeatReply:
        heartbeat = WorkerHeartbeat(
            worker_id=self._worker_id,
            instance_id=self._instance_id,
            attempts=attempts,
            heartbeat_stats=stats,
            silent_after_seconds=self._silent_after,
        )
        try:
            return await asyncio.wait_for(self._store.send_heartbeat(heartbeat), self._silent_after)
        except asyncio.TimeoutError:
            raise ConnectionError(f"the store did not answer within {self._silent_after} s") from None

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
        if time.monotonic() - taken_at > self._silent_after:
            return None
        self._measured_at = taken_at
        return stats

    def _take_snapshot(self) -> tuple[float, dict[str, Any]]:
        return time.monotonic(), system_snapshot(self._include_gpu)
