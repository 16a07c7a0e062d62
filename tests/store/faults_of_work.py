"""Faults in how work is handed out, how it ends, and what time does to it."""

from __future__ import annotations

import uuid
from itertools import islice
from typing import Any

from planting import Patch, caught_by, change_config, change_deadlines, revive, silence

from lightning.store import idempotency, lifecycle, reading, records
from lightning.store.contract import TERMINAL_ATTEMPT_STATUSES
from lightning.store.engine import StoreEngine
from lightning.store.mailbox import WorkerMailboxes
from lightning.store.persistence.memory import MemoryPersistence
from lightning.store.watchdog import Watchdog

# --- The queue -------------------------------------------------------------------------------------------------


@caught_by("test_the_oldest_comes_first", "test_many_enqueued_at_once_come_in_their_order")
def the_newest_is_handed_out_first(patch: Patch) -> None:
    async def claim(self: Any, limit: int, transition: Any, settle: Any = None) -> Any:
        heads = list(islice(reversed(self._queue.values()), limit))
        return [self._replace(entry, transition(entry.record, n), settle) for n, entry in enumerate(heads)]

    patch.setattr(MemoryPersistence, "claim_rollouts", claim)


@caught_by("test_no_rollout_is_handed_to_two_callers", "test_the_oldest_comes_first")
def a_claimed_rollout_stays_in_the_queue(patch: Patch) -> None:
    original = MemoryPersistence.claim_rollouts

    async def claim(self: Any, limit: int, transition: Any, settle: Any = None) -> Any:
        changes = await original(self, limit, transition, settle)
        for change in changes:
            self._queue.pop(change.after.rollout_id, None)
            if len(change.after.attempts) == 1:
                self._queue[change.after.rollout_id] = self._rollouts[change.after.rollout_id]
        return changes

    patch.setattr(MemoryPersistence, "claim_rollouts", claim)


@caught_by("test_one_that_is_tried_again_goes_to_the_tail")
def a_retry_jumps_the_queue(patch: Patch) -> None:
    original = MemoryPersistence._index

    def index(self: Any, entry: Any, before: Any) -> None:
        original(self, entry, before)
        if before is not None and entry.record.status == "requeuing":
            self._queue.move_to_end(entry.record.rollout_id, last=False)

    patch.setattr(MemoryPersistence, "_index", index)


@caught_by("test_an_update_within_the_queue_keeps_the_place")
def an_update_loses_the_place_in_the_queue(patch: Patch) -> None:
    original = MemoryPersistence._index

    def index(self: Any, entry: Any, before: Any) -> None:
        original(self, entry, before)
        if before is not None and lifecycle.is_queued(entry.record):
            self._queue.move_to_end(entry.record.rollout_id)

    patch.setattr(MemoryPersistence, "_index", index)


@caught_by(
    "test_an_update_takes_it_out",
    "test_every_rollout_can_be_cancelled",
    "test_a_manual_attempt_takes_it_out",
    "test_a_first_span_takes_a_rollout_out_of_the_queue",
)
def what_leaves_the_queue_is_handed_out_all_the_same(patch: Patch) -> None:
    index, claim = MemoryPersistence._index, MemoryPersistence.claim_rollouts

    def keep_in(self: Any, entry: Any, before: Any) -> None:
        was_in = entry.record.rollout_id in self._queue
        index(self, entry, before)
        if was_in:
            self._queue[entry.record.rollout_id] = entry

    async def take_out(self: Any, limit: int, transition: Any, settle: Any = None) -> Any:
        changes = await claim(self, limit, transition, settle)
        for change in changes:
            self._queue.pop(change.after.rollout_id, None)
        return changes

    patch.setattr(MemoryPersistence, "_index", keep_in)
    patch.setattr(MemoryPersistence, "claim_rollouts", take_out)


