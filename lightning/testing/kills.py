"""Clients that stream spans to a server which is killed again and again.

`scripts/prove_network.py` does it at length, a test shortly.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.rpc import LightningStoreClient
from lightning.testing.records import make_span
from lightning.types import AttemptedRollout

_SPANS_PER_CALL = 32
_CALLS_AT_ONCE = 4
_SPANS_BETWEEN_KILLS = 500
_PATIENT: dict[str, Any] = {"retry_delays": (0.05,) * 1000, "health_retry_delays": (0.05,)}


class ServerProcess:
    """`lightning store` in a process of its own.

    Args:
        backend: As the command takes it, such as `sqlite:PATH`.
    """

    def __init__(self, backend: str) -> None:
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._backend = backend
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Begin; does not wait until it answers."""
        command = ["-m", "lightning", "store", "--backend", self._backend, "--port", str(self.port)]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.DEVNULL
        )

    async def kill(self) -> None:
        """As `kill -9` does; also good at the end, for a server that has ended already."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def server_process(backend: str) -> AsyncIterator[ServerProcess]:
    """A server that has been started, and is killed at the end."""
    server = ServerProcess(backend)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


@dataclass
class Streamed:
    """What clients delivered while the server was killed, and what was found afterwards."""

    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    """Acknowledged, and not there."""
    doubled: int = 0
    disordered: int = 0
    """Rollouts whose spans are not in the order in which they were delivered."""

    def count(self, delivered: int, found: list[int]) -> None:
        """Compare how many spans were delivered to a rollout with the numbers that were found there."""
        self.acknowledged += delivered
        self.lost += len(set(range(delivered)) - set(found))
        self.doubled += len(found) - len(set(found))
        self.disordered += found != sorted(found)

    @property
    def sound(self) -> bool:
        """Whether everything is there once, in order."""
        return not (self.lost or self.doubled or self.disordered)


async def stream_through_kills(
    path: Path, *, kills: int, clients: int = 8, seed: int = 0, progress: Callable[[], None] = lambda: None
) -> Streamed:
    """Have clients deliver spans while their server, on a SQLite file, is killed and started again.

    Args:
        path: The file.
        kills: How often.
        clients: How many clients.
        seed: Of the moments when it is killed.
        progress: Called after each kill.
    """
    chance = random.Random(seed)
    streamed = Streamed()
    enough = asyncio.Event()
    acknowledged: list[int] = []
    news = asyncio.Condition()

    async def note(count: int) -> None:
        acknowledged.append(count)
        async with news:
            news.notify_all()

    async with server_process(f"sqlite:{path}") as server:
        stores = [LightningStoreClient(server.address, **_PATIENT) for _ in range(clients)]
        rollouts = [await store.start_rollout(number) for number, store in enumerate(stores)]
        tasks = [
            asyncio.ensure_future(_deliver(store, rollout, enough, note))
            for store, rollout in zip(stores, rollouts, strict=True)
        ]
        try:
            for _ in range(kills):
                wanted = sum(acknowledged) + _SPANS_BETWEEN_KILLS
                async with news:
                    await news.wait_for(lambda wanted=wanted: sum(acknowledged) >= wanted)  # type: ignore[misc]
                await asyncio.sleep(chance.uniform(0, 0.05))
                await server.kill()
                await server.start()
                streamed.kills += 1
                progress()
            enough.set()
            delivered = await asyncio.gather(*tasks)
            for store, rollout, count in zip(stores, rollouts, delivered, strict=True):
                spans = await store.query_spans(rollout.rollout_id)
                streamed.count(count, [int(span.name) for span in spans])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for store in stores:
                await store.close()
    return streamed


async def _deliver(
    store: LightningStoreClient,
    rollout: AttemptedRollout,
    enough: asyncio.Event,
    note: Callable[[int], Awaitable[None]],
) -> int:
    """Deliver spans, a few calls at once, and return how many; their names count up."""
    count = 0
    while not enough.is_set():
        calls = []
        for _ in range(_CALLS_AT_ONCE):
            names = range(count, count + _SPANS_PER_CALL)
            calls.append(store.deliver_spans([make_span(rollout, name=str(name)) for name in names]))
            count += _SPANS_PER_CALL
        await asyncio.gather(*calls)
        await note(_CALLS_AT_ONCE * _SPANS_PER_CALL)
    return count


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
