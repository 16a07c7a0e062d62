"""The contract suite on the memory backend."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lightning.store import InMemoryLightningStore
from lightning.testing import (
    ClockedStoreContractSuite,
    EvictionContract,
    FakeClock,
    LaxResourcesContract,
    RunnerContract,
    StoreContractSuite,
)


class TestMemory(ClockedStoreContractSuite, RunnerContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore(clock=clock)
        yield store
        await store.close()


class TestMemoryInRealTime(StoreContractSuite):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore()
        yield store
        await store.close()


class TestMemoryWithLaxResources(LaxResourcesContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore(validate_resources=False)
        yield store
        await store.close()


class TestMemoryEviction(EvictionContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore(
            eviction_memory_threshold=self.eviction_threshold_bytes,
            safe_memory_threshold=self.safe_threshold_bytes,
        )
        yield store
        await store.close()
