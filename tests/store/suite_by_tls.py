"""The contract suite through gRPC by mutual TLS with a token: over memory, over SQLite and over a foreign store.

It takes minutes, so pytest does not collect it by itself: `pytest tests/store/suite_by_tls.py`, or
`scripts/prove_network.py --only suites`. A part of it is in `test_suite_by_tls.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from plain_store import PlainStore
from stranger import Stranger

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore, SQLiteLightningStore
from lightning.testing import ClockedStoreContractSuite, FakeClock, ResumedWatchContract
from lightning.testing.contract import ClockedTheme

Credentials = tuple[dict[str, Any], dict[str, Any]]
"""Options of the server, and of the client."""


class OnMemory(ClockedTheme):
    """Over memory."""

    @pytest.fixture
    async def store(self, clock: FakeClock, credentials: Credentials) -> AsyncIterator[LightningStoreClient]:
        async with _client_of(InMemoryLightningStore(clock=clock), credentials) as client:
            yield client


class OnSQLite(ClockedTheme):
    """Over SQLite."""

    @pytest.fixture
    async def store(
        self, clock: FakeClock, credentials: Credentials, tmp_path: Path
    ) -> AsyncIterator[LightningStoreClient]:
        async with _client_of(
            SQLiteLightningStore(tmp_path / "store.db", clock=clock), credentials
        ) as client:
            yield client


class OnForeign(ClockedTheme):
    """Over an object that only has a store's methods."""

    @pytest.fixture
    async def store(self, clock: FakeClock, credentials: Credentials) -> AsyncIterator[LightningStoreClient]:
        async with _client_of(Stranger(PlainStore(clock)), credentials) as client:
            yield client


@asynccontextmanager
async def _client_of(store: Any, credentials: Credentials) -> AsyncIterator[LightningStoreClient]:
    server_options, client_options = credentials
    server = LightningStoreServer(store, port=0, **server_options)
    await server.start()
    client = LightningStoreClient(server.endpoint, **client_options)
    try:
        assert client.endpoint.startswith("grpcs://")
        yield client
    finally:
        await client.close()
        await server.close()


class TestMemoryByTls(OnMemory, ClockedStoreContractSuite, ResumedWatchContract):
    """All of it."""


class TestSQLiteByTls(OnSQLite, ClockedStoreContractSuite, ResumedWatchContract):
    """All of it."""


class TestForeignByTls(OnForeign, ClockedStoreContractSuite):
    """All of it."""
