"""The algorithm of the soak: finds out how much runners get done, then asks for half of it, for long.

python -m benchmarks.soaking ADDRESS SECONDS INTERVAL_SECONDS CALIBRATION_SECONDS

Prints JSON lines: first how many rollouts per second there can be, then how the last interval went.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import psutil

import lightning
from benchmarks.growing import rate_for
from benchmarks.soak_agent import SPANS

BATCH = 8
_BATCHES_AT_ONCE = 16
_MOST_BEHIND = 200
"""Batches under way from which on no more are begun: the machine is busy with other things."""
_PATIENCE_SECONDS = 120.0
_LOOK_EVERY = 4
"""Of each so many batches, one rollout's spans are read."""


class Algorithm:
    """Hands out work and looks at what becomes of it."""

    def __init__(self, client: lightning.LightningStoreClient) -> None:
        self._client = client
        self._batches = 0
        self._seconds: list[float] = []
        self._wrong = 0

    async def run_batch(self) -> None:
        """Rollouts, from their enqueue until all are known to be done."""
        self._batches += 1
        look = self._batches % _LOOK_EVERY == 0
        began = time.perf_counter()
        requests = [lightning.EnqueueRolloutRequest(input={"task": self._batches})] * BATCH
        ids = [rollout.rollout_id for rollout in await self._client.enqueue_many_rollouts(requests)]
        ended = await self._client.wait_for_rollouts(rollout_ids=ids, timeout=_PATIENCE_SECONDS)
        self._seconds.append(time.perf_counter() - began)
        wrong = BATCH - sum(rollout.status == "succeeded" for rollout in ended)
        if look:
            spans = await self._client.query_spans(ids[0])
            turns = [span.name for span in spans if span.name.startswith("turn-")]
            wrong += len(set(turns)) != SPANS or lightning.find_final_reward(spans) != 1.0
        self._wrong += wrong

    def report(self, seconds: float) -> dict[str, float]:
        """How it went since the last report."""
        took, self._seconds = sorted(self._seconds), []
        wrong, self._wrong = self._wrong, 0
        return {
            "rollouts_per_s": len(took) * BATCH / seconds,
            "p50_ms": took[len(took) // 2] * 1000 if took else 0.0,
            "p99_ms": took[int(len(took) * 0.99)] * 1000 if took else 0.0,
            "wrong": wrong,
            "rss_bytes": psutil.Process().memory_info().rss,
        }


async def main(address: str, seconds: float, interval: float, calibration: float) -> None:
    """See the module."""
    client = lightning.LightningStoreClient(address)
    algorithm = Algorithm(client)
    await algorithm.run_batch()  # runners are there
    most = await rate_for(calibration, [algorithm.run_batch] * _BATCHES_AT_ONCE) * BATCH
    algorithm.report(calibration)
    print(json.dumps({"most": most}), flush=True)
    pause = BATCH / (most / 2)
    under_way: set[asyncio.Task[None]] = set()
    began = reported = due = time.perf_counter()
    while time.perf_counter() - began < seconds:
        if len(under_way) < _MOST_BEHIND:
            under_way.add(asyncio.create_task(algorithm.run_batch()))
        due += pause
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        for task in [task for task in under_way if task.done()]:
            under_way.discard(task)
            task.result()  # raises what it failed with
        now = time.perf_counter()
        if now - reported >= interval:
            print(json.dumps(algorithm.report(now - reported)), flush=True)
            reported = now
    await asyncio.gather(*under_way)
    print(json.dumps({**algorithm.report(1.0), "ended": 1}), flush=True)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(float, sys.argv[2:])))
