"""A claim whose answer was lost is repeated, and its repeat meets another server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pymongo
import pytest
from server import Mongod

from lightning.store.idempotency import request
from lightning.store.mongo import MongoLightningStore
from lightning.store.persistence.mongo.schema import VERSION
from lightning.types import AttemptedRollout, EnqueueRolloutRequest

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stores(mongod: Mongod, partition: str) -> AsyncIterator[list[MongoLightningStore]]:
    """Two servers' stores on the same data."""
    async with AsyncExitStack() as stack:
        stores = [MongoLightningStore(mongod.uri, partition_id=partition) for _ in range(2)]
        for store in stores:
            stack.push_async_callback(store.close)
            await store.statistics()
        yield stores


async def claim(store: MongoLightningStore, name: str, limit: int = 1) -> Sequence[AttemptedRollout]:
    with request(name):
        return await store.dequeue_many_rollouts(limit=limit, worker_id="w-1")


def ids(claimed: Sequence[AttemptedRollout]) -> list[tuple[str, str]]:
    return [(rollout.rollout_id, rollout.attempt.attempt_id) for rollout in claimed]


async def test_it_gets_what_the_first_server_claimed(stores: list[MongoLightningStore]) -> None:
    await stores[0].enqueue_many_rollouts([EnqueueRolloutRequest(input=number) for number in range(5)])
    first = await claim(stores[0], "a", limit=3)
    assert ids(await claim(stores[1], "a", limit=3)) == ids(first)
    assert [rollout.input for rollout in await claim(stores[1], "b", limit=3)] == [3, 4]
    assert ids(await claim(stores[1], "a", limit=3)) == ids(first)  # the queue is empty now
    assert (await stores[0].statistics())["total_attempts"] == 5


async def test_two_servers_at_once_claim_one_rollout_between_them(
    stores: list[MongoLightningStore],
) -> None:
    """One of them is still at work when the other is asked the same."""
    await stores[0].enqueue_many_rollouts([EnqueueRolloutRequest(input=number) for number in range(100)])
    names = [f"request {number}" for number in range(25)]
    claims = await asyncio.gather(*(claim(store, name) for name in names for store in stores))
    pairs = list(zip(claims[::2], claims[1::2], strict=True))
    assert [ids(one) for one, _ in pairs] == [ids(other) for _, other in pairs]
    assert len({ids(one)[0] for one, _ in pairs}) == len(names)
    assert (await stores[0].statistics())["rollouts_by_status"] == {"queuing": 75, "preparing": 25}


async def test_it_goes_on_where_the_first_server_stopped(stores: list[MongoLightningStore]) -> None:
    """That died, say, with a part of what it was to claim."""
    await stores[0].enqueue_many_rollouts([EnqueueRolloutRequest(input=number) for number in range(10)])
    first = await claim(stores[0], "a", limit=2)
    repeated = await claim(stores[1], "a", limit=5)
    assert ids(repeated)[:2] == ids(first)
    assert [rollout.input for rollout in repeated] == [0, 1, 2, 3, 4]
    assert ids(await claim(stores[0], "a", limit=5)) == ids(repeated)


async def test_two_servers_at_once_claim_many_between_them(stores: list[MongoLightningStore]) -> None:
    """Whichever of them the caller hears of has all of them."""
    await stores[0].enqueue_many_rollouts([EnqueueRolloutRequest(input=number) for number in range(100)])
    names = [f"request {number}" for number in range(10)]
    claims = await asyncio.gather(*(claim(store, name, limit=4) for name in names for store in stores))
    pairs = list(zip(claims[::2], claims[1::2], strict=True))
    assert [ids(one) for one, _ in pairs] == [ids(other) for _, other in pairs]
    assert len({one for pair in claims for one in ids(pair)}) == 4 * len(names)
    assert (await stores[0].statistics())["rollouts_by_status"] == {"queuing": 60, "preparing": 40}


async def test_indexes_of_the_version_before_make_room(mongod: Mongod, partition: str) -> None:
    name = f"lightning-{partition[:20]}"
    with pymongo.MongoClient(mongod.uri) as client:
        client[name]["rollouts"].create_index([("partition", 1), ("attempts.attempt_id", 1)])
        client[name]["meta"].insert_one({"_id": "schema", "version": 1})
        store = MongoLightningStore(mongod.uri, name)
        await store.enqueue_rollout("task")
        (claimed,) = await claim(store, "a")
        assert ids(await claim(store, "a")) == ids([claimed])
        await store.close()
        assert client[name]["meta"].find_one({"_id": "schema"}) == {"_id": "schema", "version": VERSION}
        about = client[name]["rollouts"].index_information()
        assert about["each_attempt_once"]["unique"]
        assert "partition_1_attempts.attempt_id_1" not in about
        found = client[name]["rollouts"].find({"partition": "default", "attempts.attempt_id": "at-1"})
        assert "each_attempt_once" in str(found.explain()["queryPlanner"]["winningPlan"])
        client.drop_database(name)
