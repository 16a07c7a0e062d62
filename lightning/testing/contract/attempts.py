"""Attempts: what may become of them, how the rollout follows its latest one, and that `cancelled` wins."""

from __future__ import annotations

from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import (
    UNKNOWN_ATTEMPT,
    UNKNOWN_ROLLOUT,
    StoreTheme,
    claim,
    everything,
    read,
    refused,
    statuses,
)
from lightning.testing.records import make_span
from lightning.types import Attempt, AttemptedRollout, RolloutConfig

RETRY_FAILED = RolloutConfig(max_attempts=2, retry_condition=["failed"])


async def latest_attempt(store: LightningStore, rollout_id: str) -> Attempt:
    """`get_latest_attempt`, where there must be one."""
    attempt = await store.get_latest_attempt(rollout_id)
    assert attempt is not None
    return attempt


class AttemptContract(StoreTheme):
    """The life of attempts and of rollouts, as far as no time needs to pass."""

    # --- Beginning ---

    async def test_manual_attempts_are_numbered_on(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout("task")
        made = [await store.start_attempt(rollout.rollout_id, worker_id=f"w-{n}") for n in (1, 2, 3)]
        assert [again.attempt.sequence_id for again in made] == [1, 2, 3]
        assert [again.attempt.worker_id for again in made] == ["w-1", "w-2", "w-3"]
        assert all((again.status, again.attempt.status) == ("preparing", "preparing") for again in made)
        assert len({again.attempt.attempt_id for again in made}) == 3
        assert list(await store.query_attempts(rollout.rollout_id)) == [again.attempt for again in made]
        assert await read(store, rollout.rollout_id) == made[-1]

    async def test_a_manual_attempt_needs_no_attempts_left(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", config=RolloutConfig(max_attempts=1))
        assert (await store.start_attempt(started.rollout_id)).attempt.sequence_id == 2

    async def test_a_finished_rollout_can_be_attempted_again(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        await store.update_attempt(started.rollout_id, started.attempt.attempt_id, status="succeeded")
        again = await store.start_attempt(started.rollout_id)
        assert (again.status, again.end_time) == ("preparing", None)
        assert await statuses(store, started.rollout_id) == ("preparing", "succeeded", "preparing")

    async def test_an_attempt_of_an_unknown_rollout_is_refused(self, store: LightningStore) -> None:
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.start_attempt(UNKNOWN_ROLLOUT)

    # --- Ending ---

    async def test_success_ends_both(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        attempt = await store.update_attempt(
            started.rollout_id, started.attempt.attempt_id, status="succeeded"
        )
        rollout = await read(store, started.rollout_id)
        assert (attempt.status, rollout.status) == ("succeeded", "succeeded")
        assert attempt.end_time is not None
        assert rollout.end_time is not None
        assert rollout.end_time >= attempt.end_time >= attempt.start_time
        assert isinstance(rollout, AttemptedRollout)
        assert rollout.attempt == attempt == await latest_attempt(store, started.rollout_id)

    async def test_running_can_be_reported(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        attempt = await store.update_attempt(started.rollout_id, started.attempt.attempt_id, status="running")
        assert (attempt.status, attempt.end_time) == ("running", None)
        assert await statuses(store, started.rollout_id) == ("running", "running")

    async def test_failure_without_retries_fails_the_rollout(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", config=RolloutConfig(max_attempts=3))
        await store.update_attempt(started.rollout_id, "latest", status="failed")
        rollout = await read(store, started.rollout_id)
        assert rollout.status == "failed"
        assert rollout.end_time is not None
        assert await store.dequeue_rollout() is None

    async def test_another_end_than_the_condition_fails_the_rollout(self, store: LightningStore) -> None:
        config = RolloutConfig(max_attempts=3, retry_condition=["timeout", "unresponsive"])
        started = await store.start_rollout("task", config=config)
        await store.update_attempt(started.rollout_id, "latest", status="failed")
        assert (await read(store, started.rollout_id)).status == "failed"

    async def test_failure_is_tried_again_while_attempts_are_left(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", config=RETRY_FAILED)
        await store.update_attempt(started.rollout_id, "latest", status="failed")
        requeued = await read(store, started.rollout_id)
        assert (requeued.status, requeued.end_time) == ("requeuing", None)
        claimed = await claim(store)
        assert (claimed.rollout_id, claimed.attempt.sequence_id) == (started.rollout_id, 2)
        await store.update_attempt(started.rollout_id, "latest", status="failed")
        assert await statuses(store, started.rollout_id) == ("failed", "failed", "failed")
        assert await store.dequeue_rollout() is None

    async def test_success_is_never_tried_again(self, store: LightningStore) -> None:
        config = RolloutConfig(max_attempts=5, retry_condition=["failed", "timeout", "unresponsive"])
        started = await store.start_rollout("task", config=config)
        await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        assert (await read(store, started.rollout_id)).status == "succeeded"
        assert await store.dequeue_rollout() is None

    @pytest.mark.parametrize("end", ["succeeded", "failed"])
    @pytest.mark.parametrize("late", ["succeeded", "failed", "running", "preparing"])
    async def test_a_closed_attempt_stays_as_it_is(self, store: LightningStore, end: Any, late: Any) -> None:
        started = await store.start_rollout("task")
        closed = await store.update_attempt(started.rollout_id, "latest", status=end)
        before = await everything(store)
        assert await store.update_attempt(started.rollout_id, "latest", status=late) == closed
        assert await everything(store) == before

    # --- Latest and earlier ones ---

    @pytest.mark.parametrize("end", ["succeeded", "failed", "running"])
    async def test_only_the_latest_attempt_is_followed(self, store: LightningStore, end: Any) -> None:
        first = await store.start_rollout("task", config=RETRY_FAILED)
        await store.start_attempt(first.rollout_id)
        late = await store.update_attempt(first.rollout_id, first.attempt.attempt_id, status=end)
        assert late.status == end
        assert await statuses(store, first.rollout_id) == ("preparing", end, "preparing")
        assert await store.dequeue_rollout() is None
        await store.update_attempt(first.rollout_id, "latest", status="succeeded")
        assert await statuses(store, first.rollout_id) == ("succeeded", end, "succeeded")

    async def test_latest_means_the_newest_attempt(self, store: LightningStore) -> None:
        first = await store.start_rollout("task")
        second = await store.start_attempt(first.rollout_id)
        updated = await store.update_attempt(first.rollout_id, "latest", metadata={"a": 1})
        assert updated.attempt_id == second.attempt.attempt_id
        assert [attempt.metadata for attempt in await store.query_attempts(first.rollout_id)] == [
            None,
            {"a": 1},
        ]

    # --- Refused ---

    async def test_what_is_unknown_is_named(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        waiting = await store.enqueue_rollout("task")
        other = await store.start_rollout("task")
        before = await everything(store)
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.update_attempt(UNKNOWN_ROLLOUT, "latest", status="succeeded")
        with refused(ValueError, UNKNOWN_ATTEMPT):
            await store.update_attempt(started.rollout_id, UNKNOWN_ATTEMPT, status="succeeded")
        with refused(ValueError, other.attempt.attempt_id):
            await store.update_attempt(started.rollout_id, other.attempt.attempt_id, status="succeeded")
        with refused(ValueError, waiting.rollout_id):
            await store.update_attempt(waiting.rollout_id, "latest", status="succeeded")
        assert await everything(store) == before

    @pytest.mark.parametrize("status", ["cancelled", "requeuing", "done"])
    async def test_a_status_that_cannot_be_reported_is_refused(
        self, store: LightningStore, status: Any
    ) -> None:
        started = await store.start_rollout("task")
        before = await everything(store)
        with refused(ValueError, status):
            await store.update_attempt(started.rollout_id, started.attempt.attempt_id, status=status)
        assert await everything(store) == before


async def rollout_in(store: LightningStore, status: str) -> str:
    """A rollout in this status, by way of its attempts; its id."""
    if status == "queuing":
        return (await store.enqueue_rollout("task")).rollout_id
    started = await store.start_rollout("task", config=RETRY_FAILED)
    if status == "running":
        await store.add_span(make_span(started))
    elif status == "succeeded":
        await store.update_attempt(started.rollout_id, "latest", status="succeeded")
    elif status in ("requeuing", "failed"):
        await store.update_attempt(started.rollout_id, "latest", status="failed")
        if status == "failed":
            await claim(store)
            await store.update_attempt(started.rollout_id, "latest", status="failed")
    assert (await read(store, started.rollout_id)).status == status
    return started.rollout_id


FINAL = ["succeeded", "failed", "cancelled"]
NOT_CANCELLED = ["queuing", "preparing", "running", "requeuing", "succeeded", "failed"]


class CancelContract(StoreTheme):
    """Ending a rollout by hand, and that nothing undoes a cancellation."""

    @pytest.mark.parametrize("status", FINAL)
    async def test_ending_a_rollout_closes_its_open_attempt(self, store: LightningStore, status: Any) -> None:
        started = await store.start_rollout("task", config=RETRY_FAILED)
        rollout = await store.update_rollout(started.rollout_id, status=status)
        attempt = await latest_attempt(store, started.rollout_id)
        assert (rollout.status, attempt.status) == (status, status)
        assert attempt.end_time is not None
        assert rollout.end_time is not None
        assert rollout.end_time >= attempt.end_time >= attempt.start_time
        assert isinstance(rollout, AttemptedRollout)
        assert rollout.attempt == attempt

    @pytest.mark.parametrize("status", FINAL)
    async def test_ending_a_rollout_leaves_closed_attempts_as_they_are(
        self, store: LightningStore, status: Any
    ) -> None:
        started = await store.start_rollout("task", config=RETRY_FAILED)
        closed = await store.update_attempt(started.rollout_id, "latest", status="failed")
        await store.update_rollout(started.rollout_id, status=status)
        assert await latest_attempt(store, started.rollout_id) == closed
        assert await store.dequeue_rollout() is None

    @pytest.mark.parametrize("status", NOT_CANCELLED)
    async def test_every_rollout_can_be_cancelled(self, store: LightningStore, status: str) -> None:
        rollout_id = await rollout_in(store, status)
        cancelled = await store.update_rollout(rollout_id, status="cancelled")
        assert cancelled.status == "cancelled"
        assert cancelled.end_time is not None
        assert await store.dequeue_rollout() is None
        assert await read(store, rollout_id) == cancelled

    async def test_cancelling_twice_is_fine(self, store: LightningStore) -> None:
        rollout_id = await rollout_in(store, "running")
        cancelled = await store.update_rollout(rollout_id, status="cancelled")
        assert await store.update_rollout(rollout_id, status="cancelled") == cancelled

    @pytest.mark.parametrize("status", NOT_CANCELLED)
    async def test_once_cancelled_always_cancelled(self, store: LightningStore, status: Any) -> None:
        rollout_id = await rollout_in(store, "running")
        await store.update_rollout(rollout_id, status="cancelled")
        before = await everything(store)
        with refused(ValueError, rollout_id):
            await store.update_rollout(rollout_id, status=status, metadata={"a": 1})
        assert await everything(store) == before

    async def test_a_cancelled_rollout_gets_no_attempt(self, store: LightningStore) -> None:
        rollout_id = await rollout_in(store, "queuing")
        await store.update_rollout(rollout_id, status="cancelled")
        with refused(ValueError, rollout_id):
            await store.start_attempt(rollout_id)
        assert await statuses(store, rollout_id) == ("cancelled",)

    @pytest.mark.parametrize("late", ["running", "succeeded", "failed"])
    async def test_a_result_after_the_cancellation_changes_nothing(
        self, store: LightningStore, late: Any
    ) -> None:
        rollout_id = await rollout_in(store, "running")
        await store.update_rollout(rollout_id, status="cancelled")
        before = await everything(store)
        assert (await store.update_attempt(rollout_id, "latest", status=late)).status == "cancelled"
        assert await everything(store) == before

    async def test_a_span_after_the_cancellation_changes_no_status(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        cancelled = await store.update_rollout(started.rollout_id, status="cancelled")
        assert await store.add_span(make_span(started)) is not None
        assert await statuses(store, started.rollout_id) == ("cancelled", "cancelled")
        assert (await read(store, started.rollout_id)).end_time == cancelled.end_time
        assert len(await store.query_spans(started.rollout_id)) == 1

    async def test_other_fields_of_a_cancelled_rollout_can_change(self, store: LightningStore) -> None:
        rollout_id = await rollout_in(store, "running")
        await store.update_rollout(rollout_id, status="cancelled")
        updated = await store.update_rollout(rollout_id, metadata={"why": "no longer needed"})
        assert (updated.status, updated.metadata) == ("cancelled", {"why": "no longer needed"})

    async def test_what_was_ended_by_hand_follows_no_late_result(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", config=RETRY_FAILED)
        await store.update_rollout(started.rollout_id, status="succeeded")
        await store.update_attempt(started.rollout_id, started.attempt.attempt_id, status="failed")
        assert await statuses(store, started.rollout_id) == ("succeeded", "succeeded")
        assert await store.dequeue_rollout() is None
