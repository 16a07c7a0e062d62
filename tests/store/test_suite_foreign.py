"""The contract suite on a store that somebody else might have written: the example in `examples/own_store`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from plain_store import PlainStore
from stranger import Stranger
from test_plain_store import TestPlainStore, TestPlainStoreInRealTime

from lightning.store.contract import LightningStore
from lightning.store.forwarding import complete
from lightning.testing import ClockedStoreContractSuite, FakeClock

__all__ = ["TestPlainStore", "TestPlainStoreInRealTime"]


class TestStranger(ClockedStoreContractSuite):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[LightningStore]:
        stranger = Stranger(PlainStore(clock))
        assert not isinstance(stranger, LightningStore)
        store = complete(stranger)
        yield store
        await store.close()


def test_what_lacks_a_verb_is_no_store() -> None:
    stranger = Stranger(PlainStore())
    del stranger.add_span  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"Stranger is no LightningStore: it lacks add_span"):
        complete(stranger)
