"""Deadlines in real time, for stores that take no clock: short limits, and waiting for what must happen."""

from __future__ import annotations

import asyncio

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import StoreTheme, statuses
from lightning.testing.records import make_span
from lightning.types import RolloutConfig

LIMIT_SECONDS = 0.1


class RealTimeContract(StoreTheme):
    """What `DeadlineContract` shows exactly, shown as far as it can be without moving time."""

    async def test_an_attempt_times_out_by_itself(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", config=RolloutConfig(timeout_seconds=LIMIT_SECONDS))
        (rollout,) = await self.soon(store.wait_for_rollouts(rollout_ids=[started.rollout_id]))
        assert rollout.status == "failed"
        attempt = await store.get_latest_attempt(started.rollout_id)
        assert attempt is not None
        assert attempt.status == "timeout"
        assert attempt.end_time is not None
        assert attempt.end_time - attempt.start_time > LIMIT_SECONDS

    async def test_a_silent_attempt_is_tried_again_by_itself(self, store: LightningStore) -> None:
        config = RolloutConfig(
            unresponsive_seconds=LIMIT_SECONDS, max_attempts=2, retry_condition=["unresponsive"]
        )
        started = await store.start_rollout("task", config=config)
        (claimed,) = await self.soon(store.claim_rollouts(worker_id="w-1"))
        assert (claimed.rollout_id, claimed.attempt.sequence_id) == (started.rollout_id, 2)
        first, _ = await store.query_attempts(started.rollout_id)
        assert first.status == "unresponsive"

    async def test_a_span_revives_what_fell_silent(self, store: LightningStore) -> None:
        config = RolloutConfig(unresponsive_seconds=LIMIT_SECONDS)
        started = await store.start_rollout("task", config=config)
        await self.soon(store.wait_for_rollouts(rollout_ids=[started.rollout_id]))
        await store.update_rollout(
            started.rollout_id, config=RolloutConfig()
        )  # it must not fall silent again
        await store.add_span(make_span(started))
        assert await statuses(store, started.rollout_id) == ("running", "running")

    async def test_waiting_ends_when_the_time_is_up(self, store: LightningStore) -> None:
        ids = [(await store.start_rollout("task")).rollout_id for _ in range(2)]
        await store.update_attempt(ids[1], "latest", status="succeeded")
        found = await self.soon(store.wait_for_rollouts(rollout_ids=ids, timeout=LIMIT_SECONDS))
        assert [rollout.rollout_id for rollout in found] == ids[1:]

    async def test_waiting_for_work_ends_when_the_time_is_up(self, store: LightningStore) -> None:
        assert list(await self.soon(store.claim_rollouts(timeout=LIMIT_SECONDS))) == []
        waiter = asyncio.ensure_future(store.claim_rollouts(timeout=self.deadline_seconds))
        rollout = await store.enqueue_rollout("task")
        assert [claimed.rollout_id for claimed in await self.soon(waiter)] == [rollout.rollout_id]