@caught_by("test_an_update_puts_it_back_once", "test_a_finished_one_can_be_queued_again")
def what_is_queued_again_is_never_handed_out(patch: Patch) -> None:
    original = MemoryPersistence._index

    def index(self: Any, entry: Any, before: Any) -> None:
        original(self, entry, before)
        if before is not None and not lifecycle.is_queued(before):
            self._queue.pop(entry.record.rollout_id, None)

    patch.setattr(MemoryPersistence, "_index", index)


@caught_by("test_a_claim_waits_for_work", "test_a_claim_is_woken_by_what_comes_back")
def nobody_is_told_of_new_work(patch: Patch) -> None:
    silence(patch, lambda topic: topic == "queue")


@caught_by("test_many_are_created_all_or_none")
def many_are_enqueued_one_by_one(patch: Patch) -> None:
    original = StoreEngine.enqueue_many_rollouts

    async def enqueue_many(self: Any, rollouts: Any) -> Any:
        return [(await original(self, [request]))[0] for request in rollouts]

    patch.setattr(StoreEngine, "enqueue_many_rollouts", enqueue_many)


@caught_by("test_a_generous_limit_costs_nothing")
def a_claim_prepares_for_its_limit(patch: Patch) -> None:
    def ids(prefix: str) -> Any:
        made = [f"{prefix}-{uuid.uuid4().hex}" for _ in range(1000)]
        return made.__getitem__

    original = StoreEngine._claim

    async def claim(self: Any, limit: int, *args: Any) -> Any:
        assert limit < 1_000_000, "out of memory"
        return await original(self, limit, *args)

    patch.setattr(idempotency, "id_source", ids)
    patch.setattr(StoreEngine, "_claim", claim)


# --- Attempts and their rollouts -------------------------------------------------------------------------------


@caught_by("test_manual_attempts_are_numbered_on", "test_one_that_is_tried_again_goes_to_the_tail")
def every_attempt_is_the_first(patch: Patch) -> None:
    original = records.AttemptRecord.to_attempt
    patch.setattr(
        records.AttemptRecord,
        "to_attempt",
        lambda self, rollout_id: original(self, rollout_id).model_copy(update={"sequence_id": 1}),
    )


@caught_by("test_only_the_latest_attempt_is_followed", "test_a_span_of_an_earlier_attempt_moves_only_that")
def the_rollout_follows_any_attempt(patch: Patch) -> None:
    def with_attempt(record: Any, old: Any, new: Any, now: float) -> Any:
        after = record._replace(attempts=lifecycle._swap(record.attempts, old, new))
        return lifecycle._follow(after, new, now) if new.status != old.status else after

    patch.setattr(lifecycle, "_with_attempt", with_attempt)


@caught_by("test_success_ends_both", "test_running_can_be_reported", "test_the_first_span_sets_it_running")
def the_rollout_follows_no_attempt(patch: Patch) -> None:
    patch.setattr(lifecycle, "_follow", lambda record, attempt, now: record)


@caught_by(
    "test_a_closed_attempt_stays_as_it_is",
    "test_a_result_after_the_cancellation_changes_nothing",
    "test_a_result_after_the_timeout_changes_nothing",
    "test_what_was_ended_by_hand_follows_no_late_result",
)
def a_late_result_counts(patch: Patch) -> None:
    patch.setattr(lifecycle, "_may_become", lambda record, attempt, status: True)


@caught_by("test_a_result_of_a_silent_attempt_still_counts")
def a_result_of_a_silent_attempt_is_lost(patch: Patch) -> None:
    patch.setattr(
        lifecycle,
        "_may_become",
        lambda record, attempt, status: attempt.status not in TERMINAL_ATTEMPT_STATUSES,
    )


@caught_by("test_failure_is_tried_again_while_attempts_are_left", "test_an_expired_attempt_is_tried_again")
def retries_are_not_counted(patch: Patch) -> None:
    change_config(patch, max_attempts=99)


