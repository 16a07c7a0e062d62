"""Every primitive of MongoDB does what that of memory does, after any history; see `tests/store/histories.py`."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from histories import HISTORIES, Operation, compare
from hypothesis import HealthCheck, given, settings
from server import Mongod

from lightning.store.persistence.mongo.backend import MongoPersistence
from lightning.store.persistence.mongo.connection import MongoSettings


@pytest.mark.timeout(300)
@given(history=HISTORIES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history(mongod: Mongod, history: list[Operation]) -> None:
    async def run() -> None:
        backend = MongoPersistence(MongoSettings(mongod.uri, "lightning", uuid.uuid4().hex, 20.0, None))
        await backend.open()
        try:
            await compare(history, backend)
        finally:
            await backend.close()

    asyncio.run(run())
