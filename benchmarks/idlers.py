"""Many workers, each with a connection of its own, that wait for work as a runner's do.

python -m benchmarks.idlers ADDRESS COUNT HEARTBEAT_SECONDS

Prints a line when all are there; ends when its input does, and prints how many heartbeats it sent and how long they
took, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from typing import Any

import lightning
from lightning.runner import system_snapshot
from lightning.runner.agent import COMMAND_WAIT_SECONDS
from lightning.runner.claiming import CLAIM_WAIT_SECONDS
from lightning.types import WorkerHeartbeat


class IdleWorker:
    """One of them.

    Args:
        address: The server.
        number: Which one.
        beats: Where it notes how long each of its heartbeats took, in seconds.
    """

    def __init__(self, address: str, number: int, beats: list[float]) -> None:
        self._client = lightning.LightningStoreClient(address)
        self._who: dict[str, Any] = {"worker_id": f"idle-{number}", "instance_id": uuid.uuid4().hex}
        self._beats = beats
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, interval: float, phase: float, stats: dict[str, Any]) -> None:
        """Connect; returns after the first heartbeat. The next one is due `phase` seconds later."""
        await self._beat(stats, interval)
        loops = (self._claim(), self._listen(), self._go_on_beating(interval, phase, stats))
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        """Disconnect. Raises what one of its loops failed with."""
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        await self._client.close()

    async def _beat(self, stats: dict[str, Any], interval: float) -> None:
        began = time.perf_counter()
        await self._client.send_heartbeat(
            WorkerHeartbeat(**self._who, heartbeat_stats=stats, silent_after_seconds=2 * interval)
        )
        self._beats.append(time.perf_counter() - began)

    async def _go_on_beating(self, interval: float, phase: float, stats: dict[str, Any]) -> None:
        await asyncio.sleep(phase)
        while True:
            await self._beat(stats, interval)
            await asyncio.sleep(interval)

    async def _claim(self) -> None:
        while True:
            await self._client.claim_rollouts(timeout=CLAIM_WAIT_SECONDS, **self._who)

    async def _listen(self) -> None:
        while True:
            await self._client.receive_commands(timeout=COMMAND_WAIT_SECONDS, **self._who)


async def main(address: str, count: int, interval: float) -> None:
    """See the module."""
    beats: list[float] = []
    workers = [IdleWorker(address, number, beats) for number in range(count)]
    stats = system_snapshot()
    for number, worker in enumerate(workers):
        await worker.start(interval, interval * number / count, stats)
    first_beats = len(beats)
    print(json.dumps({"connected": count}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    later = sorted(beats[first_beats:])
    for worker in workers:
        await worker.stop()
    print(
        json.dumps(
            {"heartbeats": len(later), "p99_ms": later[int(len(later) * 0.99)] * 1000 if later else 0.0}
        )
    )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