@caught_by(
    "test_failure_without_retries_fails_the_rollout",
    "test_another_end_than_the_condition_fails_the_rollout",
)
def everything_is_tried_again(patch: Patch) -> None:
    change_config(patch, retry_condition=("failed", "timeout", "unresponsive"))


@caught_by("test_success_is_never_tried_again", "test_success_ends_both")
def success_is_tried_again(patch: Patch) -> None:
    original = lifecycle._follow

    def follow(record: Any, attempt: Any, now: float) -> Any:
        if attempt.status == "succeeded":
            return record._replace(status="requeuing")
        return original(record, attempt, now)

    patch.setattr(lifecycle, "_follow", follow)


@caught_by("test_success_ends_both", "test_ending_a_rollout_closes_its_open_attempt")
def the_end_of_an_attempt_has_no_time(patch: Patch) -> None:
    patch.setattr(
        lifecycle, "_with_status", lambda attempt, status, now: attempt._replace(status=status, end_time=None)
    )


@caught_by("test_a_finished_one_can_be_queued_again", "test_a_finished_rollout_can_be_attempted_again")
def the_time_of_an_earlier_end_stays(patch: Patch) -> None:
    original = MemoryPersistence._replace

    def swap(self: Any, entry: Any, after: Any) -> Any:
        if entry.record.end_time is not None and after.end_time is None:
            after = after._replace(end_time=entry.record.end_time)
        return original(self, entry, after)

    patch.setattr(MemoryPersistence, "_replace", swap)


@caught_by("test_once_cancelled_always_cancelled")
def a_cancellation_can_be_undone(patch: Patch) -> None:
    original = lifecycle.update_rollout

    def update(record: Any, changes: Any, now: float) -> Any:
        if record.status == "cancelled" and changes.get("status", "cancelled") != "cancelled":
            record = record._replace(status="running")
        return original(record, changes, now)

    patch.setattr(lifecycle, "update_rollout", update)


@caught_by("test_a_cancelled_rollout_gets_no_attempt")
def a_cancelled_rollout_can_be_attempted(patch: Patch) -> None:
    original = lifecycle.begin_attempt
    patch.setattr(
        lifecycle,
        "begin_attempt",
        lambda record, *args: original(record._replace(status="running"), *args),
    )


@caught_by(
    "test_ending_a_rollout_closes_its_open_attempt",
    "test_ending_the_rollout_makes_idle",
    "test_a_cancellation_reaches_the_worker",
    "test_what_was_ended_by_hand_follows_no_late_result",
)
def ending_a_rollout_leaves_its_attempt_open(patch: Patch) -> None:
    original = lifecycle.update_rollout
    patch.setattr(
        lifecycle,
        "update_rollout",
        lambda record, changes, now: original(record, changes, now)._replace(attempts=record.attempts),
    )


@caught_by("test_a_status_that_cannot_be_reported_is_refused")
def a_runner_can_cancel(patch: Patch) -> None:
    original = lifecycle.update_attempt

    def update(record: Any, attempt_id: str, changes: Any, now: float) -> Any:
        if changes.get("status") == "cancelled":
            changes = {**changes, "status": "failed"}
        return original(record, attempt_id, changes, now)

    patch.setattr(lifecycle, "update_attempt", update)


@caught_by("test_latest_means_the_newest_attempt", "test_spans_of_one_attempt_can_be_read")
def latest_means_the_first(patch: Patch) -> None:
    original = records.RolloutRecord.find_attempt

    def find(self: Any, attempt_id: str) -> Any:
        if attempt_id == "latest":
            return self.attempts[0] if self.attempts else None
        return original(self, attempt_id)

    patch.setattr(records.RolloutRecord, "find_attempt", find)


# --- Time ------------------------------------------------------------------------------------------------------


