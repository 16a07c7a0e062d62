"""Several servers on one database: they share the work, wake each other's callers, and lose nothing between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import TypeVar

import pytest
from server import Mongod

from lightning.store.contract import LightningStore
from lightning.store.mongo import MongoLightningStore
from lightning.testing import make_span
from lightning.types import (
    LLM,
    AttemptedRollout,
    CancelAttempt,
    Drain,
    EnqueueRolloutRequest,
    ResourcesChanged,
    RolloutConfig,
    Stop,
)

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Opener = Callable[..., Awaitable[MongoLightningStore]]

DEADLINE_SECONDS = 20.0


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, DEADLINE_SECONDS)


@pytest.fixture
async def open_store(mongod: Mongod, partition: str) -> AsyncIterator[Opener]:
    """Opens another server's store on the same data."""
    async with AsyncExitStack() as stack:

        async def open_one(partition_id: str = partition) -> MongoLightningStore:
            store = MongoLightningStore(mongod.uri, partition_id=partition_id)
            stack.push_async_callback(store.close)
            await store.statistics()
            return store

        yield open_one


async def enqueue(store: LightningStore, count: int) -> list[str]:
    requests = [EnqueueRolloutRequest(input=number) for number in range(count)]
    return [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests)]


async def claim(store: LightningStore, worker_id: str | None = None) -> AttemptedRollout:
    claimed = await store.dequeue_rollout(worker_id=worker_id)
    assert claimed is not None
    return claimed


async def finish(store: LightningStore, rollout: AttemptedRollout) -> None:
    await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")


