"""The contract suite on stores made safe for threads."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from plain_store import PlainStore

from lightning.store import InMemoryLightningStore, LightningStoreThreaded
from lightning.testing import (
    ClockedStoreContractSuite,
    EvictionContract,
    FakeClock,
    LaxResourcesContract,
    ResumedWatchContract,
    RunnerContract,
)


class TestThreadedMemory(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[LightningStoreThreaded]:
        store = LightningStoreThreaded(InMemoryLightningStore(clock=clock))
        yield store
        await store.close()


class TestThreadedForeign(ClockedStoreContractSuite):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[LightningStoreThreaded]:
        store = LightningStoreThreaded(PlainStore(clock))
        yield store
        await store.close()


class TestThreadedEviction(EvictionContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[LightningStoreThreaded]:
        store = LightningStoreThreaded(
            InMemoryLightningStore(
                eviction_memory_threshold=self.eviction_threshold_bytes,
                safe_memory_threshold=self.safe_threshold_bytes,
            )
        )
        yield store
        await store.close()


class TestThreadedLaxResources(LaxResourcesContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[LightningStoreThreaded]:
        store = LightningStoreThreaded(InMemoryLightningStore(validate_resources=False))
        yield store
        await store.close()
