"""One client process that asks more and more of a server.

python -m benchmarks.growing CURVE ADDRESS POINTS SECONDS     CURVE is a name in `CURVES`, POINTS is JSON: sizes, rising

Prints one line of JSON per point, in order: figures by series. A measurement takes about so many seconds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc.aio

import lightning
from benchmarks.shared.store_bench import spans_of

_CALLERS = 8
_SPAN_BYTES = 1024
_BYTES_PER_CALL = 64 * 1024
_PROBES = 20
_ROLLOUTS_PER_SECOND = 1000
_WAIT_SECONDS = 30.0

Figures = dict[str, float]
Call = Callable[[], Awaitable[Any]]


async def rate_for(seconds: float, callers: Sequence[Call]) -> float:
    """How many calls a second these callers make together, each one call after another, for so long."""
    began = time.perf_counter()
    count = 0

    async def repeat(call: Call) -> None:
        nonlocal count
        while time.perf_counter() - began < seconds:
            await call()
            count += 1

    await asyncio.gather(*map(repeat, callers))
    return count / (time.perf_counter() - began)


class SpanSource:
    """Spans that nobody has stored yet.

    Args:
        client: Gives them an attempt.
        size: How many bytes of text each has.
    """

    def __init__(self, client: lightning.LightningStoreClient, size: int) -> None:
        self._client = client
        self._size = size
        self._next = 1

    async def open(self) -> None:
        """To be called once, first."""
        rollout = await self._client.start_rollout({})
        self._key = (rollout.rollout_id, rollout.attempt.attempt_id)
        self._template = spans_of(lightning, *self._key, [0], self._size)[0]

    def take(self, count: int) -> list[lightning.Span]:
        """The next ones. Alike but for their ids, so that making them takes next to no time."""
        first, self._next = self._next, self._next + count
        return [
            self._template.model_copy(update={"span_id": f"{number:016x}", "sequence_id": number})
            for number in range(first, first + count)
        ]


# --- The curves ------------------------------------------------------------------------------------------------


async def over_clients(address: str, points: list[int], seconds: float) -> AsyncIterator[Figures]:
    """So many clients, a connection and a caller each."""
    clients: list[lightning.LightningStoreClient] = []
    source = SpanSource(_open(clients, address), _SPAN_BYTES)
    await source.open()
    for point in points:
        while len(clients) < point:
            _open(clients, address)
        ready = clients[:point]
        await asyncio.gather(*(client.update_worker("w") for client in ready))  # connects
        yield {
            "heartbeat": await rate_for(seconds, [_heartbeat(client, n) for n, client in enumerate(ready)]),
            "enqueue": await rate_for(seconds, [_enqueue(client) for client in ready]),
            "add_span, 1 KB": await rate_for(seconds, [_add_spans(client, source, 1) for client in ready]),
        }
    await _close(clients)


async def bare_over_clients(address: str, points: list[int], seconds: float) -> AsyncIterator[Figures]:
    """The same on `benchmarks.echo`."""
    channels: list[grpc.aio.Channel] = []
    for point in points:
        while len(channels) < point:
            channels.append(
                grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
            )
        calls = [_echo(channel) for channel in channels[:point]]
        await asyncio.gather(*(call() for call in calls))
        yield {"bare echo": await rate_for(seconds, calls)}
    for channel in channels:
        await channel.close()


async def over_batch(address: str, points: list[int], seconds: float) -> AsyncIterator[Figures]:
    """So many spans, or rollouts, in a call."""
    clients: list[lightning.LightningStoreClient] = []
    client = _open(clients, address)
    source = SpanSource(client, _SPAN_BYTES)
    await source.open()
    for point in points:
        requests = [lightning.EnqueueRolloutRequest(input={"task": 1}, mode="train")] * point
        spans = await rate_for(seconds, [_add_spans(client, source, point)] * _CALLERS)
        enqueued = await rate_for(seconds, [lambda: client.enqueue_many_rollouts(requests)] * _CALLERS)  # noqa: B023
        yield {"spans/s": spans * point, "rollouts/s": enqueued * point}
    await _close(clients)


async def over_span_size(address: str, points: list[int], seconds: float) -> AsyncIterator[Figures]:
    """Spans of so many bytes, on a stream."""
    clients: list[lightning.LightningStoreClient] = []
    client = _open(clients, address)
    for point in points:
        source = SpanSource(client, point)
        await source.open()
        count = max(1, _BYTES_PER_CALL // point)

        async def deliver(source: SpanSource = source, count: int = count) -> None:
            await client.deliver_spans(source.take(count))

        spans = await rate_for(seconds, [deliver] * _CALLERS) * count
        yield {"spans/s": spans, "MB/s": spans * point / 1e6}
    await _close(clients)


async def over_workers(address: str, points: list[int], seconds: float) -> AsyncIterator[Figures]:
    """So many workers, a connection each, that claim, send a span and finish; and how soon one of them has what is
    enqueued while all are idle."""
    clients: list[lightning.LightningStoreClient] = []
    algorithm = _open(clients, address)
    fleet = _Fleet(address)
    for point in points:
        await fleet.grow(point)
        latencies = [await fleet.probe(algorithm) for _ in range(_PROBES)]
        count = max(point, int(seconds * _ROLLOUTS_PER_SECOND))
        yield {
            "rollouts/s": await fleet.drain(algorithm, count),
            "dispatch, ms": statistics.median(latencies) * 1000,
        }
    await fleet.close()
    await _close(clients)


CURVES = {
    "clients": over_clients,
    "bare": bare_over_clients,
    "batch": over_batch,
    "span-size": over_span_size,
    "workers": over_workers,
}


class _Fleet:
    """Workers that do what they find."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._clients: list[lightning.LightningStoreClient] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._claims: asyncio.Queue[float | BaseException] = asyncio.Queue()
        """When each rollout was claimed that is finished now; or what a worker failed with."""

    async def grow(self, count: int) -> None:
        """Until there are so many, all connected."""
        fresh = [_open(self._clients, self._address) for _ in range(count - len(self._clients))]
        for client in fresh:
            await client.update_worker("w")
        for client in fresh:
            task = asyncio.create_task(self._work(client, f"w{len(self._tasks)}"))
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    async def probe(self, algorithm: lightning.LightningStoreClient) -> float:
        """Seconds from an enqueue to the claim."""
        began = time.perf_counter()
        await algorithm.enqueue_rollout({"task": "probe"})
        return await self._next() - began

    async def drain(self, algorithm: lightning.LightningStoreClient, count: int) -> float:
        """Rollouts per second, of so many that are enqueued at once."""
        began = time.perf_counter()
        await algorithm.enqueue_many_rollouts([lightning.EnqueueRolloutRequest(input={"task": 1})] * count)
        for _ in range(count):
            await self._next()
        return count / (time.perf_counter() - began)

    async def close(self) -> None:
        """Disconnect."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await _close(self._clients)

    async def _next(self) -> float:
        claimed_at = await self._claims.get()
        if isinstance(claimed_at, BaseException):
            raise claimed_at
        return claimed_at

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._claims.put_nowait(task.exception() or RuntimeError("a worker ended"))

    async def _work(self, client: lightning.LightningStoreClient, worker_id: str) -> None:
        while True:
            for rollout in await client.claim_rollouts(worker_id=worker_id, timeout=_WAIT_SECONDS):
                claimed_at = time.perf_counter()
                key = (rollout.rollout_id, rollout.attempt.attempt_id)
                await client.deliver_spans(spans_of(lightning, *key, [1], _SPAN_BYTES))
                await client.update_attempt(*key, status="succeeded")
                self._claims.put_nowait(claimed_at)


def _open(clients: list[lightning.LightningStoreClient], address: str) -> lightning.LightningStoreClient:
    clients.append(lightning.LightningStoreClient(address))
    return clients[-1]


async def _close(clients: Sequence[lightning.LightningStoreClient]) -> None:
    for client in clients:
        await client.close()


def _heartbeat(client: lightning.LightningStoreClient, number: int) -> Call:
    return lambda: client.update_worker(f"w{number}", {"cpu": number})


def _enqueue(client: lightning.LightningStoreClient) -> Call:
    return lambda: client.enqueue_rollout({"task": 1}, mode="train")


def _add_spans(client: lightning.LightningStoreClient, source: SpanSource, count: int) -> Call:
    return lambda: client.add_many_spans(source.take(count))


def _echo(channel: grpc.aio.Channel) -> Call:
    call: Any = channel.unary_unary("/bench.Echo/100")
    request = bytes(100)

    async def once() -> None:
        await call(request, timeout=_WAIT_SECONDS)

    return once


async def main(curve: str, address: str, points: list[int], seconds: float) -> None:
    """See the module."""
    async for figures in CURVES[curve](address, points, seconds):
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])))
