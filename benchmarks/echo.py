"""The limit of the transport: a gRPC server that answers so many bytes with so many, and a client that counts.

python -m benchmarks.echo PORT                       serves
python -m benchmarks.echo ADDRESS SIZES N CALLERS    calls: SIZES is JSON, name → [request bytes, answer bytes]
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

Context = Any


class _Handlers(grpc.GenericRpcHandler):
    """The method's name is the size of its answer."""

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        if details.method not in self._handlers:
            answer = bytes(int(details.method.rsplit("/", 1)[1]))

            async def handle(request: bytes, context: Context) -> bytes:
                return answer

            self._handlers[details.method] = grpc.unary_unary_rpc_method_handler(handle)
        return self._handlers[details.method]


async def serve(port: int) -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", -1),))
    server.add_generic_rpc_handlers((_Handlers(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def rates(address: str, sizes: dict[str, tuple[int, int]], n: int, callers: int) -> dict[str, float]:
    """Calls per second for each name, one after another."""
    rates: dict[str, float] = {}
    async with grpc.aio.insecure_channel(address) as channel:
        for name, (asked, answered) in sizes.items():
            call: Any = channel.unary_unary(f"/bench.Echo/{answered}")
            request = bytes(asked)
            rates[name] = await rate(n, callers, lambda i: call(request, timeout=30.0))  # noqa: B023  # awaited here
    return rates


async def rate(n: int, callers: int, call: Callable[[int], Awaitable[Any]]) -> float:
    """How many calls a second so many callers make, each one call after another."""
    numbers = iter(range(n))

    async def caller() -> None:
        for number in numbers:
            await call(number)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return n / (time.perf_counter() - started)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        asyncio.run(serve(int(sys.argv[1])))
    else:
        address, sizes, n, callers = sys.argv[1:]
        print(json.dumps(asyncio.run(rates(address, json.loads(sizes), int(n), int(callers)))))
