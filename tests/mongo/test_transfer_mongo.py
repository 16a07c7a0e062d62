"""What is exported from SQLite and imported into MongoDB is exported from that as it was; and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
from server import Mongod
from test_transfer import exported, live, opened

from lightning.store.mongo import MongoLightningStore
from lightning.store.transfer import import_lines
from lightning.testing import FakeClock

pytestmark = pytest.mark.anyio


async def test_nothing_changes_on_the_way(replica_set: Mongod, partition: str, tmp_path: Path) -> None:
    clock = FakeClock()
    mongo = MongoLightningStore(replica_set.uri, partition_id=partition, clock=clock)
    await mongo.statistics()  # opens it
    async with opened("sqlite", tmp_path / "one", clock) as first, opened("sqlite", tmp_path / "two") as last:
        await live(first, clock, 1)
        lines = await exported(first)
        await import_lines(lines, mongo.persistence)
        assert await exported(mongo) == lines
        await import_lines(await exported(mongo), last.persistence)
        assert await exported(last) == lines
    await mongo.close()
