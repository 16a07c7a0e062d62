"""A MongoDB server, in both kinds, and stores and backends on it."""

from __future__ import annotations

import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from lightning.store.persistence.mongo import MongoPersistence
from lightning.store.persistence.mongo_connection import MongoSettings

for _folder in (Path(__file__).parent, Path(__file__).parents[1] / "store"):
    sys.path.append(str(_folder))  # helpers stand beside the tests

from server import Mongod, MongodMissing, find_binary  # noqa: E402  # after the lines above, which it needs


@pytest.fixture(scope="session")
def _mongod_is_there() -> None:
    try:
        find_binary()
    except MongodMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["standalone", "replica-set"])
def mongod(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _mongod_is_there: None
) -> Iterator[Mongod]:
    """A server of either kind."""
    server = Mongod(tmp_path_factory.mktemp("mongod"), replica_set=request.param == "replica-set")
    try:
        server.start()
        if server.replica_set:
            server.initiate()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def replica_set(tmp_path_factory: pytest.TempPathFactory, _mongod_is_there: None) -> Iterator[Mongod]:
    """A server that is a replica set of its own."""
    server = Mongod(tmp_path_factory.mktemp("mongod"), replica_set=True)
    try:
        server.start()
        server.initiate()
        yield server
    finally:
        server.stop()


@pytest.fixture
def partition() -> str:
    """One that nobody has used."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
async def backend(mongod: Mongod, partition: str) -> AsyncIterator[MongoPersistence]:
    """An empty backend, opened."""
    backend = MongoPersistence(MongoSettings(mongod.uri, "lightning", partition, 20.0, None))
    await backend.open()
    yield backend
    await backend.close()
