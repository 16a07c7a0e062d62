"""The contract suite on a store of one's own. Run it: `pytest examples/own_store`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from plain_store import PlainStore

from lightning.testing import ClockedStoreContractSuite, FakeClock, StoreContractSuite


class TestPlainStore(ClockedStoreContractSuite):
    """Every test of the contract. `clock` is the suite's own fixture: the time that its tests move."""

    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[PlainStore]:
        store = PlainStore(clock)
        yield store
        await store.close()


class TestPlainStoreInRealTime(StoreContractSuite):
    """What a store would run that takes no clock."""

    @pytest.fixture
    async def store(self) -> AsyncIterator[PlainStore]:
        store = PlainStore()
        yield store
        await store.close()
