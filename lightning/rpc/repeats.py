"""Repeated requests: a client that lost a reply asks again under the same request id, and gets the first outcome.

The outcomes of the last minutes are kept in memory, whatever the store. Stores of ours know their requests by
themselves as well (`lightning.store.idempotency`), so that a repeat is recognised after a restart, too.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from lightning.rpc.errors import Failure

Outcome = bytes | Failure
"""The serialised response, or how the call failed."""
RequestKey = tuple[str, str]
"""The method and the request id."""

_ENTRY_OVERHEAD_BYTES = 512
"""What an outcome occupies beside its bytes."""


class _Running:
    __slots__ = ("abandoned", "task", "waiters")

    def __init__(self, task: asyncio.Task[Outcome]) -> None:
        self.task = task
        self.waiters = 0
        self.abandoned = False
        """Whether it was told to end; it may take a moment, or come to an outcome before."""


class RepeatTable:
    """Runs each request once. For one event loop.

    Args:
        max_bytes: How much memory the outcomes may take; the oldest are forgotten first, the newest never.
        keep_seconds: How long an outcome is remembered.
    """

    def __init__(self, *, max_bytes: int, keep_seconds: float) -> None:
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._running: dict[RequestKey, _Running] = {}
        self._outcomes: OrderedDict[RequestKey, tuple[float, int, Outcome]] = OrderedDict()
        self._size_bytes = 0

    async def run(
        self,
        key: RequestKey,
        work: Callable[[], Coroutine[Any, Any, Outcome]],
        *,
        abandonable: bool = False,
        instant: bool = False,
    ) -> Outcome:
        """The outcome of this request: the remembered one, that of the first call still at work, or a new one.

        Args:
            key: Names the request.
            work: Does what is asked for. It goes on when the caller is cancelled, so that the repeat finds an outcome.
            abandonable: It ends instead when nobody waits for it any more: for work that would otherwise wait.
            instant: Nobody can go away in its middle, so that it needs no task of its own, which costs more than many a
                call.
        """
        while (running := self._running.get(key)) is not None and running.abandoned:
            await asyncio.wait({running.task})
        known = self._outcomes.get(key)
        if known is not None:
            return known[2]
        if instant and running is None:
            outcome = await work()
            self._remember(key, outcome)
            return outcome
        if running is None:
            running = self._running[key] = _Running(asyncio.get_running_loop().create_task(work()))
            running.task.add_done_callback(lambda task: self._settle(key, task))
        running.waiters += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.waiters -= 1
            if abandonable and not running.waiters and not running.task.done():
                running.abandoned = True
                running.task.cancel()

    async def close(self) -> None:
        """Cancel what is still at work, and forget everything."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._outcomes.clear()
        self._size_bytes = 0

    def _settle(self, key: RequestKey, task: asyncio.Task[Outcome]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return  # nothing is known to have happened: a repeat starts anew
        self._remember(key, task.result())

    def _remember(self, key: RequestKey, outcome: Outcome) -> None:
        if isinstance(outcome, Failure) and outcome.leaves_open:
            return
        size = _ENTRY_OVERHEAD_BYTES + (len(outcome) if isinstance(outcome, bytes) else len(outcome.detail))
        self._outcomes[key] = (time.monotonic(), size, outcome)
        self._size_bytes += size
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        too_old = time.monotonic() - self._keep_seconds
        while len(self._outcomes) > 1:
            key, (settled_at, size, _) = next(iter(self._outcomes.items()))
            if settled_at > too_old and self._size_bytes <= self._max_bytes:
                return
            del self._outcomes[key]
            self._size_bytes -= size
