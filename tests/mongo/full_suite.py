"""The contract suite and random histories on MongoDB in full: on both kinds of server, directly and through the client,
also by TLS with a token.

That takes long, so the tests run a part of it (`test_suite_mongo.py`, `test_machine_mongo.py`); all of it runs by
`scripts/prove_mongo.py --only suite`, or `pytest tests/mongo/full_suite.py`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from server import Mongod

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store.contract import LightningStore
from lightning.store.mongo import MongoLightningStore
from lightning.testing import ClockedStoreContractSuite, FakeClock, ResumedWatchContract, RunnerContract
from lightning.testing.machine import ClientMachine, StoreMachine

Options = dict[str, Any]

HISTORIES = settings(
    max_examples=int(os.environ.get("HISTORIES", "40")),
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Everything(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    """All that a store of ours promises, on a machine that may be busy."""

    deadline_seconds = 50.0


class TestDirectly(Everything):
    @pytest.fixture
    async def store(
        self, mongod: Mongod, partition: str, clock: FakeClock
    ) -> AsyncIterator[MongoLightningStore]:
        store = MongoLightningStore(mongod.uri, partition_id=partition, clock=clock)
        yield store
        await store.close()


class TestThroughClient(Everything):
    @pytest.fixture
    async def store(
        self, mongod: Mongod, partition: str, clock: FakeClock
    ) -> AsyncIterator[LightningStoreClient]:
        server = LightningStoreServer(
            MongoLightningStore(mongod.uri, partition_id=partition, clock=clock), port=0
        )
        await server.start()
        client = LightningStoreClient(server.endpoint)
        yield client
        await client.close()
        await server.close()


class TestByTlsWithToken(Everything):
    @pytest.fixture
    async def store(
        self, mongod: Mongod, partition: str, clock: FakeClock, credentials: tuple[Options, Options]
    ) -> AsyncIterator[LightningStoreClient]:
        store = MongoLightningStore(mongod.uri, partition_id=partition, clock=clock)
        server_options, client_options = credentials
        server = LightningStoreServer(store, port=0, **server_options)
        await server.start()
        client = LightningStoreClient(server.endpoint, **client_options)
        yield client
        await client.close()
        await server.close()


@pytest.mark.timeout(3600)
def test_random_histories(mongod: Mongod) -> None:
    class MongoMachine(StoreMachine):
        def make_store(self) -> LightningStore:
            return MongoLightningStore(mongod.uri, partition_id=uuid.uuid4().hex, clock=self.clock)

    run_state_machine_as_test(MongoMachine, settings=HISTORIES)


@pytest.mark.timeout(3600)
def test_random_histories_through_the_client(mongod: Mongod) -> None:
    class MongoClientMachine(ClientMachine):
        def make_store(self) -> LightningStore:
            return MongoLightningStore(mongod.uri, partition_id=uuid.uuid4().hex, clock=self.clock)

    run_state_machine_as_test(MongoClientMachine, settings=HISTORIES)
