"""Random histories on MongoDB, a few; `full_suite.py` has more, and `scripts/prove_store.py` thousands on the stores
that need no server."""

from __future__ import annotations

import uuid

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from server import Mongod

from lightning.store.contract import LightningStore
from lightning.store.mongo import MongoLightningStore
from lightning.testing.machine import ClientMachine, StoreMachine

FEW = settings(
    max_examples=3,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_random_histories(replica_set: Mongod) -> None:
    class MongoMachine(StoreMachine):
        def make_store(self) -> LightningStore:
            return MongoLightningStore(replica_set.uri, partition_id=uuid.uuid4().hex, clock=self.clock)

    run_state_machine_as_test(MongoMachine, settings=FEW)


def test_random_histories_through_the_client(standalone: Mongod) -> None:
    class MongoClientMachine(ClientMachine):
        def make_store(self) -> LightningStore:
            return MongoLightningStore(standalone.uri, partition_id=uuid.uuid4().hex, clock=self.clock)

    run_state_machine_as_test(MongoClientMachine, settings=FEW)
