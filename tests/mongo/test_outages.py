"""MongoDB fails in the middle of a call: the call is made good, exactly once, or fails with an error that says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from failpoints import Failpoint, failing
from server import Mongod

from lightning.store.mongo import MongoLightningStore
from lightning.store.persistence.abc import BackendUnavailableError
from lightning.testing import make_span
from lightning.types import LLM, EnqueueRolloutRequest

pytestmark = pytest.mark.anyio

COMMANDS = ("insert", "update", "findAndModify", "delete", "find", "aggregate")
WRITES = ("insert", "update", "findAndModify", "delete")
NOT_PRIMARY, NOT_REPLICATED = 10107, 64

FAILURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "the connection breaks": (COMMANDS, {"closeConnection": True}),
    "it is primary no more": (COMMANDS, {"errorCode": NOT_PRIMARY}),
    "the majority does not answer": (
        WRITES,
        {"writeConcernError": {"code": NOT_REPLICATED, "errmsg": "waiting for replication timed out"}},
    ),
}


@pytest.fixture
async def store(replica_set: Mongod, partition: str) -> AsyncIterator[MongoLightningStore]:
    """One for which the driver repeats nothing, as against a standalone server."""
    options = "&retryWrites=false&retryReads=false"
    store = MongoLightningStore(replica_set.uri + options, partition_id=partition, timeout_seconds=50)
    await store.statistics()
    yield store
    await store.close()


@pytest.fixture(params=FAILURES)
def failpoint(replica_set: Mongod, request: pytest.FixtureRequest) -> Iterator[Failpoint]:
    commands, how = FAILURES[request.param]
    failpoint = Failpoint(replica_set, commands, **how)
    yield failpoint
    failpoint.close()


async def test_every_verb_has_its_effect_once(store: MongoLightningStore, failpoint: Failpoint) -> None:
    """Each of them meets two failures, one after the other."""

    async def hit(call: Callable[[], Awaitable[Any]]) -> Any:
        failpoint.set({"times": 2})
        result = await call()
        failpoint.set("off")
        return result

    requests = [EnqueueRolloutRequest(input=number) for number in range(3)]
    first = await hit(lambda: store.enqueue_rollout("x" * 100_000))
    others = await hit(lambda: store.enqueue_many_rollouts(requests))
    claimed = await hit(lambda: store.dequeue_many_rollouts(limit=3, worker_id="w-1"))
    assert [rollout.rollout_id for rollout in claimed] == [
        first.rollout_id,
        *(rollout.rollout_id for rollout in others[:2]),
    ]
    key = (first.rollout_id, claimed[0].attempt.attempt_id)
    spans = [make_span(claimed[0]) for _ in range(4)]
    stored = await hit(lambda: store.add_many_spans(spans))
    assert [span.span_id for span in stored] == [span.span_id for span in spans]
    assert await hit(lambda: store.get_next_span_sequence_id(*key)) > stored[-1].sequence_id
    await hit(lambda: store.update_attempt(*key, status="succeeded"))
    await hit(lambda: store.update_rollout(others[0].rollout_id, metadata={"step": 1}))
    resources = await hit(lambda: store.add_resources({"llm": LLM(endpoint="http://localhost", model="m")}))
    newer = await hit(lambda: store.update_resources(resources.resources_id, {}))
    assert (resources.version, newer.version) == (1, 2)
    await hit(lambda: store.update_worker("w-2", {"load": 1}))

    assert [span.span_id for span in await store.query_spans(first.rollout_id)] == [
        span.span_id for span in spans
    ]
    for rollout in claimed:
        assert len(await store.query_attempts(rollout.rollout_id)) == 1
    statistics = await store.statistics()
    assert statistics["rollouts_by_status"] == {"succeeded": 1, "preparing": 2, "queuing": 1}
    totals = {name: statistics[f"total_{name}"] for name in ("spans", "resources", "workers")}
    assert totals == {"spans": 4, "resources": 2, "workers": 2}


async def test_what_stays_away_is_said_to_be_away(replica_set: Mongod, partition: str) -> None:
    """It is never taken for an empty queue or an unknown id."""
    async with AsyncExitStack() as stack:
        store, later = (
            MongoLightningStore(replica_set.uri, partition_id=partition, timeout_seconds=seconds)
            for seconds in (1.0, 30.0)
        )
        for one in (store, later):
            stack.push_async_callback(one.close)
            await one.statistics()
        rollout = await later.enqueue_rollout(1)
        with failing(replica_set, COMMANDS, errorCode=NOT_PRIMARY):
            calls = (
                store.dequeue_rollout(),
                store.get_rollout_by_id(rollout.rollout_id),
                store.query_rollouts(),
                store.enqueue_rollout(2),
            )
            for error in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(error, BackendUnavailableError)
                assert "could not be reached, or had no primary" in str(error)
        claimed = await later.dequeue_rollout()
        assert claimed is not None
        assert claimed.rollout_id == rollout.rollout_id
