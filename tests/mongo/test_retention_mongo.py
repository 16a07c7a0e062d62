"""Finished rollouts whose time is up are dropped with all that belongs to them; the store counts them, and says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timezone

import pymongo
import pytest
from server import Mongod

from lightning.store.mongo import MongoLightningStore
from lightning.store.persistence.mongo.backend import MongoPersistence
from lightning.testing import make_span
from lightning.types import AttemptedRollout

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(replica_set: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
    store = MongoLightningStore(replica_set.uri, partition_id=partition, retain="5m")
    await store.statistics()
    yield store
    await store.close()


async def finished(store: MongoLightningStore, spans: int) -> AttemptedRollout:
    rollout = await store.start_rollout("x" * 100_000)  # does not rest in its document
    await store.add_many_spans([make_span(rollout) for _ in range(spans)])
    await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")
    return rollout


def let_time_pass(mongod: Mongod, *rollouts: AttemptedRollout) -> None:
    """These ended long ago."""
    long_ago = {"$set": {"expire_at": datetime(2020, 1, 1, tzinfo=timezone.utc)}}
    with pymongo.MongoClient(mongod.uri) as client:
        for rollout in rollouts:
            found = {"_id.rollout_id": rollout.rollout_id}
            assert client["lightning"]["rollouts"].update_one(found, long_ago).matched_count == 1


async def drop(store: MongoLightningStore) -> int:
    assert isinstance(store.persistence, MongoPersistence)
    return await store.persistence._session.housekeeping.delete_expired()


async def test_what_was_dropped_is_counted_and_named(
    store: MongoLightningStore, replica_set: Mongod, partition: str
) -> None:
    kept = await finished(store, 1)
    gone = [await finished(store, spans) for spans in (3, 0)]
    assert await drop(store) == 0
    let_time_pass(replica_set, *gone)
    assert await drop(store) == 2
    assert await drop(store) == 0
    statistics = await store.statistics()
    assert (statistics["dropped_rollouts"], statistics["evicted_spans"]) == (2, 3)
    assert (statistics["total_rollouts"], statistics["total_spans"]) == (1, 1)
    said = (
        "it had finished, and was dropped with its spans by this store, which keeps finished ones for 300 s"
    )
    with pytest.raises(ValueError, match=f"unknown rollout '{gone[0].rollout_id}': {said}"):
        await store.query_spans(gone[0].rollout_id)
    with pytest.raises(ValueError, match=f"unknown rollout '{gone[1].rollout_id}': {said}"):
        await store.update_rollout(gone[1].rollout_id, metadata={})
    with pytest.raises(ValueError, match=r"unknown rollout 'ro-never'$"):
        await store.query_spans("ro-never")
    assert await store.get_rollout_by_id(kept.rollout_id) is not None
    with pymongo.MongoClient(replica_set.uri) as client:
        payloads = client["lightning"]["payloads"].count_documents({"partition": partition})
        assert payloads == 1  # that of the one that is kept


async def test_one_that_is_executed_again_meanwhile_is_not_dropped(
    store: MongoLightningStore, replica_set: Mongod
) -> None:
    rollout = await finished(store, 0)
    await store.update_rollout(rollout.rollout_id, status="queuing")
    assert isinstance(store.persistence, MongoPersistence)
    housekeeping = store.persistence._session.housekeeping
    key = {"partition": store.persistence._settings.partition_id, "rollout_id": rollout.rollout_id}
    assert await housekeeping._delete([key], {"$lt": datetime.now(timezone.utc)}) == 0
    assert await store.get_rollout_by_id(rollout.rollout_id) is not None
    assert await store.persistence.why_gone(rollout.rollout_id) is None
    assert (await store.statistics())["dropped_rollouts"] == 0
