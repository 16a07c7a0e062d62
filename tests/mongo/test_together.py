"""Changes that wait for the same document are made in one write, and each of them is made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pymongo
import pytest
from server import Mongod

from lightning.store.mongo import MongoLightningStore
from lightning.store.persistence.mongo import spans as spans_module
from lightning.store.persistence.mongo.backend import MongoPersistence
from lightning.store.records import RolloutRecord
from lightning.testing import make_span
from lightning.types import RolloutConfig

pytestmark = pytest.mark.anyio

CALLS = 20


@pytest.fixture
async def store(mongod: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
    store = MongoLightningStore(mongod.uri, partition_id=partition)
    yield store
    await store.close()


def writes(mongod: Mongod, rollout_id: str) -> int:
    """How many there were to a rollout's document, the first included."""
    with pymongo.MongoClient(mongod.uri) as client:
        document = client["lightning"]["rollouts"].find_one({"_id.rollout_id": rollout_id})
        assert document is not None
        return len(document["recent"])


async def test_changes_of_a_record(store: MongoLightningStore, mongod: Mongod) -> None:
    backend = store.persistence
    assert isinstance(backend, MongoPersistence)
    rollout = await store.start_rollout(0)

    def add_one(record: RolloutRecord) -> RolloutRecord:
        assert record.input is not None
        return record._replace(input=str(int(record.input) + 1).encode())

    changes = await asyncio.gather(
        *(backend.change_rollout(rollout.rollout_id, add_one) for _ in range(CALLS))
    )
    assert [(change.before.input, change.after.input) for change in changes if change] == [
        (str(number).encode(), str(number + 1).encode()) for number in range(CALLS)
    ]
    stored = await backend.get_rollout(rollout.rollout_id)
    assert changes[-1] is not None
    assert stored == changes[-1].after
    assert writes(mongod, rollout.rollout_id) == 2


async def test_one_that_is_refused_is_no_hindrance(store: MongoLightningStore) -> None:
    rollout = await store.start_rollout("task")
    attempts = [rollout.attempt.attempt_id, "at-none", "latest"]
    updates = [
        store.update_attempt(rollout.rollout_id, attempt_id, metadata={"by": number})
        for number, attempt_id in enumerate(attempts)
    ]
    first, refused, last = await asyncio.gather(*updates, return_exceptions=True)
    assert isinstance(refused, ValueError)
    assert "at-none" in str(refused)
    assert [update.metadata for update in (first, last) if not isinstance(update, BaseException)] == [
        {"by": 0},
        {"by": 2},
    ]


async def test_who_leaves_the_queue_and_comes_back_is_its_last(store: MongoLightningStore) -> None:
    config = RolloutConfig(max_attempts=2, retry_condition=["failed"])
    first, second = [(await store.enqueue_rollout(number, config=config)).rollout_id for number in range(2)]
    await asyncio.gather(store.start_attempt(first), store.update_attempt(first, "latest", status="failed"))
    assert await store.persistence.queue_order() == [second, first]


async def test_spans_of_an_attempt(store: MongoLightningStore, mongod: Mongod) -> None:
    rollout = await store.start_rollout("task")
    spans = [make_span(rollout) for _ in range(CALLS)]
    calls = [[*spans[max(0, number - 2) : number], span] for number, span in enumerate(spans)]
    for _ in range(2):  # the first time, the attempt has none; then it has
        stored = await asyncio.gather(*map(store.add_many_spans, calls))
        numbers = [span.sequence_id for call in stored for span in call]
        assert numbers in (list(range(1, CALLS + 1)), [])
    assert [span.span_id for span in await store.query_spans(rollout.rollout_id)] == [
        span.span_id for span in spans
    ]
    assert writes(mongod, rollout.rollout_id) == 3


async def test_spans_that_are_forgotten_are_duplicates_still(
    store: MongoLightningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans_module, "_MAX_REMEMBERED_SPANS", 5)
    rollouts = [await store.start_rollout(number) for number in range(3)]
    batches = [[make_span(rollout) for _ in range(4)] for rollout in rollouts]
    for batch in batches:
        await store.add_many_spans(batch[:2])
    for batch in batches:
        stored = await store.add_many_spans(batch)
        assert [(span.span_id, span.sequence_id) for span in stored] == [
            (span.span_id, number) for number, span in enumerate(batch[2:], start=3)
        ]