@caught_by(
    "test_the_watchdog_needs_no_caller",
    "test_a_retry_wakes_who_waits_for_work",
    "test_a_timeout_reaches_the_worker",
)
def the_watchdog_sleeps_until_somebody_calls(patch: Patch) -> None:
    def watch(self: Any, deadline: float | None) -> None:
        if deadline is not None and (self._next is None or deadline < self._next):
            self._next = deadline

    patch.setattr(Watchdog, "watch", watch)


@caught_by("test_an_attempt_times_out_strictly_after_its_time", "test_silence_counts_from_the_start")
def deadlines_are_kept_too_early(patch: Patch) -> None:
    change_deadlines(patch, lambda deadline, status, attempt, config: deadline - 1e-3)


@caught_by("test_spans_do_not_prolong_the_time", "test_a_heartbeat_prolongs_no_timeout")
def a_sign_of_life_prolongs_the_timeout(patch: Patch) -> None:
    change_deadlines(
        patch,
        lambda deadline, status, attempt, config: (
            (attempt.last_heartbeat_time or attempt.start_time) + config.timeout_seconds
            if status == "timeout"
            else deadline
        ),
    )


@caught_by("test_spans_break_the_silence", "test_a_given_heartbeat_time_counts")
def silence_counts_from_the_start_only(patch: Patch) -> None:
    change_deadlines(
        patch,
        lambda deadline, status, attempt, config: (
            attempt.start_time + config.unresponsive_seconds if status == "unresponsive" else deadline
        ),
    )


@caught_by("test_what_was_heard_of_later_expires_later")
def attempts_expire_in_the_order_of_their_first_deadlines(patch: Patch) -> None:
    original = MemoryPersistence.due_rollouts

    async def due(self: Any, now: float, limit: int) -> list[str]:
        order = list(self._rollouts)
        return sorted(await original(self, now, limit), key=order.index)

    patch.setattr(MemoryPersistence, "due_rollouts", due)


@caught_by("test_a_superseded_attempt_is_not_revived")
def a_superseded_attempt_is_revived(patch: Patch) -> None:
    revive(patch, lambda record, attempt: attempt.status == "unresponsive")


@caught_by("test_a_timed_out_attempt_is_not_revived", "test_a_late_span_is_kept_and_changes_no_status")
def a_span_revives_everything(patch: Patch) -> None:
    revive(patch, lambda record, attempt: attempt.status != "running")


@caught_by("test_a_span_revives_a_silent_attempt", "test_a_worker_whose_attempt_is_revived_is_busy")
def a_silent_attempt_stays_silent(patch: Patch) -> None:
    revive(patch, lambda record, attempt: False)


# --- Workers ---------------------------------------------------------------------------------------------------


@caught_by("test_a_worker_keeps_its_attempts_alive", "test_a_process_keeps_alive_what_it_names")
def heartbeats_keep_nothing_alive(patch: Patch) -> None:
    patch.setattr(lifecycle, "refresh_attempt", lambda record, attempt_id, now: record)


@caught_by("test_a_heartbeat_revives_nothing")
def a_heartbeat_revives(patch: Patch) -> None:
    original = StoreEngine.update_worker

    async def update(self: Any, worker_id: str, *args: Any) -> Any:
        for entry in self._persistence._rollouts.values():
            for attempt in entry.record.attempts:
                if attempt.worker_id == worker_id and attempt.status == "unresponsive":
                    await self.update_attempt(
                        entry.record.rollout_id,
                        attempt.attempt_id,
                        status="running",
                        last_heartbeat_time=self._clock.now(),
                    )
        return await original(self, worker_id, *args)

    patch.setattr(StoreEngine, "update_worker", update)


@caught_by("test_another_process_of_the_same_name_does_not")
def any_process_of_a_worker_keeps_its_attempts_alive(patch: Patch) -> None:
    original = lifecycle.holds_attempt
    patch.setattr(
        lifecycle,
        "holds_attempt",
        lambda record, attempt_id, worker_id, instance_id: original(
            record, attempt_id, worker_id, record.find_attempt(attempt_id).instance_id if record else None
        ),
    )


