"""The contract suite on SQLite: in a file, in memory, and in a file behind a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import SQLiteLightningStore
from lightning.testing import (
    ClockedStoreContractSuite,
    FakeClock,
    LaxResourcesContract,
    ResumedWatchContract,
    RunnerContract,
    StoreContractSuite,
)


class TestSQLiteFile(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    @pytest.fixture
    async def store(self, tmp_path: Path, clock: FakeClock) -> AsyncIterator[SQLiteLightningStore]:
        store = SQLiteLightningStore(tmp_path / "store.db", clock=clock)
        yield store
        await store.close()


class TestSQLiteInMemory(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[SQLiteLightningStore]:
        store = SQLiteLightningStore(":memory:", clock=clock)
        yield store
        await store.close()


class TestSQLiteThroughClient(StoreContractSuite, ResumedWatchContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[LightningStoreClient]:
        server = LightningStoreServer(SQLiteLightningStore(tmp_path / "store.db"), port=0)
        await server.start()
        client = LightningStoreClient(server.endpoint)
        yield client
        await client.close()
        await server.close()


class TestSQLiteInMemoryThroughClient(StoreContractSuite):
    @pytest.fixture
    async def store(self) -> AsyncIterator[LightningStoreClient]:
        server = LightningStoreServer(SQLiteLightningStore(":memory:"), port=0)
        await server.start()
        client = LightningStoreClient(server.endpoint)
        yield client
        await client.close()
        await server.close()


class TestSQLiteWithLaxResources(LaxResourcesContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[SQLiteLightningStore]:
        store = SQLiteLightningStore(":memory:", validate_resources=False)
        yield store
        await store.close()
