"""A store with so many rollouts in it, in a process of its own, that measures its verbs when asked.

python -m benchmarks.grown memory|sqlite COUNT CALLS

Prints a JSON line when the rollouts are there (what they occupy), and one for each line that it reads: microseconds
per call, by verb. It goes on through its rollouts from one measurement to the next.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil

import lightning
from benchmarks.servers import scratch
from benchmarks.shared.store_bench import spans_of
from lightning.store.engine import StoreEngine

_BATCH = 1000
_PAGE = 10


class GrownStore:
    """Args:
    store: Empty.
    count: How many rollouts to put into its queue.
    calls: How many calls of a verb to time at once.
    """

    def __init__(self, store: StoreEngine, count: int, calls: int) -> None:
        self.store = store
        self.count = count
        self.calls = calls
        self.bytes_per_rollout = 0.0
        self._ids: list[str] = []

    async def fill(self) -> None:
        """Enqueue the rollouts, and see what they occupy."""
        await self.store.add_resources({"p": lightning.PromptTemplate(template="hi {x}")})
        gc.collect()
        before = psutil.Process().memory_info().rss
        for first in range(0, self.count, _BATCH):
            await self.store.enqueue_many_rollouts([_request(first + i) for i in range(_BATCH)])
        gc.collect()
        self.bytes_per_rollout = (psutil.Process().memory_info().rss - before) / self.count
        page = await self.store.query_rollouts(limit=min(self.count, _BATCH))
        self._ids = [rollout.rollout_id for rollout in page]

    async def measure(self) -> dict[str, float]:
        """Microseconds per call. As many rollouts are queued afterwards as before."""
        claimed: list[lightning.AttemptedRollout] = []

        async def claim(i: int) -> None:
            rollout = await self.store.dequeue_rollout(worker_id=f"w{i % 16}")
            assert rollout is not None
            claimed.append(rollout)

        async def update(i: int) -> None:
            key = (claimed[i].rollout_id, claimed[i].attempt.attempt_id)
            await self.store.update_attempt(*key, status="succeeded")

        async def look_up(i: int) -> None:
            assert await self.store.get_rollout_by_id(self._ids[i * 7919 % len(self._ids)]) is not None

        async def page(i: int) -> None:
            found = await self.store.query_rollouts(status_in=["queuing"], limit=_PAGE, offset=0)
            assert len(found) == _PAGE

        figures = {"claim": await self._time(claim)}
        spans = [
            spans_of(lightning, rollout.rollout_id, rollout.attempt.attempt_id, [1], 1024)[0]
            for rollout in claimed
        ]
        figures["add_span"] = await self._time(lambda i: self.store.add_span(spans[i]))
        figures["update"] = await self._time(update)
        figures["point look-up"] = await self._time(look_up)
        figures["page of 10 queued"] = await self._time(page)
        figures["enqueue"] = await self._time(lambda i: self.store.enqueue_rollout({"task": i}, mode="train"))
        return figures

    async def _time(self, call: Callable[[int], Awaitable[Any]]) -> float:
        started = time.perf_counter()
        for i in range(self.calls):
            await call(i)
        return (time.perf_counter() - started) / self.calls * 1e6


def _request(number: int) -> lightning.EnqueueRolloutRequest:
    return lightning.EnqueueRolloutRequest(input={"task": number}, mode="train")


@asynccontextmanager
async def _open(backend: str) -> AsyncIterator[StoreEngine]:
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        store: StoreEngine
        if backend == "memory":
            store = lightning.InMemoryLightningStore()
        else:
            store = lightning.SQLiteLightningStore(f"{folder}/bench.db", durability="normal")
        try:
            yield store
        finally:
            await store.close()


async def main(backend: str, count: int, calls: int) -> None:
    """See the module."""
    async with _open(backend) as store:
        grown = GrownStore(store, count, calls)
        await grown.fill()
        print(json.dumps({"bytes_per_rollout": grown.bytes_per_rollout}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(await grown.measure()), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