async def hears(here: LightningStore, there: LightningStore) -> None:
    """Return when one server notices what the other does."""
    rollout = await there.start_rollout("heard?")
    waiting = asyncio.ensure_future(here.wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
    await here.statistics()
    await finish(there, rollout)
    await soon(waiting)


async def test_each_rollout_is_claimed_exactly_once(open_store: Opener) -> None:
    stores = [await open_store() for _ in range(3)]
    expected = await enqueue(stores[0], 150)

    async def work(store: LightningStore, limit: int) -> list[str]:
        taken: list[str] = []
        while claimed := await store.dequeue_many_rollouts(limit=limit):
            taken += [rollout.rollout_id for rollout in claimed]
        return taken

    parts = await soon(
        asyncio.gather(*(work(store, 1 + number % 3) for store in stores for number in range(8)))
    )
    claimed = [rollout_id for part in parts for rollout_id in part]
    assert sorted(claimed) == sorted(expected)
    assert (await stores[0].statistics())["rollouts_by_status"] == {"preparing": 150}


async def test_one_claimer_gets_them_in_order_whoever_enqueued_them(open_store: Opener) -> None:
    stores = [await open_store() for _ in range(3)]
    expected = [(await stores[number % 3].enqueue_rollout(number)).rollout_id for number in range(30)]
    claimed = [(await claim(stores[1])).rollout_id for _ in range(10)]
    claimed += [rollout.rollout_id for rollout in await stores[2].dequeue_many_rollouts(limit=100)]
    assert claimed == expected


async def test_a_waiter_wakes_for_an_end_elsewhere(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    ids = await enqueue(here, 2)
    waiting = asyncio.ensure_future(here.wait_for_rollouts(rollout_ids=ids))
    for _ in ids:
        await finish(there, await claim(there))
    assert [rollout.status for rollout in await soon(waiting)] == ["succeeded"] * 2


async def test_a_watcher_sees_what_happens_elsewhere(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    (rollout_id,) = await enqueue(here, 1)
    async with aclosing(here.watch_rollouts(rollout_ids=[rollout_id])) as events:
        seen = [await soon(anext(events))]
        claimed = await claim(there)
        seen.append(await soon(anext(events)))
        await there.add_span(make_span(claimed))
        seen.append(await soon(anext(events)))
        await there.update_rollout(rollout_id, metadata={"by": "there"})
        seen.append(await soon(anext(events)))
        await finish(there, claimed)
        seen += [await soon(anext(events))]
        assert await soon(anext(events, None)) is None  # type: ignore[arg-type]
    statuses = [event.rollout.status for event in seen]
    assert statuses == ["queuing", "preparing", "running", "running", "succeeded"]
    assert seen[3].rollout.metadata == {"by": "there"}


async def test_a_watch_goes_on_at_another_server(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    ids = await enqueue(here, 3)
    async with aclosing(here.watch_rollouts(rollout_ids=ids)) as events:
        told = [await soon(anext(events)) for _ in ids]
    known = {event.rollout.rollout_id: event.revision for event in told}
    await here.update_rollout(ids[1], status="cancelled")
    watch = there.watch_rollouts(rollout_ids=ids, after_revision=told[-1].progress_revision)
    async with aclosing(watch) as events:
        while (event := await soon(anext(events))).revision <= known[event.rollout.rollout_id]:
            pass  # a change of the last second may come again: maybe another one was made beside it
        assert (event.rollout.rollout_id, event.rollout.status) == (ids[1], "cancelled")


async def test_a_claim_wakes_for_work_from_elsewhere(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    waiting = [asyncio.ensure_future(here.claim_rollouts(worker_id=f"w-{number}")) for number in range(3)]
    await here.statistics()
    first = await enqueue(there, 2)
    ((done), pending) = await asyncio.wait(
        waiting, timeout=DEADLINE_SECONDS, return_when=asyncio.FIRST_COMPLETED
    )
    assert done
    last = await enqueue(there, 1)
    claims = [(await soon(waiter))[0].rollout_id for waiter in waiting]
    assert sorted(claims) == sorted(first + last)
    assert not pending - set(waiting)


async def test_a_requeued_rollout_wakes_claims_elsewhere(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    config = RolloutConfig(max_attempts=2, retry_condition=["failed"])
    rollout = await there.start_rollout("task", config=config)
    waiting = asyncio.ensure_future(here.claim_rollouts())
    await there.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="failed")
    (claimed,) = await soon(waiting)
    assert (claimed.rollout_id, claimed.attempt.sequence_id) == (rollout.rollout_id, 2)


async def test_a_cancel_reaches_the_worker_of_another_server(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    await hears(here, there)
    rollout = await here.start_rollout("task", worker_id="w-1")
    listening = asyncio.ensure_future(here.receive_commands("w-1"))
    await here.statistics()
    await there.update_rollout(rollout.rollout_id, status="cancelled")
    (command,) = await soon(listening)
    assert command == CancelAttempt(
        rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, status="cancelled"
    )


async def test_new_resources_reach_the_workers_of_another_server(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    await hears(here, there)
    listening = asyncio.ensure_future(here.receive_commands("w-1"))
    await here.statistics()
    update = await there.add_resources({"llm": LLM(endpoint="http://localhost", model="m")})
    assert list(await soon(listening)) == [ResourcesChanged(resources_id=update.resources_id, version=1)]


async def test_commands_reach_workers_wherever_they_listen(open_store: Opener) -> None:
    stores = [await open_store() for _ in range(3)]
    await hears(stores[1], stores[0])
    await hears(stores[2], stores[0])
    assert await stores[0].send_command(Stop(), "w-1") == 0  # nobody listens yet
    listening = [asyncio.ensure_future(store.receive_commands("w-1")) for store in stores[1:]]
    other = asyncio.ensure_future(stores[2].receive_commands("w-2"))
    for store in stores:
        await store.statistics()
    drain = Drain(reason="maintenance")
    assert await soon(stores[0].send_command(drain, "w-1")) == 2
    assert [list(await soon(waiter)) for waiter in listening] == [[drain], [drain]]
    assert await soon(stores[1].send_command(Stop(reason="all"))) == 3
    assert list(await soon(other)) == [Stop(reason="all")]


async def test_the_deadlines_of_a_server_that_is_gone_are_kept(open_store: Opener) -> None:
    here, there = await open_store(), await open_store()
    rollout = await there.start_rollout("task", config=RolloutConfig(timeout_seconds=0.5))
    await there.close()
    (ended,) = await soon(here.wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
    latest = await here.get_latest_attempt(rollout.rollout_id)
    assert latest is not None
    assert (ended.status, latest.status) == ("failed", "timeout")


async def test_spans_from_two_servers_are_numbered_without_gap_and_stored_once(open_store: Opener) -> None:
    stores = [await open_store(), await open_store()]
    rollout = await stores[0].start_rollout("task")
    spans = [[make_span(rollout) for _ in range(5)] for _ in range(20)]
    everywhere = [(store, batch) for batch in spans for store in stores]
    stored = await soon(asyncio.gather(*(store.add_many_spans(batch) for store, batch in everywhere)))
    ids = [span.span_id for batch in stored for span in batch]
    assert sorted(ids) == sorted(span.span_id for batch in spans for span in batch)
    found = await stores[1].query_spans(rollout.rollout_id)
    assert sorted(span.span_id for span in found) == sorted(ids)
    numbers = [span.sequence_id for span in found]
    assert len(set(numbers)) == len(numbers)


async def test_spans_of_an_attempt_that_began_elsewhere_are_taken(open_store: Opener) -> None:
    """By the server that had the attempt before."""
    here, there = await open_store(), await open_store()
    config = RolloutConfig(max_attempts=2, retry_condition=["failed"])
    rollout = await here.start_rollout("task", config=config)
    await here.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="failed")
    retry = await claim(there)
    spans = [make_span(retry) for _ in range(2)]
    assert [await store.add_span(span) for store, span in zip((there, here), spans, strict=True)] == [
        span.model_copy(update={"sequence_id": number}) for number, span in enumerate(spans, start=1)
    ]
    assert await there.add_span(spans[1]) is None


async def test_a_span_that_another_server_stored_is_a_duplicate(open_store: Opener) -> None:
    """Also at a server that remembers what it stored for the attempt before."""
    here, there = await open_store(), await open_store()
    rollout = await here.start_rollout("task")
    first, second, third = [make_span(rollout) for _ in range(3)]
    assert [span.sequence_id for span in await here.add_many_spans([first])] == [1]
    assert [span.sequence_id for span in await there.add_many_spans([second])] == [2]
    assert [span.sequence_id for span in await here.add_many_spans([second, third])] == [3]
    assert await there.add_span(third) is None
    other = await here.start_rollout("task")
    # with a sequence id of its own, the attempt's last one stays as it is
    spans = [make_span(other), make_span(other).model_copy(update={"sequence_id": 1})]
    assert await here.add_span(spans[0]) is not None
    assert await there.add_span(spans[1]) is not None
    assert await here.add_span(spans[1]) is None
    assert len(await here.query_spans(other.rollout_id)) == 2


async def test_sequence_ids_from_two_servers_are_never_the_same(open_store: Opener) -> None:
    stores = [await open_store(), await open_store()]
    rollout = await stores[0].start_rollout("task")
    keys = [(rollout.rollout_id, rollout.attempt.attempt_id)] * 3
    parts = await soon(
        asyncio.gather(*(stores[number % 2].get_many_span_sequence_ids(keys) for number in range(40)))
    )
    assert sorted(number for part in parts for number in part) == list(range(1, 121))


async def test_versions_published_by_two_servers_are_all_kept(open_store: Opener) -> None:
    stores = [await open_store(), await open_store()]
    first = await stores[0].add_resources({"llm": LLM(endpoint="http://localhost", model="0")})
    updates = await soon(
        asyncio.gather(
            *(
                stores[number % 2].update_resources(
                    first.resources_id, {"llm": LLM(endpoint="http://localhost", model=str(number))}
                )
                for number in range(20)
            )
        )
    )
    assert sorted(update.version for update in updates) == list(range(2, 22))
    for update in updates:
        assert await stores[0].get_resources_by_id(update.resources_id, update.version) == update
    latest = await stores[1].get_latest_resources()
    assert latest is not None
    assert latest.version == 21


async def test_no_change_of_a_worker_is_lost(open_store: Opener) -> None:
    stores = [await open_store(), await open_store()]
    await enqueue(stores[0], 20)
    claims = await soon(asyncio.gather(*(claim(stores[number % 2], "w-1") for number in range(20))))
    await soon(asyncio.gather(*(finish(stores[n % 2], rollout) for n, rollout in enumerate(claims[1:]))))
    (worker,) = await stores[0].query_workers()
    assert (worker.status, worker.current_rollout_id) == ("busy", claims[0].rollout_id)


async def test_partitions_see_nothing_of_each_other(open_store: Opener, partition: str) -> None:
    mine, other = await open_store(), await open_store(f"{partition}-other")
    rollout = await mine.start_rollout("task", worker_id="w-1", config=RolloutConfig(timeout_seconds=1e6))
    await mine.add_span(make_span(rollout))
    await enqueue(mine, 1)
    update = await mine.add_resources({"llm": LLM(endpoint="http://localhost", model="m")})
    assert await other.dequeue_rollout() is None
    assert await other.get_rollout_by_id(rollout.rollout_id) is None
    assert list(await other.query_rollouts()) == list(await other.query_workers()) == []
    assert list(await other.query_resources(resources_id=update.resources_id)) == []
    assert await other.get_latest_resources() is None
    with pytest.raises(ValueError, match=rollout.rollout_id):
        await other.add_span(make_span(rollout))
    statistics = await other.statistics()
    assert {name: value for name, value in statistics.items() if name.startswith("total")} == {
        "total_rollouts": 0,
        "total_attempts": 0,
        "total_spans": 0,
        "total_resources": 0,
        "total_workers": 0,
        "total_span_bytes": 0,
    }


async def test_a_claim_given_up_leaves_the_rollout_to_others(open_store: Opener) -> None:
    """Whenever a claim is cancelled, the rollout is either claimed or still in the queue, and nobody waits in vain."""
    store = await open_store()
    for steps in range(12):
        (rollout_id,) = await enqueue(store, 1)
        giving_up = asyncio.ensure_future(store.dequeue_rollout())
        for _ in range(steps * 3):
            await asyncio.sleep(0)
        giving_up.cancel()
        later = await soon(store.dequeue_rollout())
        rollout = await store.get_rollout_by_id(rollout_id)
        assert rollout is not None
        assert rollout.status == "preparing"
        assert later is None or later.rollout_id == rollout_id
        await asyncio.gather(giving_up, return_exceptions=True)
