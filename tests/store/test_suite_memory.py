from __future__ import annotations
from collections.abc import AsyncIterator
import pytest
from lightning.store import InMemoryLightningStore
from lightning.testing.contract import StoreContractSuite

class TestMemory(StoreContractSuite):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore()
        yield store
        await store.close()
