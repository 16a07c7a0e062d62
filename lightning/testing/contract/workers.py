"""Workers: their status is derived from what they did."""

from __future__ import annotations

from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import StoreTheme, claim
from lightning.testing.records import make_span
from lightning.types import AttemptRef, CancelAttempt, RolloutConfig, Worker, WorkerHeartbeat


async def worker_of(store: LightningStore, worker_id: str) -> Worker:
    """`get_worker_by_id`, where there must be one."""
    worker = await store.get_worker_by_id(worker_id)
    assert worker is not None
    return worker


def held(worker: Worker) -> tuple[str, str | None, str | None]:
    """What a worker does: its status, rollout and attempt."""
    return worker.status, worker.current_rollout_id, worker.current_attempt_id


class WorkerContract(StoreTheme):
    """`update_worker`, `get_worker_by_id`, and what claims and results do to workers."""

    async def test_nobody_knows_a_worker_that_did_nothing(self, store: LightningStore) -> None:
        assert await store.get_worker_by_id("w-1") is None

    async def test_a_heartbeat_makes_a_worker(self, store: LightningStore) -> None:
        worker = await store.update_worker("w-1", {"cpu": 0.5})
        assert (worker.worker_id, worker.heartbeat_stats) == ("w-1", {"cpu": 0.5})
        assert held(worker) == ("unknown", None, None)
        assert worker.last_heartbeat_time is not None
        assert (worker.last_dequeue_time, worker.last_busy_time, worker.last_idle_time) == (None, None, None)
        assert await worker_of(store, "w-1") == worker

    async def test_a_heartbeat_changes_no_status(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        before = await worker_of(store, "w-1")
        after = await store.update_worker("w-1")
        assert after.last_heartbeat_time is not None
        assert after == before.model_copy(update={"last_heartbeat_time": after.last_heartbeat_time})
        assert held(after) == ("busy", started.rollout_id, started.attempt.attempt_id)

    async def test_claiming_makes_busy_and_finishing_idle(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout("task")
        claimed = await claim(store, worker_id="w-1")
        busy = await worker_of(store, "w-1")
        assert held(busy) == ("busy", rollout.rollout_id, claimed.attempt.attempt_id)
        assert None not in (busy.last_dequeue_time, busy.last_busy_time)
        assert (busy.last_idle_time, busy.last_heartbeat_time) == (None, None)
        await store.add_span(make_span(claimed))
        assert held(await worker_of(store, "w-1")) == held(busy)
        await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
        idle = await worker_of(store, "w-1")
        assert held(idle) == ("idle", None, None)
        assert idle.last_idle_time is not None
        assert idle.last_busy_time == busy.last_busy_time

    async def test_starting_makes_busy(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        worker = await worker_of(store, "w-1")
        assert held(worker) == ("busy", started.rollout_id, started.attempt.attempt_id)
        assert worker.last_busy_time is not None
        assert worker.last_dequeue_time is None

    async def test_a_manual_attempt_makes_busy(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout("task")
        started = await store.start_attempt(rollout.rollout_id, worker_id="w-1")
        assert held(await worker_of(store, "w-1")) == (
            "busy",
            rollout.rollout_id,
            started.attempt.attempt_id,
        )

    @pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
    async def test_ending_the_rollout_makes_idle(self, store: LightningStore, status: Any) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        await store.update_rollout(started.rollout_id, status=status)
        assert held(await worker_of(store, "w-1")) == ("idle", None, None)

    async def test_a_failure_that_is_tried_again_makes_idle(self, store: LightningStore) -> None:
        config = RolloutConfig(max_attempts=2, retry_condition=["failed"])
        started = await store.start_rollout("task", config=config, worker_id="w-1")
        await store.update_attempt(started.rollout_id, "latest", status="failed")
        assert held(await worker_of(store, "w-1")) == ("idle", None, None)
        again = await claim(store, worker_id="w-2")
        assert held(await worker_of(store, "w-1")) == ("idle", None, None)
        assert held(await worker_of(store, "w-2")) == ("busy", again.rollout_id, again.attempt.attempt_id)

    async def test_a_worker_is_busy_until_its_last_attempt_ends(self, store: LightningStore) -> None:
        first = await store.start_rollout("task", worker_id="w-1")
        second = await store.start_rollout("task", worker_id="w-1")
        await store.update_attempt(second.rollout_id, "latest", status="succeeded")
        assert held(await worker_of(store, "w-1")) == ("busy", first.rollout_id, first.attempt.attempt_id)
        await store.update_attempt(first.rollout_id, "latest", status="failed")
        assert held(await worker_of(store, "w-1")) == ("idle", None, None)

    async def test_many_claimed_at_once_keep_a_worker_busy(self, store: LightningStore) -> None:
        for n in range(3):
            await store.enqueue_rollout(n)
        claimed = await store.dequeue_many_rollouts(limit=3, worker_id="w-1")
        for rollout in claimed:
            assert (await worker_of(store, "w-1")).status == "busy"
            await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
        assert (await worker_of(store, "w-1")).status == "idle"

    async def test_an_attempt_can_change_hands(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        await store.update_attempt(started.rollout_id, "latest", worker_id="w-2")
        assert held(await worker_of(store, "w-1")) == ("idle", None, None)
        assert held(await worker_of(store, "w-2")) == ("busy", started.rollout_id, started.attempt.attempt_id)
        await store.update_attempt(started.rollout_id, "latest", worker_id=None)
        assert held(await worker_of(store, "w-2")) == ("idle", None, None)

    async def test_one_id_is_one_worker(self, store: LightningStore) -> None:
        await store.update_worker("w-1", {"from": "one"})
        await store.enqueue_rollout("task")
        await claim(store, worker_id="w-1")
        await store.update_worker("w-1", {"from": "another"})
        (worker,) = await store.query_workers()
        assert (worker.worker_id, worker.heartbeat_stats) == ("w-1", {"from": "another"})

    async def test_workers_are_copies(self, store: LightningStore) -> None:
        stats = {"gpus": [1]}
        worker = await store.update_worker("w-1", stats)
        stats["gpus"].append(2)
        for record in (worker, await worker_of(store, "w-1"), (await store.query_workers())[0]):
            assert record.heartbeat_stats == {"gpus": [1]}
            record.heartbeat_stats["gpus"].append(3)
            record.status = "busy"
        assert (await worker_of(store, "w-1")).status == "unknown"

    # --- Heartbeats of worker processes ---

    async def test_a_heartbeat_says_which_attempts_to_give_up(self, store: LightningStore) -> None:
        live = await store.start_rollout("task", worker_id="w-1")
        cancelled = await store.start_rollout("task", worker_id="w-1")
        await store.update_rollout(cancelled.rollout_id, status="cancelled")
        done = await store.start_rollout("task", worker_id="w-1")
        await store.update_attempt(done.rollout_id, "latest", status="succeeded")
        reply = await store.send_heartbeat(
            WorkerHeartbeat(
                worker_id="w-1",
                instance_id="i-1",
                attempts=[
                    AttemptRef(rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id)
                    for rollout in (live, cancelled, done)
                ],
                heartbeat_stats={"cpu": 1},
            )
        )
        assert reply.worker.heartbeat_stats == {"cpu": 1}
        assert reply.worker == await worker_of(store, "w-1")
        assert reply.commands == [
            CancelAttempt(rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, status=status)
            for rollout, status in ((cancelled, "cancelled"), (done, "succeeded"))
        ]

    async def test_a_heartbeat_without_stats_leaves_them(self, store: LightningStore) -> None:
        await store.update_worker("w-1", {"cpu": 1})
        reply = await store.send_heartbeat(WorkerHeartbeat(worker_id="w-1", instance_id="i-1"))
        assert (reply.worker.heartbeat_stats, reply.commands) == ({"cpu": 1}, [])
