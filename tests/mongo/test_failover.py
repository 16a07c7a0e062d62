"""Three MongoDB servers, and the primary dies: nothing that was acknowledged is lost, and nothing happens twice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pymongo
import pytest
from server import Mongod

from lightning.store.mongo import MongoLightningStore
from lightning.testing import make_span

pytestmark = pytest.mark.anyio

WORKERS = 4
ROUNDS = 15
"""How many rollouts each worker finishes before the primary dies, and again afterwards."""


@pytest.fixture
def three(tmp_path_factory: pytest.TempPathFactory, _mongod_is_there: None) -> Iterator[list[Mongod]]:
    """A replica set of three."""
    with ExitStack() as stack:
        servers = [Mongod(tmp_path_factory.mktemp("mongod"), replica_set=True) for _ in range(3)]
        for server in servers:
            stack.callback(server.stop)
            server.start()
        servers[0].initiate(*servers[1:])
        yield servers


def primary_of(servers: list[Mongod]) -> Mongod:
    with pymongo.MongoClient(servers[0].uri) as client:
        host = client.admin.command("hello")["primary"]
    return next(server for server in servers if server.host == host)


@pytest.mark.timeout(180)
async def test_the_primary_dies_under_load(three: list[Mongod], partition: str) -> None:
    uri = f"mongodb://{','.join(server.host for server in three)}/?replicaSet=rs0"
    stores = [MongoLightningStore(uri, partition_id=partition, timeout_seconds=60) for _ in range(2)]
    enqueued: list[str] = []
    claimed: list[tuple[str, str]] = []
    spans: dict[str, str] = {}
    finished: set[str] = set()
    rounds = asyncio.Semaphore(0)
    enough = asyncio.Event()

    async def work(store: MongoLightningStore) -> None:
        while not enough.is_set():
            enqueued.append((await store.enqueue_rollout("task")).rollout_id)
            rollout = await store.dequeue_rollout()
            assert rollout is not None  # each takes as many as it puts in
            key = (rollout.rollout_id, rollout.attempt.attempt_id)
            claimed.append(key)
            (span,) = await store.add_many_spans([make_span(rollout)])
            spans[rollout.rollout_id] = span.span_id
            await store.update_attempt(*key, status="succeeded")
            finished.add(rollout.rollout_id)
            rounds.release()

    async def let_them_work() -> None:
        for _ in range(WORKERS * ROUNDS):
            await rounds.acquire()

    working = [asyncio.create_task(work(stores[number % 2])) for number in range(WORKERS)]
    await let_them_work()
    await asyncio.to_thread(lambda: primary_of(three).kill())
    await let_them_work()
    enough.set()
    await asyncio.gather(*working)

    stored = {rollout.rollout_id: rollout for rollout in await stores[0].query_rollouts()}
    assert sorted(stored) == sorted(enqueued)
    assert sorted(rollout_id for rollout_id, _ in claimed) == sorted(enqueued)
    assert finished == set(enqueued)
    for rollout_id, attempt_id in claimed:
        assert stored[rollout_id].status == "succeeded"
        assert [attempt.attempt_id for attempt in await stores[1].query_attempts(rollout_id)] == [attempt_id]
        assert [span.span_id for span in await stores[1].query_spans(rollout_id)] == [spans[rollout_id]]
    for store in stores:
        await store.close()
