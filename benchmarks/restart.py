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
from lightning import codec
from lightning.store.records import SpanRecord

_BATCH = 1000
_ONE_IN = 10
"""Of so many rollouts, one is claimed and has spans."""
_SPAN_BYTES = 256
_MOST_SECONDS = 1.0
_RETRY_SECONDS = 0.01
_RETRIES = 2000


async def measure(rollouts: int, spans: int, rounds: int, step: Callable[[str], None]) -> Section:
    """Fill a file with so much, and start a server on it again and again; each is killed after some writes."""
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        path = Path(folder) / "bench.db"
        await _fill(path, rollouts, spans, step)
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
        f"{spans:,} spans of {_SPAN_BYTES} bytes, of each tenth rollout ({size:,.0f} MB); median and slowest of "
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


async def _fill(path: Path, rollouts: int, spans: int, step: Callable[[str], None]) -> None:
    store = lightning.SQLiteLightningStore(path, durability="normal")
    message = codec.span_to_proto(spans_of(lightning, "ro", "at", [1], _SPAN_BYTES)[0])

    def span(rollout: lightning.AttemptedRollout, number: int) -> SpanRecord:
        attempt_id, span_id = rollout.attempt.attempt_id, f"{number:016x}"
        message.rollout_id, message.attempt_id, message.span_id = rollout.rollout_id, attempt_id, span_id
        return SpanRecord(attempt_id, span_id, number, message.SerializeToString())

    for first in range(0, rollouts, _BATCH):
        step(f"filling: {first:,} of {rollouts:,} rollouts")
        count = min(_BATCH, rollouts - first)
        requests = [lightning.EnqueueRolloutRequest(input={"task": first + i}) for i in range(count)]
        await store.enqueue_many_rollouts(requests)
        claimed = await store.dequeue_many_rollouts(limit=max(1, count // _ONE_IN))
        numbers = range(1, spans * _ONE_IN // rollouts + 1)
        records = [(rollout.rollout_id, span(rollout, number)) for rollout in claimed for number in numbers]
        await store.add_span_records(
            [rollout_id for rollout_id, _ in records], [record for _, record in records]
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
