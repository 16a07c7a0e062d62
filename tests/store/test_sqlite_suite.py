"""The contract suite on SQLite: in a file, as it is by default and with less durability, and in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lightning.store import SQLiteLightningStore
from lightning.testing import ClockedStoreContractSuite, FakeClock, RunnerContract


class TestSQLiteFile(ClockedStoreContractSuite, RunnerContract):
    @pytest.fixture
    async def store(self, tmp_path: Path, clock: FakeClock) -> AsyncIterator[SQLiteLightningStore]:
        store = SQLiteLightningStore(tmp_path / "store.db", clock=clock)
        yield store
        await store.close()


class TestSQLiteInMemory(ClockedStoreContractSuite, RunnerContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[SQLiteLightningStore]:
        store = SQLiteLightningStore(":memory:", clock=clock)
        yield store
        await store.close()
