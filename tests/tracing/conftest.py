"""What the tests of tracing share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lightning.store.backends import InMemoryLightningStore
from lightning.testing.unreliable import UnreliableStore


@pytest.fixture
async def store(anyio_backend: str) -> AsyncIterator[UnreliableStore]:
    """A store in memory that can be told to be out of reach."""
    store = UnreliableStore(InMemoryLightningStore())
    yield store
    store.away = False
    await store.close()
