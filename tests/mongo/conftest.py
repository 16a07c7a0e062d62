"""A MongoDB server, in both kinds, and stores and backends on it."""

from __future__ import annotations

import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning.rpc.tokens import add_token
from lightning.store.persistence.mongo.backend import MongoPersistence
from lightning.store.persistence.mongo.connection import MongoSettings
from tests.rpc.certificates import Authority

for _folder in (Path(__file__).parent, Path(__file__).parents[1] / "store"):
    sys.path.append(str(_folder))  # helpers stand beside the tests

from server import Mongod, MongodMissing, find_binary  # noqa: E402  # after the lines above, which it needs


@pytest.fixture(scope="session")
def _mongod_is_there() -> None:
    try:
        find_binary()
    except MongodMissing as error:
        pytest.skip(str(error))


@contextmanager
def _running(folder: Path, *, replica_set: bool) -> Iterator[Mongod]:
    server = Mongod(folder, replica_set=replica_set)
    try:
        server.start()
        if replica_set:
            server.initiate()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def standalone(tmp_path_factory: pytest.TempPathFactory, _mongod_is_there: None) -> Iterator[Mongod]:
    """A server on its own."""
    with _running(tmp_path_factory.mktemp("mongod"), replica_set=False) as server:
        yield server


@pytest.fixture(scope="session")
def replica_set(tmp_path_factory: pytest.TempPathFactory, _mongod_is_there: None) -> Iterator[Mongod]:
    """A server that is a replica set of its own."""
    with _running(tmp_path_factory.mktemp("mongod"), replica_set=True) as server:
        yield server


@pytest.fixture(scope="session", params=["standalone", "replica_set"])
def mongod(request: pytest.FixtureRequest) -> Mongod:
    """A server of either kind."""
    server: Mongod = request.getfixturevalue(request.param)
    return server


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for TLS and a token: those of a server, and of its client."""
    folder = tmp_path_factory.mktemp("credentials")
    authority = Authority(folder)
    token, _ = add_token(folder / "tokens.json", "algorithm", None, 3600)
    server_options = authority.server_options(tokens=folder / "tokens.json")
    return server_options, {"tls_ca": authority.file, "token": token}


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
