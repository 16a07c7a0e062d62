"""Server processes that share a port, kept running within a budget."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence

from lightning.execution.base import ExecutionError
from lightning.execution.child import Entry
from lightning.execution.entries import Serving
from lightning.execution.job import first_of
from lightning.execution.processes import ChildProcess, Payload
from lightning.execution.restarts import RESTART_WINDOW_SECONDS, RestartBudget

logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often each process is restarted within `RESTART_WINDOW_SECONDS`."""


class ServerFleet:
    """One process per entry. To be used on one event loop, in a thread that outlives it.

    Args:
        entries: What the processes do; each reports a `Serving` once it serves.
        end_seconds: How long they may take to end when they are told to, before they are killed.
    """

    def __init__(self, entries: Sequence[Entry], end_seconds: float) -> None:
        self._payloads = [Payload(entry, "the store's settings") for entry in entries]
        self._end_seconds = end_seconds
        self._children: dict[int, ChildProcess] = {}
        self._stopping = asyncio.Event()
        self._keepers: set[asyncio.Task[None]] = set()

    async def start(self) -> list[Serving]:
        """Return when all serve. The first goes ahead: what is wrong with their settings, or with the store, is wrong
        for all of them.

        Raises:
            Exception: What one of them raised.
            ExecutionError: One of them died without a word.
        """
        first = await self._started(0)
        others = await asyncio.gather(*map(self._started, range(1, len(self._payloads))))
        self._keepers = {asyncio.create_task(self._keep(index)) for index in self._children}
        return [first, *others]

    async def run(self) -> None:
        """Keep them running, until cancelled.

        Raises:
            ExecutionError: One of them dies again and again.
        """
        done, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_EXCEPTION)
        for keeper in done:
            keeper.result()

    async def stop(self) -> None:
        """Have them drain, and return when they are gone.

        Raises:
            ExecutionError: One of them did not end in order.
        """
        self._stopping.set()
        children = [child for child in self._children.values() if not child.exited.done()]
        for child in children:
            child.signal(signal.SIGTERM)
        exits = [child.exited for child in children]
        if exits:
            await asyncio.wait(exits, timeout=self._end_seconds)
        for child in children:
            if not child.exited.done():
                child.killed = True
                child.signal(signal.SIGKILL)
        await asyncio.gather(*exits, *self._keepers, return_exceptions=True)
        for child in children:
            if child.killed:
                raise ExecutionError(
                    f"{child.name} did not end within {self._end_seconds:g} s, and was killed"
                )
            if child.loaded.done() and child.exited.result() != 0:
                raise ExecutionError(child.describe_end())

    def _launch(self, index: int) -> ChildProcess:
        child = self._children[index] = ChildProcess(f"store-server-{index}", self._payloads[index])
        return child

    async def _started(self, index: int) -> Serving:
        child = self._launch(index)
        await first_of(child.reported, child.exited)
        if not child.reported.done():
            raise child.error()
        serving: Serving = child.reported.result()
        return serving

    async def _keep(self, index: int) -> None:
        budget = RestartBudget(RESTARTS)
        child = self._children[index]
        while True:
            await asyncio.wait({child.exited})
            delay = None if self._stopping.is_set() else budget.spend()
            if self._stopping.is_set():
                return
            if delay is None:
                raise ExecutionError(
                    f"{child.describe_end()}, and had been restarted {RESTARTS} times within "
                    f"{RESTART_WINDOW_SECONDS:.0f} s"
                )
            logger.warning("%s; it is restarted (%d of %d)", child.describe_end(), budget.used, budget.limit)
            await first_of(asyncio.ensure_future(self._stopping.wait()), timeout=delay)
            if self._stopping.is_set():
                return
            child = self._launch(index)
