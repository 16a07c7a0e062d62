"""The processor time that calls take: in a client, in a bare client, and in the service without gRPC.

python -m benchmarks.budgeting client ADDRESS N     calls a store by the client
python -m benchmarks.budgeting bare ADDRESS N       calls `benchmarks.echo` with as many bytes
python -m benchmarks.budgeting service N            has the service answer requests in this process

For each line that it reads it makes N calls of the next kind in `CALLS`, and prints this process's microseconds per
call.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from typing import Any

import grpc.aio
from lightningpb.v1 import store_service_pb2 as pb

import lightning
from benchmarks.echo import rate
from benchmarks.shared.store_bench import spans_of
from benchmarks.store import message_sizes
from lightning import codec
from lightning.rpc.handlers import UNARY_HANDLERS
from lightning.rpc.options import ServerLimits
from lightning.rpc.requests import reader
from lightning.rpc.service import SERVICE, StoreService
from lightning.store.contract import LightningStore

CALLS = ("update_worker", "enqueue", "dequeue", "dequeue_empty", "add_span_1KB")
"""In this order: what is enqueued by one is claimed by the next."""
_CALLERS = 16
_SPAN_BYTES = 1024

Call = Callable[[int], Awaitable[Any]]


async def client_calls(client: lightning.LightningStoreClient, n: int) -> dict[str, Call]:
    """The calls as a user makes them."""
    await client.add_resources({"p": lightning.PromptTemplate(template="hi {x}")})
    spans = await _spans(client, n)
    return {
        "update_worker": lambda i: client.update_worker(f"w{i % 64}", {"cpu": i}),
        "enqueue": lambda i: client.enqueue_rollout({"task": i}, mode="train"),
        "dequeue": lambda i: client.dequeue_rollout(worker_id=f"w{i % 64}"),
        "dequeue_empty": lambda i: client.dequeue_rollout(worker_id=f"w{i % 64}"),
        "add_span_1KB": lambda i: client.add_span(spans[i]),
    }


async def service_calls(store: LightningStore, n: int) -> dict[str, Call]:
    """The same as requests to the service."""
    await store.add_resources({"p": lightning.PromptTemplate(template="hi {x}")})
    service = StoreService(store, "InMemoryLightningStore", ServerLimits())
    spans = await _spans(store, n)
    ids = (f"{number:032x}" for number in count())

    def claim(i: int) -> Any:
        return pb.DequeueRolloutsRequest(request_id=next(ids), limit=1, worker_id=f"w{i % 64}")

    def enqueue(i: int) -> Any:
        spec = codec.spec_to_proto(lightning.EnqueueRolloutRequest(input={"task": i}, mode="train"))
        return pb.EnqueueRolloutsRequest(request_id=next(ids), specs=[spec])

    def heartbeat(i: int) -> Any:
        return pb.UpdateWorkerRequest(
            request_id=next(ids), worker_id=f"w{i % 64}", heartbeat_stats_json=b'{"cpu":%d}' % i
        )

    def add_span(i: int) -> Any:
        return pb.AddSpansRequest(request_id=next(ids), spans=[codec.span_to_proto(spans[i])])

    def served(method: str, make: Callable[[int], Any]) -> Call:
        data = [make(i).SerializeToString() for i in range(n)]
        read = reader(SERVICE, method)

        async def call(i: int) -> None:
            answer = await UNARY_HANDLERS[method](service, read(data[i]))
            answer.SerializeToString()

        return call

    return {
        "update_worker": served("UpdateWorker", heartbeat),
        "enqueue": served("EnqueueRollouts", enqueue),
        "dequeue": served("DequeueRollouts", claim),
        "dequeue_empty": served("DequeueRollouts", claim),
        "add_span_1KB": served("AddSpans", add_span),
    }


async def bare_calls(channel: grpc.aio.Channel) -> dict[str, Call]:
    """As many bytes there and back, on `benchmarks.echo`."""

    def echo(asked: int, answered: int) -> Call:
        call: Any = channel.unary_unary(f"/bench.Echo/{answered}")
        request = bytes(asked)

        async def once(i: int) -> None:
            await call(request, timeout=30.0)

        return once

    sizes = await message_sizes()
    return {name: echo(*sizes[name]) for name in CALLS}


async def _spans(store: LightningStore, n: int) -> list[lightning.Span]:
    rollout = await store.start_rollout({})
    key = (rollout.rollout_id, rollout.attempt.attempt_id)
    spans: list[lightning.Span] = spans_of(lightning, *key, range(1, n + 1), _SPAN_BYTES)
    return spans


async def _open(stack: AsyncExitStack, what: str, address: str, n: int) -> dict[str, Call]:
    if what == "bare":
        return await bare_calls(await stack.enter_async_context(grpc.aio.insecure_channel(address)))
    if what == "client":
        client = lightning.LightningStoreClient(address)
        stack.push_async_callback(client.close)
        return await client_calls(client, n)
    store = lightning.InMemoryLightningStore()
    stack.push_async_callback(store.close)
    return await service_calls(store, n)


async def main(what: str, address: str, n: int) -> None:
    """See the module."""
    async with AsyncExitStack() as stack:
        calls = await _open(stack, what, address, n)
        print(json.dumps({"ready": 1}), flush=True)
        kinds: Iterator[str] = iter(CALLS)
        while await asyncio.to_thread(sys.stdin.readline):
            used = time.process_time()
            per_s = await rate(n, _CALLERS, calls[next(kinds)])
            used = time.process_time() - used
            print(json.dumps({"us": used / n * 1e6, "per_s": per_s}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 3 else "", int(sys.argv[-1])))
