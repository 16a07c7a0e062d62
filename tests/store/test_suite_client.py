"""The contract suite through gRPC over threaded and foreign stores; over the memory store: see `tests/rpc`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from plain_store import PlainStore
from stranger import Stranger

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore, LightningStoreThreaded
from lightning.testing import ClockedStoreContractSuite, FakeClock, ResumedWatchContract, RunnerContract


@asynccontextmanager
async def client_of(store: Any) -> AsyncIterator[LightningStoreClient]:
    """A client of a server of `store`."""
    server = LightningStoreServer(store, port=0)
    await server.start()
    client = LightningStoreClient(server.endpoint)
    try:
        yield client
    finally:
        await client.close()
        await server.close()


class TestClientOfThreaded(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[LightningStoreClient]:
        async with client_of(LightningStoreThreaded(InMemoryLightningStore(clock=clock))) as client:
            yield client


class TestClientOfForeign(ClockedStoreContractSuite):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[LightningStoreClient]:
        async with client_of(Stranger(PlainStore(clock))) as client:
            yield client
