"""Doing together what is asked for at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from typing import Generic, TypeVar

from lightning.store.persistence.abc import BackendError

KeyT = TypeVar("KeyT", bound=Hashable)
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[ItemT, ResultT]):
    """Collects what is submitted while earlier batches are under way, and has it done in one go.

    A caller that is alone waits for nobody; many at once share the round trips, and the wait for the journal. It
    belongs to one event loop.

    Args:
        perform: Does a batch; returns a result per item, in order. What it raises, unless it is a `BackendError`, is
            one item's fault, so each is done again by itself: until then nothing must have happened that must not
            happen twice.
        max_items: The size of a batch.
        max_batches: How many may be under way at once.
        idle: Is called when there is nothing to do any more.
    """

    def __init__(
        self,
        perform: Callable[[list[ItemT]], Awaitable[Sequence[ResultT]]],
        *,
        max_items: int,
        max_batches: int = 4,
        idle: Callable[[], object] | None = None,
    ) -> None:
        self._perform = perform
        self._max_items = max_items
        self._max_batches = max_batches
        self._idle = idle
        self._waiting: deque[tuple[ItemT, asyncio.Future[ResultT]]] = deque()
        self._workers = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def do(self, item: ItemT) -> ResultT:
        """Have `item` done. A caller that is cancelled may find it done, or not.

        Raises:
            Exception: What went wrong with this item, whatever became of others.
        """
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._workers < self._max_batches:
            self._workers += 1
            task = asyncio.create_task(self._work(), name="lightning-mongo-batch")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def close(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch: list[tuple[ItemT, asyncio.Future[ResultT]]] = []
                while self._waiting and len(batch) < self._max_items:
                    item, future = self._waiting.popleft()
                    if not future.done():  # its caller has not gone
                        batch.append((item, future))
                if batch:
                    await self._settle(batch)
        finally:
            self._workers -= 1
            if self._idle is not None and not self._workers:
                self._idle()

    async def _settle(self, batch: list[tuple[ItemT, asyncio.Future[ResultT]]]) -> None:
        try:
            results = await self._perform([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001  # it is the callers'
            if len(batch) > 1 and not isinstance(error, BackendError):
                for one in batch:  # the fault is in one of them: the others must not suffer for it
                    await self._settle([one])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        except BaseException:
            for _, future in batch:
                future.cancel()
            raise
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)


class KeyedBatcher(Generic[KeyT, ItemT, ResultT]):
    """A batcher for each of many things: batches for the same one never get in each other's way, for they are done one
    after the other.

    Args:
        perform: Does a batch for a key; see `Batcher`.
        max_items: The size of a batch.
    """

    def __init__(
        self, perform: Callable[[KeyT, list[ItemT]], Awaitable[Sequence[ResultT]]], *, max_items: int
    ) -> None:
        self._perform = perform
        self._max_items = max_items
        self._busy: dict[KeyT, Batcher[ItemT, ResultT]] = {}

    async def do(self, key: KeyT, item: ItemT) -> ResultT:
        """As `Batcher.do`."""
        batcher = self._busy.get(key)
        if batcher is None:
            batcher = self._busy[key] = Batcher(
                partial(self._perform, key),
                max_items=self._max_items,
                max_batches=1,
                idle=lambda: self._busy.pop(key),
            )
        return await batcher.do(item)

    async def close(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*(batcher.close() for batcher in self._busy.values()))
