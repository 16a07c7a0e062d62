"""The contract suite through a real connection: whatever a store promises, its client promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore
from lightning.testing import (
    ClockedStoreContractSuite,
    EvictionContract,
    FakeClock,
    LaxResourcesContract,
    ResumedWatchContract,
    RunnerContract,
    StoreContractSuite,
)


async def through_grpc(
    store: Any, server_options: dict[str, Any] | None = None, **client_options: Any
) -> AsyncIterator[LightningStoreClient]:
    server = LightningStoreServer(store, port=0, **(server_options or {}))
    await server.start()
    client = LightningStoreClient(server.endpoint, **client_options)
    yield client
    await client.close()
    await server.close()


class TestClient(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[LightningStoreClient]:
        async for client in through_grpc(InMemoryLightningStore(clock=clock)):
            yield client

    async def test_a_cancellation_reaches_the_worker(
        self, store: LightningStoreClient, clock: FakeClock
    ) -> None:
        """As in the suite, but for the clock: the client's own patience is measured in real time."""
        started = await store.start_rollout("task", worker_id="w-1")
        assert not await store.receive_commands("w-1", timeout=0)
        waiter = asyncio.ensure_future(store.receive_commands("w-1"))
        assert not await store.receive_commands("w-2", timeout=0.01)
        await store.update_rollout(started.rollout_id, status="cancelled")
        (command,) = await self.soon(waiter)
        assert (command.kind, command.attempt_id) == ("cancel_attempt", started.attempt.attempt_id)
        assert not await store.receive_commands("w-2", timeout=0)


class TestClientInRealTime(StoreContractSuite):
    @pytest.fixture
    async def store(self) -> AsyncIterator[LightningStoreClient]:
        async for client in through_grpc(InMemoryLightningStore()):
            yield client


class TestClientWithLaxResources(LaxResourcesContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[LightningStoreClient]:
        async for client in through_grpc(InMemoryLightningStore(validate_resources=False)):
            yield client


class TestClientEviction(EvictionContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[LightningStoreClient]:
        async for client in through_grpc(
            InMemoryLightningStore(
                eviction_memory_threshold=self.eviction_threshold_bytes,
                safe_memory_threshold=self.safe_threshold_bytes,
            )
        ):
            yield client
