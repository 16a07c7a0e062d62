"""The contract suite on MongoDB, standalone and as a replica set."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from server import Mongod

from lightning.store.mongo import MongoLightningStore
from lightning.testing import (
    ClockedStoreContractSuite,
    FakeClock,
    LaxResourcesContract,
    RunnerContract,
    StoreContractSuite,
)


class TestMongo(ClockedStoreContractSuite, RunnerContract):
    @pytest.fixture
    async def store(
        self, mongod: Mongod, partition: str, clock: FakeClock
    ) -> AsyncIterator[MongoLightningStore]:
        store = MongoLightningStore(mongod.uri, partition_id=partition, clock=clock)
        yield store
        await store.close()


class TestMongoInRealTime(StoreContractSuite):
    @pytest.fixture
    async def store(self, mongod: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
        store = MongoLightningStore(mongod.uri, partition_id=partition)
        yield store
        await store.close()


class TestMongoWithLaxResources(LaxResourcesContract):
    @pytest.fixture
    async def store(self, mongod: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
        store = MongoLightningStore(mongod.uri, partition_id=partition, validate_resources=False)
        yield store
        await store.close()