@caught_by("test_a_silent_worker_is_unknown", "test_a_worker_says_how_long_it_may_be_silent")
def a_silent_worker_keeps_its_status(patch: Patch) -> None:
    original = lifecycle.worker_status
    patch.setattr(
        reading.lifecycle,
        "worker_status",
        lambda worker, now: original(worker, worker.last_heartbeat_time or now),
    )


@caught_by("test_claiming_makes_busy_and_finishing_idle", "test_a_worker_is_idle_after_a_timeout")
def finishing_leaves_a_worker_busy(patch: Patch) -> None:
    patch.setattr(lifecycle, "release", lambda worker, hold, now: worker)


@caught_by(
    "test_a_worker_is_busy_until_its_last_attempt_ends", "test_many_claimed_at_once_keep_a_worker_busy"
)
def one_end_makes_a_worker_idle(patch: Patch) -> None:
    original = lifecycle.release
    patch.setattr(
        lifecycle, "release", lambda worker, hold, now: original(worker, hold, now)._replace(leases=())
    )


@caught_by("test_a_cancellation_reaches_the_worker", "test_new_resources_reach_all_workers")
def commands_get_lost(patch: Patch) -> None:
    patch.setattr(WorkerMailboxes, "send", lambda self, command, worker_id: 0)


# --- Waiting ---------------------------------------------------------------------------------------------------


@caught_by("test_it_waits_for_the_last", "test_many_waiters_are_woken", "test_the_watchdog_needs_no_caller")
def nobody_is_told_of_the_end(patch: Patch) -> None:
    silence(patch, lambda topic: topic[0] == "finished")


@caught_by("test_it_waits_for_the_last", "test_without_waiting_only_the_finished_are_returned")
def waiting_returns_what_runs_still(patch: Patch) -> None:
    original = StoreEngine.wait_for_rollouts

    async def wait(self: Any, *, rollout_ids: Any, timeout: float | None = None) -> Any:
        await original(self, rollout_ids=rollout_ids, timeout=timeout)
        return [await self.get_rollout_by_id(rollout_id) for rollout_id in rollout_ids]

    patch.setattr(StoreEngine, "wait_for_rollouts", wait)
    silence(patch, lambda topic: False)
    patch.setattr(
        StoreEngine,
        "wait_for_rollouts",
        lambda self, *, rollout_ids, timeout=None: wait(self, rollout_ids=rollout_ids, timeout=0),
    )


@caught_by("test_one_that_is_tried_again_is_waited_for", "test_one_that_is_revived_is_waited_for")
def an_end_counts_although_it_was_not_the_last(patch: Patch) -> None:
    async def wait(self: Any, *, rollout_ids: Any, timeout: float | None = None) -> Any:
        for rollout_id in rollout_ids:
            with self._broker.subscribe([("finished", rollout_id)]) as subscription:
                record = await self._persistence.get_rollout(rollout_id)
                if not lifecycle.is_finished(record):
                    await subscription.wait()
        return [await self.get_rollout_by_id(rollout_id) for rollout_id in rollout_ids]

    patch.setattr(StoreEngine, "wait_for_rollouts", wait)


@caught_by("test_an_unknown_rollout_is_not_waited_for")
def unknown_rollouts_count_as_finished(patch: Patch) -> None:
    original = StoreEngine.wait_for_rollouts

    async def wait(self: Any, *, rollout_ids: Any, timeout: float | None = None) -> Any:
        known = [rollout_id for rollout_id in rollout_ids if await self.get_rollout_by_id(rollout_id)]
        return await original(
            self, rollout_ids=known, timeout=0 if len(known) < len(rollout_ids) else timeout
        )

    patch.setattr(StoreEngine, "wait_for_rollouts", wait)


@caught_by("test_a_wait_ends_in_time_with_those_that_are_finished")
def a_wait_never_ends_in_time(patch: Patch) -> None:
    patch.setattr(reading, "check_wait", lambda timeout: None)
