"""The contract suite on MongoDB: all of it on a replica set; on a standalone server, and through the client (by TLS,
with a token), what depends on being told of changes, on time and on the wire. `full_suite.py` has it all everywhere."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from server import Mongod

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store.mongo import MongoLightningStore
from lightning.testing import (
    ClockedStoreContractSuite,
    FakeClock,
    LaxResourcesContract,
    ResumedWatchContract,
    RunnerContract,
)
from lightning.testing.contract import (
    QueueContract,
    RealTimeContract,
    ResourcesContract,
    SequenceIdContract,
    SpanContract,
    WaitingContract,
    WatchContract,
)

PATIENCE_SECONDS = 60.0
"""A busy machine makes it long until a majority has committed."""


class TestReplicaSet(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    deadline_seconds = PATIENCE_SECONDS

    @pytest.fixture
    async def store(
        self, replica_set: Mongod, partition: str, clock: FakeClock
    ) -> AsyncIterator[MongoLightningStore]:
        store = MongoLightningStore(replica_set.uri, partition_id=partition, clock=clock)
        yield store
        await store.close()


class TestStandalone(
    QueueContract,
    SpanContract,
    ResourcesContract,
    WaitingContract,
    WatchContract,
    ResumedWatchContract,
    RealTimeContract,
):
    @pytest.fixture
    async def store(self, standalone: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
        store = MongoLightningStore(standalone.uri, partition_id=partition)
        yield store
        await store.close()


class TestThroughClient(
    QueueContract, SequenceIdContract, WaitingContract, WatchContract, ResumedWatchContract, RealTimeContract
):
    deadline_seconds = PATIENCE_SECONDS

    @pytest.fixture
    async def store(
        self, replica_set: Mongod, partition: str, credentials: tuple[dict[str, Any], dict[str, Any]]
    ) -> AsyncIterator[LightningStoreClient]:
        server_options, client_options = credentials
        store = MongoLightningStore(replica_set.uri, partition_id=partition)
        server = LightningStoreServer(store, port=0, **server_options)
        await server.start()
        client = LightningStoreClient(server.endpoint, **client_options)
        yield client
        await client.close()
        await server.close()


class TestWithLaxResources(LaxResourcesContract):
    @pytest.fixture
    async def store(self, replica_set: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
        store = MongoLightningStore(replica_set.uri, partition_id=partition, validate_resources=False)
        yield store
        await store.close()
