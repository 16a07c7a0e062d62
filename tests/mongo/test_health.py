"""What a MongoDB that answers but does not work looks like from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pymongo
import pytest
from failpoints import failing
from server import Mongod

from lightning.store.mongo import MongoLightningStore
from lightning.store.persistence.abc import BackendError, BackendFullError, BackendOpenError

pytestmark = pytest.mark.anyio

OUT_OF_DISK_SPACE, UNAUTHORIZED = 14031, 13


@pytest.fixture
async def store(mongod: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
    store = MongoLightningStore(mongod.uri, partition_id=partition)
    await store.statistics()
    yield store
    await store.close()


async def test_it_can_be_written(store: MongoLightningStore) -> None:
    before = await store.statistics()
    await store.check_writable()
    await store.check_writable()
    assert {**await store.statistics(), "uptime": 0} == {**before, "uptime": 0}


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (OUT_OF_DISK_SPACE, BackendFullError, "no disk space left"),
        (UNAUTHORIZED, BackendError, "does not let the user"),
    ],
)
async def test_one_that_cannot_be_written_is_noticed(
    store: MongoLightningStore, mongod: Mongod, code: int, error: type[Exception], message: str
) -> None:
    with failing(mongod, ["update", "insert"], errorCode=code):
        with pytest.raises(error, match=message):
            await store.check_writable()
        with pytest.raises(error, match=message):
            await store.enqueue_rollout(1)
        assert (await store.statistics())["total_rollouts"] == 0
    await store.check_writable()
    await store.enqueue_rollout(1)


async def test_the_statistics_know_the_head_of_the_queue_and_attempts_by_status(
    store: MongoLightningStore,
) -> None:
    await store.enqueue_many_rollouts([])
    assert "oldest_queued_age" not in await store.statistics()
    rollout = await store.start_rollout(1)
    await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="failed")
    await store.start_attempt(rollout.rollout_id)
    await store.enqueue_rollout("x" * 100_000)  # does not rest in its document
    statistics = await store.statistics()
    assert statistics["attempts_by_status"] == {"failed": 1, "preparing": 1}
    assert statistics["total_attempts"] == 2
    assert statistics["oldest_queued_age"] >= 0


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(mongod: Mongod) -> None:
    name = "lightning-newer"
    with pymongo.MongoClient(mongod.uri) as client:
        client[name]["meta"].insert_one({"_id": "schema", "version": 99})
        store = MongoLightningStore(mongod.uri, name)
        with pytest.raises(BackendOpenError, match=r"lightning-newer.*newer version.*99"):
            await store.statistics()
        await store.close()
        assert client[name].list_collection_names() == ["meta"]
        client.drop_database(name)


async def test_indexes_are_made_once(mongod: Mongod, store: MongoLightningStore) -> None:
    with failing(mongod, ["createIndexes"], errorCode=UNAUTHORIZED):
        other = MongoLightningStore(mongod.uri)
        await other.statistics()
        await other.close()
