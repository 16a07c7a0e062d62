"""Real servers on free ports, in the process of the tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore
from lightning.testing.proxy import TcpProxy
from lightning.testing.unreliable import UnreliableStore

QUICK_RETRIES: dict[str, Any] = {"retry_delays": (0.01, 0.05, 0.2), "health_retry_delays": (0.01, 0.05)}

Serve = Callable[..., Awaitable[LightningStoreServer]]
Connect = Callable[..., LightningStoreClient]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers, and closes them and their stores after the test."""
    async with AsyncExitStack() as stack:

        async def start(store: Any = None, **options: Any) -> LightningStoreServer:
            server = LightningStoreServer(
                InMemoryLightningStore() if store is None else store, **{"port": 0, **options}
            )
            stack.push_async_callback(server.close)
            await server.start()
            return server

        yield start


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes clients, with short delays unless told otherwise, and closes them after the test."""
    async with AsyncExitStack() as stack:

        def make(address: str, **options: Any) -> LightningStoreClient:
            client = LightningStoreClient(address, **{**QUICK_RETRIES, **options})
            stack.push_async_callback(client.close)
            return client

        yield make


@pytest.fixture
def store() -> UnreliableStore:
    """The store behind `server`: an empty one in memory, which counts calls and can be away."""
    return UnreliableStore(InMemoryLightningStore())


@pytest.fixture
async def server(serve: Serve, store: UnreliableStore) -> LightningStoreServer:
    """A server of `store`."""
    return await serve(store)


@pytest.fixture
def client(server: LightningStoreServer, connect: Connect) -> LightningStoreClient:
    """A client of `server`."""
    return connect(server.endpoint)


@pytest.fixture
async def proxy(server: LightningStoreServer) -> AsyncIterator[TcpProxy]:
    """A proxy before `server`; to be started."""
    proxy = TcpProxy(server.port)
    yield proxy
    await proxy.close()
