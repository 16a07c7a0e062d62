"""Part `restart`: how soon a server answers on a large file, after it was killed."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning
from benchmarks.figures import Check, Row, Section
from benchmarks.servers import free_port, scratch, store_command
from benchmarks.shared.store_bench import spans_of

_BATCH = 500
_SPAN_BYTES = 256
_MOST_SECONDS = 1.0
_RETRY_SECONDS = 0.01
_RETRIES = 2000


async def measure(rollouts: int, spans_per_rollout: int, rounds: int, step: Callable[[str], None]) -> Section:
    """Fill a file, and start a server on it again and again; each is killed after some writes."""
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        path = Path(folder) / "bench.db"
        await _fill(path, rollouts, spans_per_rollout, step)
        size = path.stat().st_size / 1e6
        seconds = []
        for number in range(1, rounds + 1):
            step(f"restart {number} of {rounds}")
            seconds.append(await _restart(path))
    median = statistics.median(seconds)
    return Section(
        "restart",
        "Restart",
        f"From the start of `lightning store` to its first answer, on a file with {rollouts:,} rollouts and "
        f"{rollouts * spans_per_rollout:,} spans of {_SPAN_BYTES} bytes ({size:,.0f} MB); median and slowest of "
        f"{rounds}, each after the server before was killed (SIGKILL) with writes behind it.",
        [
            Row(
                "restart to first answer",
                "s",
                {"median": median, "slowest": max(seconds)},
                [Check("median", median, _MOST_SECONDS, at_most=True)],
            )
        ],
    )


async def _fill(path: Path, rollouts: int, spans_per_rollout: int, step: Callable[[str], None]) -> None:
    store = lightning.SQLiteLightningStore(path, durability="normal")
    for first in range(0, rollouts, _BATCH):
        step(f"filling: {first:,} of {rollouts:,} rollouts")
        count = min(_BATCH, rollouts - first)
        requests = [lightning.EnqueueRolloutRequest(input={"task": first + i}) for i in range(count)]
        await store.enqueue_many_rollouts(requests)
        claimed = await store.dequeue_many_rollouts(limit=count)
        keys = [(rollout.rollout_id, rollout.attempt.attempt_id) for rollout in claimed]
        numbers = range(1, spans_per_rollout + 1)
        await asyncio.gather(
            *(store.add_many_spans(spans_of(lightning, *key, numbers, _SPAN_BYTES)) for key in keys)
        )
    await store.close()


async def _restart(path: Path) -> float:
    port = free_port()
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *store_command(f"sqlite:{path}", port), stdout=asyncio.subprocess.DEVNULL
    )
    client = lightning.LightningStoreClient(f"127.0.0.1:{port}", retry_delays=(_RETRY_SECONDS,) * _RETRIES)
    try:
        await client.statistics()
        seconds = time.perf_counter() - began
        await client.enqueue_many_rollouts([lightning.EnqueueRolloutRequest(input=i) for i in range(_BATCH)])
    finally:
        await client.close()
        process.kill()
        await process.wait()
    return seconds
