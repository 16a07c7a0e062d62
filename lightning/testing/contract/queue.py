"""The queue: first in, first out, each rollout to one caller, and in it exactly while its status says so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import StoreTheme, claim, drain, read, refused, statuses, until_idle
from lightning.types import AttemptedRollout, EnqueueRolloutRequest, RolloutConfig

RETRY_TWICE = RolloutConfig(max_attempts=3, retry_condition=["failed"])
OUT_OF_QUEUE = ["preparing", "running", "succeeded", "failed", "cancelled"]
IN_QUEUE = ["queuing", "requeuing"]


async def enqueue(store: LightningStore, count: int, **arguments: Any) -> list[str]:
    """Enqueue `count` rollouts; their ids."""
    return [(await store.enqueue_rollout(index, **arguments)).rollout_id for index in range(count)]


class QueueContract(StoreTheme):
    """Claiming work."""

    async def test_a_claim_makes_the_next_attempt(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout("task", mode="train", metadata={"a": 1})
        claimed = await claim(store, worker_id="w-1")
        assert isinstance(claimed, AttemptedRollout)
        assert (claimed.rollout_id, claimed.status, claimed.input) == (
            rollout.rollout_id,
            "preparing",
            "task",
        )
        assert (claimed.mode, claimed.metadata, claimed.start_time) == ("train", {"a": 1}, rollout.start_time)
        attempt = claimed.attempt
        assert (attempt.rollout_id, attempt.sequence_id) == (rollout.rollout_id, 1)
        assert (attempt.status, attempt.worker_id, attempt.end_time) == ("preparing", "w-1", None)
        assert await read(store, rollout.rollout_id) == claimed
        assert await store.get_latest_attempt(rollout.rollout_id) == attempt

    async def test_a_claim_may_be_anonymous(self, store: LightningStore) -> None:
        await store.enqueue_rollout("task")
        assert (await claim(store)).attempt.worker_id is None
        assert list(await store.query_workers()) == []

    async def test_the_oldest_comes_first(self, store: LightningStore) -> None:
        ids = await enqueue(store, 5)
        assert await drain(store) == ids

    async def test_many_enqueued_at_once_come_in_their_order(self, store: LightningStore) -> None:
        first = await store.enqueue_rollout("first")
        many = await store.enqueue_many_rollouts(
            [_request(index) for index in range(5)],
        )
        last = await store.enqueue_rollout("last")
        expected = [first.rollout_id, *(rollout.rollout_id for rollout in many), last.rollout_id]
        assert await drain(store) == expected

    async def test_an_empty_queue_yields_nothing_at_once(self, store: LightningStore) -> None:
        assert await self.soon(store.dequeue_rollout()) is None
        assert list(await self.soon(store.dequeue_many_rollouts(limit=3))) == []
        await store.enqueue_rollout("task")
        await claim(store)
        assert await self.soon(store.dequeue_rollout(worker_id="w-1")) is None

    async def test_many_are_claimed_up_to_the_limit(self, store: LightningStore) -> None:
        ids = await enqueue(store, 5)
        assert list(await store.dequeue_many_rollouts(limit=0)) == []
        two = await store.dequeue_many_rollouts(limit=2, worker_id="w-1")
        rest = await store.dequeue_many_rollouts(limit=10)
        assert [rollout.rollout_id for rollout in (*two, *rest)] == ids
        assert [rollout.attempt.worker_id for rollout in (*two, *rest)] == ["w-1", "w-1", None, None, None]
        assert all(r.status == r.attempt.status == "preparing" for r in (*two, *rest))

    async def test_a_generous_limit_costs_nothing(self, store: LightningStore) -> None:
        ids = await enqueue(store, 3)
        claimed = await self.soon(store.dequeue_many_rollouts(limit=1_000_000_000))
        assert [rollout.rollout_id for rollout in claimed] == ids

    async def test_without_a_limit_one_is_claimed(self, store: LightningStore) -> None:
        ids = await enqueue(store, 2)
        assert [rollout.rollout_id for rollout in await store.dequeue_many_rollouts()] == ids[:1]

    async def test_a_negative_limit_is_refused(self, store: LightningStore) -> None:
        ids = await enqueue(store, 1)
        with refused(ValueError, "limit", "-1"):
            await store.dequeue_many_rollouts(limit=-1)
        assert await drain(store) == ids

    async def test_no_rollout_is_handed_to_two_callers(self, store: LightningStore) -> None:
        ids = await enqueue(store, 60)

        async def work(number: int) -> list[str]:
            mine: list[str] = []
            while claimed := await store.dequeue_many_rollouts(limit=1 + number % 3, worker_id=f"w-{number}"):
                mine.extend(rollout.rollout_id for rollout in claimed)
            return mine

        claims = await self.soon(asyncio.gather(*(work(number) for number in range(16))))
        assert sorted(rollout_id for mine in claims for rollout_id in mine) == sorted(ids)
        for rollout_id in ids:
            assert len(await store.query_attempts(rollout_id)) == 1

    async def test_one_that_is_tried_again_goes_to_the_tail(self, store: LightningStore) -> None:
        first, second, third = await enqueue(store, 3, config=RETRY_TWICE)
        await claim(store)
        await store.update_attempt(first, "latest", status="failed")
        assert await statuses(store, first) == ("requeuing", "failed")
        fourth = (await store.enqueue_rollout("late")).rollout_id
        assert await drain(store) == [second, third, first, fourth]
        assert await statuses(store, first) == ("preparing", "failed", "preparing")
        latest = await store.get_latest_attempt(first)
        assert latest is not None
        assert latest.sequence_id == 2

    async def test_a_started_rollout_is_outside_the_queue(self, store: LightningStore) -> None:
        await store.start_rollout("task")
        assert await store.dequeue_rollout() is None

    async def test_a_manual_attempt_takes_it_out(self, store: LightningStore) -> None:
        first, second = await enqueue(store, 2)
        await store.start_attempt(first)
        assert await drain(store) == [second]
        assert await statuses(store, first) == ("preparing", "preparing")

    @pytest.mark.parametrize("status", OUT_OF_QUEUE)
    async def test_an_update_takes_it_out(self, store: LightningStore, status: Any) -> None:
        first, second = await enqueue(store, 2)
        await store.update_rollout(first, status=status)
        assert await drain(store) == [second]
        assert await statuses(store, first) == (status,)

    @pytest.mark.parametrize("status", IN_QUEUE)
    async def test_an_update_puts_it_back_once(self, store: LightningStore, status: Any) -> None:
        first, second = await enqueue(store, 2)
        await store.update_rollout(first, status="running")
        returned = await store.update_rollout(first, status=status)
        assert returned.status == status
        await store.update_rollout(first, status=status)
        assert await drain(store) == [second, first]

    @pytest.mark.parametrize("status", IN_QUEUE)
    async def test_an_update_within_the_queue_keeps_the_place(
        self, store: LightningStore, status: Any
    ) -> None:
        first, second = await enqueue(store, 2)
        await store.update_rollout(first, status=status)
        await store.update_rollout(first, metadata={"touched": True})
        assert await drain(store) == [first, second]

    @pytest.mark.parametrize("ended_as", ["succeeded", "failed"])
    async def test_a_finished_one_can_be_queued_again(self, store: LightningStore, ended_as: Any) -> None:
        (rollout_id,) = await enqueue(store, 1)
        await claim(store)
        ended = await store.update_rollout(rollout_id, status=ended_as)
        assert ended.end_time is not None
        queued = await store.update_rollout(rollout_id, status="queuing")
        assert (queued.status, queued.end_time) == ("queuing", None)
        again = await claim(store)
        assert (again.rollout_id, again.attempt.sequence_id) == (rollout_id, 2)
        assert await store.dequeue_rollout() is None

    async def test_a_result_takes_a_queued_one_out(self, store: LightningStore) -> None:
        first, second = await enqueue(store, 2)
        claimed = await claim(store)
        await store.update_rollout(first, status="requeuing")
        await store.update_attempt(first, claimed.attempt.attempt_id, status="succeeded")
        assert (await read(store, first)).status == "succeeded"
        assert await drain(store) == [second]

    # --- Waiting for work ---

    async def test_waiting_work_is_claimed_at_once(self, store: LightningStore) -> None:
        ids = await enqueue(store, 3)
        two = await self.soon(store.claim_rollouts(limit=2, worker_id="w-1"))
        assert [rollout.rollout_id for rollout in two] == ids[:2]
        assert [rollout.attempt.worker_id for rollout in two] == ["w-1", "w-1"]
        more = await self.soon(store.claim_rollouts(limit=5, worker_id="w-1", instance_id="i-1"))
        assert [rollout.rollout_id for rollout in more] == ids[2:]

    async def test_a_claim_that_may_not_wait_comes_back_empty(self, store: LightningStore) -> None:
        assert list(await self.soon(store.claim_rollouts(worker_id="w-1", timeout=0))) == []

    async def test_a_claim_waits_for_work(self, store: LightningStore) -> None:
        waiters = [
            asyncio.ensure_future(store.claim_rollouts(worker_id=f"w-{number}")) for number in range(4)
        ]
        await until_idle(store)
        ids = await enqueue(store, 2)
        ids += [
            rollout.rollout_id for rollout in await store.enqueue_many_rollouts([_request(0), _request(1)])
        ]
        claims = await self.soon(asyncio.gather(*waiters))
        assert [len(claimed) for claimed in claims] == [1, 1, 1, 1]
        assert sorted(claimed[0].rollout_id for claimed in claims) == sorted(ids)

    async def test_a_claim_is_woken_by_what_comes_back(self, store: LightningStore) -> None:
        (rollout_id,) = await enqueue(store, 1, config=RETRY_TWICE)
        await claim(store)
        waiter = asyncio.ensure_future(store.claim_rollouts(worker_id="w-1"))
        await until_idle(store)
        await store.update_attempt(rollout_id, "latest", status="failed")
        (claimed,) = await self.soon(waiter)
        assert (claimed.rollout_id, claimed.attempt.sequence_id) == (rollout_id, 2)

    async def test_a_cancelled_wait_takes_no_work_with_it(self, store: LightningStore) -> None:
        waiters = [asyncio.ensure_future(store.claim_rollouts()) for _ in range(3)]
        await until_idle(store)
        for waiter in waiters[:2]:
            waiter.cancel()
        await asyncio.gather(*waiters[:2], return_exceptions=True)
        (rollout_id,) = await enqueue(store, 1)
        (claimed,) = await self.soon(waiters[2])
        assert claimed.rollout_id == rollout_id

    @pytest.mark.parametrize(
        ("arguments", "mentions"),
        [({"limit": 0}, "limit"), ({"timeout": -1.0}, "timeout"), ({"timeout": float("nan")}, "timeout")],
    )
    async def test_a_claim_that_means_nothing_is_refused(
        self, store: LightningStore, arguments: dict[str, Any], mentions: str
    ) -> None:
        with refused(ValueError, mentions):
            await self.soon(store.claim_rollouts(**arguments))


def _request(index: int) -> EnqueueRolloutRequest:
    return EnqueueRolloutRequest(input=index)
