"""Deadlines: attempts that take too long or fall silent, without anybody calling; and what comes too late."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.clock import FakeClock
from lightning.testing.contract.base import ClockedTheme, claim, drain, read, statuses, until_idle
from lightning.testing.contract.workers import held, worker_of
from lightning.testing.records import make_span
from lightning.types import AttemptedRollout, PromptTemplate, RolloutConfig

LIMIT_SECONDS = 10.0
TIMEOUT = RolloutConfig(timeout_seconds=LIMIT_SECONDS)
UNRESPONSIVE = RolloutConfig(unresponsive_seconds=LIMIT_SECONDS)
RETRY_TIMEOUT = TIMEOUT.model_copy(update={"max_attempts": 2, "retry_condition": ["timeout"]})
RETRY_UNRESPONSIVE = UNRESPONSIVE.model_copy(update={"max_attempts": 2, "retry_condition": ["unresponsive"]})
A_BIT_SECONDS = 0.25


async def gone_silent(store: LightningStore, clock: FakeClock, **arguments: Any) -> AttemptedRollout:
    """A rollout whose only attempt has just become unresponsive."""
    config = arguments.pop("config", RETRY_UNRESPONSIVE)
    started = await store.start_rollout("task", config=config, **arguments)
    clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
    attempt = await store.get_latest_attempt(started.rollout_id)
    assert attempt is not None
    assert attempt.status == "unresponsive"
    return started


class DeadlineContract(ClockedTheme):
    """`timeout_seconds`, `unresponsive_seconds` and retries after them."""

    async def test_all_times_are_the_clocks(self, store: LightningStore, clock: FakeClock) -> None:
        times = [clock.now()]

        def tick() -> float:
            clock.advance(1.5)
            times.append(clock.now())
            return clock.now()

        resources = await store.add_resources({"prompt": PromptTemplate(template="one")})
        assert (resources.create_time, resources.update_time) == (times[0], times[0])
        assert (await store.enqueue_rollout("task")).start_time == times[0]
        tick()
        claimed = await claim(store, worker_id="w-1")
        assert (claimed.start_time, claimed.attempt.start_time) == (times[0], times[1])
        tick()
        await store.add_span(make_span(claimed))
        tick()
        assert (await store.update_worker("w-1")).last_heartbeat_time == times[3]
        tick()
        done = await store.update_attempt(claimed.rollout_id, "latest", status="succeeded")
        assert (done.end_time, done.last_heartbeat_time) == (times[4], times[3])
        assert (await read(store, claimed.rollout_id)).end_time == times[4]
        worker = await worker_of(store, "w-1")
        assert (worker.last_dequeue_time, worker.last_busy_time) == (times[1], times[1])
        assert (worker.last_heartbeat_time, worker.last_idle_time) == (times[3], times[4])
        updated = await store.update_resources(resources.resources_id, {})
        assert (updated.create_time, updated.update_time) == (times[0], times[4])

    async def test_statistics_follow_the_queue_and_the_attempts(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        """As far as the store has them: the age of the queue's head, attempts by status, what the watchdog did."""

        async def check(oldest: float | None, attempts: dict[str, int], expired: dict[str, int]) -> None:
            statistics = await store.statistics()
            assert statistics.get("oldest_queued_age") == (
                oldest if "oldest_queued_age" in statistics else None
            )
            if statistics.get("attempts_by_status"):
                assert statistics["attempts_by_status"] == attempts
            if statistics.get("expired_attempts"):
                assert statistics["expired_attempts"] == expired

        await check(None, {}, {})
        first = await store.enqueue_rollout(1, config=RETRY_TIMEOUT)
        clock.advance(2)
        await store.enqueue_rollout(2)
        clock.advance(3)
        await check(5.0, {}, {})
        assert (await claim(store)).rollout_id == first.rollout_id
        await check(3.0, {"preparing": 1}, {})
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        await check(3.0 + LIMIT_SECONDS + A_BIT_SECONDS, {"timeout": 1}, {"timeout": 1})
        second = await claim(store)
        clock.advance(1)
        await check(1.0, {"timeout": 1, "preparing": 1}, {"timeout": 1})  # requeued when its attempt ended
        await store.update_attempt(second.rollout_id, "latest", status="succeeded")
        await claim(store)
        await check(None, {"timeout": 1, "succeeded": 1, "preparing": 1}, {"timeout": 1})

    # --- Too long ---

    async def test_an_attempt_times_out_strictly_after_its_time(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await store.start_rollout("task", config=TIMEOUT)
        assert started.start_time == started.attempt.start_time == clock.now()
        clock.advance(LIMIT_SECONDS)
        await until_idle(store)
        assert await statuses(store, started.rollout_id) == ("preparing", "preparing")
        clock.advance(A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("failed", "timeout")
        rollout = await read(store, started.rollout_id)
        assert isinstance(rollout, AttemptedRollout)
        assert rollout.end_time == rollout.attempt.end_time == clock.now()

    async def test_spans_do_not_prolong_the_time(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task", config=TIMEOUT)
        for _ in range(4):
            clock.advance(LIMIT_SECONDS / 4)
            await store.add_span(make_span(started))
        assert await statuses(store, started.rollout_id) == ("running", "running")
        clock.advance(A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("failed", "timeout")

    # --- Silent ---

    async def test_silence_counts_from_the_start(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task", config=UNRESPONSIVE)
        clock.advance(LIMIT_SECONDS)
        await until_idle(store)
        assert await statuses(store, started.rollout_id) == ("preparing", "preparing")
        clock.advance(A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("failed", "unresponsive")
        attempt = await store.get_latest_attempt(started.rollout_id)
        assert attempt is not None
        assert attempt.end_time == clock.now()

    async def test_spans_break_the_silence(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task", config=UNRESPONSIVE)
        span = make_span(started)
        for turn in range(6):
            clock.advance(LIMIT_SECONDS - A_BIT_SECONDS)
            await store.add_span(
                span if turn % 2 else make_span(started)
            )  # a repeated one is a sign of life too
        assert await statuses(store, started.rollout_id) == ("running", "running")
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("failed", "unresponsive")

    async def test_a_given_heartbeat_time_counts(self, store: LightningStore, clock: FakeClock) -> None:
        early, late, cleared = [await store.start_rollout("task", config=UNRESPONSIVE) for _ in range(3)]
        clock.advance(LIMIT_SECONDS / 2)
        times = {early.rollout_id: clock.now() - LIMIT_SECONDS, late.rollout_id: clock.now()}
        for rollout_id, moment in times.items():
            await store.update_attempt(rollout_id, "latest", last_heartbeat_time=moment)
        await store.add_span(make_span(cleared))
        await store.update_attempt(cleared.rollout_id, "latest", last_heartbeat_time=None)
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[early.rollout_id]))
        await until_idle(store)
        clock.advance(A_BIT_SECONDS)
        await self.soon(waiter)
        assert (await read(store, late.rollout_id)).status == "preparing"
        assert (await read(store, cleared.rollout_id)).status == "running"
        clock.advance(LIMIT_SECONDS / 2)
        assert (await read(store, late.rollout_id)).status == "preparing"
        assert (await read(store, cleared.rollout_id)).status == "failed"

    async def test_past_both_limits_it_is_a_timeout(self, store: LightningStore, clock: FakeClock) -> None:
        config = RolloutConfig(unresponsive_seconds=LIMIT_SECONDS, timeout_seconds=2 * LIMIT_SECONDS)
        started = await store.start_rollout("task", config=config)
        clock.advance(2 * LIMIT_SECONDS + A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("failed", "timeout")

    # --- Nobody needs to call ---

    @pytest.mark.parametrize("config", [TIMEOUT, UNRESPONSIVE], ids=["timeout", "unresponsive"])
    async def test_the_watchdog_needs_no_caller(
        self, store: LightningStore, clock: FakeClock, config: RolloutConfig
    ) -> None:
        started = await store.start_rollout("task", config=config)
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[started.rollout_id]))
        await until_idle(store)
        clock.advance(LIMIT_SECONDS)
        await until_idle(store)
        assert not waiter.done()
        clock.advance(A_BIT_SECONDS)
        (rollout,) = await self.soon(waiter)
        assert rollout.status == "failed"

    async def test_a_new_deadline_before_all_others_is_kept(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        await store.start_rollout("task", config=RolloutConfig(timeout_seconds=1000))
        await until_idle(store)
        started = await store.start_rollout("task", config=TIMEOUT)
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[started.rollout_id]))
        await until_idle(store)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        await self.soon(waiter)

    async def test_a_retry_wakes_who_waits_for_work(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task", config=RETRY_TIMEOUT)
        waiter = asyncio.ensure_future(store.claim_rollouts(worker_id="w-2"))
        await until_idle(store)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        (claimed,) = await self.soon(waiter)
        assert (claimed.rollout_id, claimed.attempt.sequence_id) == (started.rollout_id, 2)
        assert claimed.attempt.start_time == clock.now()

    async def test_many_expire_together_the_earliest_first(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        ids: list[str] = []
        for n in range(300):
            config = RETRY_TIMEOUT.model_copy(update={"timeout_seconds": LIMIT_SECONDS - n / 64})
            ids.append((await store.start_rollout(n, config=config)).rollout_id)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        assert await drain(store) == ids[::-1]

    async def test_what_was_heard_of_later_expires_later(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        ids = [(await store.start_rollout(n, config=RETRY_UNRESPONSIVE)).rollout_id for n in range(3)]
        for index in (1, 2, 0):
            clock.advance(A_BIT_SECONDS)
            await store.update_attempt(ids[index], "latest", last_heartbeat_time=clock.now())
        clock.advance(2 * LIMIT_SECONDS)
        assert await drain(store) == [ids[1], ids[2], ids[0]]

    # --- What follows ---

    @pytest.mark.parametrize(
        ("config", "end"), [(RETRY_TIMEOUT, "timeout"), (RETRY_UNRESPONSIVE, "unresponsive")]
    )
    async def test_an_expired_attempt_is_tried_again(
        self, store: LightningStore, clock: FakeClock, config: RolloutConfig, end: str
    ) -> None:
        started = await store.start_rollout("task", config=config)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("requeuing", end)
        assert (await read(store, started.rollout_id)).end_time is None
        claimed = await claim(store)
        assert (claimed.rollout_id, claimed.attempt.sequence_id) == (started.rollout_id, 2)
        clock.advance(LIMIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("preparing", end, "preparing")
        clock.advance(A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("failed", end, end)
        assert await store.dequeue_rollout() is None

    async def test_each_attempt_expires_for_itself(self, store: LightningStore, clock: FakeClock) -> None:
        first = await store.start_rollout("task", config=RETRY_TIMEOUT)
        clock.advance(LIMIT_SECONDS / 2)
        await store.start_attempt(first.rollout_id)
        clock.advance(LIMIT_SECONDS / 2 + A_BIT_SECONDS)
        assert await statuses(store, first.rollout_id) == ("preparing", "timeout", "preparing")
        assert await store.dequeue_rollout() is None
        clock.advance(LIMIT_SECONDS / 2)
        assert await statuses(store, first.rollout_id) == ("failed", "timeout", "timeout")

    async def test_what_waits_or_has_ended_does_not_expire(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        config = TIMEOUT.model_copy(update={"unresponsive_seconds": LIMIT_SECONDS})
        waiting = await store.enqueue_rollout("task", config=config)
        ended = [await store.start_rollout("task", config=config) for _ in range(3)]
        outcomes: list[Any] = ["succeeded", "failed", "cancelled"]
        for rollout, status in zip(ended, outcomes, strict=True):
            await store.update_rollout(rollout.rollout_id, status=status)
        before = list(await store.query_rollouts())
        clock.advance(10 * LIMIT_SECONDS)
        await until_idle(store)
        assert list(await store.query_rollouts()) == before
        assert await drain(store) == [waiting.rollout_id]

    async def test_without_limits_nothing_expires(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task")
        clock.advance(1e9)
        await until_idle(store)
        assert await statuses(store, started.rollout_id) == ("preparing", "preparing")

    async def test_a_new_config_moves_the_deadline(self, store: LightningStore, clock: FakeClock) -> None:
        hastened = await store.start_rollout("task")
        prolonged = await store.start_rollout("task", config=TIMEOUT)
        await store.update_rollout(hastened.rollout_id, config=TIMEOUT)
        await store.update_rollout(
            prolonged.rollout_id, config=RolloutConfig(timeout_seconds=2 * LIMIT_SECONDS)
        )
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[hastened.rollout_id]))
        await until_idle(store)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        await self.soon(waiter)
        assert await statuses(store, prolonged.rollout_id) == ("preparing", "preparing")
        clock.advance(LIMIT_SECONDS)
        assert await statuses(store, prolonged.rollout_id) == ("failed", "timeout")

    # --- Revived ---

    @pytest.mark.parametrize("config", [RETRY_UNRESPONSIVE, UNRESPONSIVE], ids=["requeuing", "failed"])
    async def test_a_span_revives_a_silent_attempt(
        self, store: LightningStore, clock: FakeClock, config: RolloutConfig
    ) -> None:
        started = await gone_silent(store, clock, config=config)
        await store.add_span(make_span(started))
        assert await statuses(store, started.rollout_id) == ("running", "running")
        rollout = await read(store, started.rollout_id)
        assert isinstance(rollout, AttemptedRollout)
        assert (rollout.end_time, rollout.attempt.end_time) == (None, None)
        assert await store.dequeue_rollout() is None
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        attempt = await store.get_latest_attempt(started.rollout_id)
        assert attempt is not None
        assert attempt.status == "unresponsive"

    async def test_a_superseded_attempt_is_not_revived(self, store: LightningStore, clock: FakeClock) -> None:
        started = await gone_silent(store, clock)
        await claim(store)
        assert await store.add_span(make_span(started)) is not None
        assert await statuses(store, started.rollout_id) == ("preparing", "unresponsive", "preparing")
        first, _ = await store.query_attempts(started.rollout_id)
        assert first.last_heartbeat_time == clock.now()
        assert first.end_time is not None

    async def test_a_timed_out_attempt_is_not_revived(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task", config=RETRY_TIMEOUT)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        closed = await store.get_latest_attempt(started.rollout_id)
        assert closed is not None
        clock.advance(A_BIT_SECONDS)
        stored = await store.add_span(make_span(started))
        assert await statuses(store, started.rollout_id) == ("requeuing", "timeout")
        assert list(await store.query_spans(started.rollout_id)) == [stored]
        late = closed.model_copy(update={"last_heartbeat_time": clock.now()})
        assert await store.get_latest_attempt(started.rollout_id) == late

    async def test_a_rollout_ended_by_hand_is_not_revived(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        ended_as: list[Any] = ["succeeded", "failed", "cancelled"]
        for status in ended_as:
            started = await gone_silent(store, clock)
            await store.update_rollout(started.rollout_id, status=status)
            await store.add_span(make_span(started))
            assert (await read(store, started.rollout_id)).status == status

    async def test_one_that_is_revived_is_waited_for(self, store: LightningStore, clock: FakeClock) -> None:
        started = await gone_silent(store, clock, config=UNRESPONSIVE)
        other = await store.start_rollout("task")
        waiter = asyncio.ensure_future(
            store.wait_for_rollouts(rollout_ids=[started.rollout_id, other.rollout_id])
        )
        await until_idle(store)
        await store.add_span(make_span(started))
        await store.update_attempt(other.rollout_id, "latest", status="succeeded")
        await until_idle(store)
        assert not waiter.done()
        await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        assert [rollout.status for rollout in await self.soon(waiter)] == ["succeeded", "succeeded"]

    # --- Results that come late ---

    @pytest.mark.parametrize("late", ["succeeded", "failed", "running"])
    @pytest.mark.parametrize("config", [TIMEOUT, RETRY_TIMEOUT], ids=["failed", "requeuing"])
    async def test_a_result_after_the_timeout_changes_nothing(
        self, store: LightningStore, clock: FakeClock, config: RolloutConfig, late: Any
    ) -> None:
        started = await store.start_rollout("task", config=config)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        before = await read(store, started.rollout_id)
        attempt = await store.update_attempt(started.rollout_id, started.attempt.attempt_id, status=late)
        assert attempt.status == "timeout"
        assert await read(store, started.rollout_id) == before

    async def test_a_result_of_a_silent_attempt_still_counts(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await gone_silent(store, clock)
        attempt = await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        assert (attempt.status, attempt.end_time) == ("succeeded", clock.now())
        assert await statuses(store, started.rollout_id) == ("succeeded", "succeeded")
        assert await store.dequeue_rollout() is None

    async def test_a_silent_attempt_never_begins_anew(self, store: LightningStore, clock: FakeClock) -> None:
        started = await gone_silent(store, clock)
        await store.update_attempt(started.rollout_id, "latest", status="preparing")
        assert await statuses(store, started.rollout_id) == ("requeuing", "unresponsive")

    @pytest.mark.parametrize("late", ["succeeded", "failed"])
    async def test_a_result_of_a_superseded_attempt_moves_no_rollout(
        self, store: LightningStore, clock: FakeClock, late: Any
    ) -> None:
        started = await gone_silent(store, clock)
        again = await claim(store)
        kept = await store.update_attempt(started.rollout_id, started.attempt.attempt_id, status=late)
        assert kept.status == late
        assert await read(store, started.rollout_id) == again
        assert await store.dequeue_rollout() is None

    # --- Workers of expired attempts ---

    async def test_a_worker_is_idle_after_a_timeout(self, store: LightningStore, clock: FakeClock) -> None:
        await store.start_rollout("task", config=TIMEOUT, worker_id="w-1")
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        assert held(await worker_of(store, "w-1")) == ("idle", None, None)

    async def test_a_worker_whose_attempt_is_revived_is_busy(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await gone_silent(store, clock, worker_id="w-1")
        assert (await worker_of(store, "w-1")).current_attempt_id is None
        await store.add_span(make_span(started))
        worker = await worker_of(store, "w-1")
        assert held(worker) == ("busy", started.rollout_id, started.attempt.attempt_id)


class WaitLimitContract(ClockedTheme):
    """The time limits of calls that wait."""

    async def test_a_wait_ends_in_time_with_those_that_are_finished(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        ids = [(await store.start_rollout("task")).rollout_id for _ in range(3)]
        await store.update_attempt(ids[2], "latest", status="succeeded")
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=ids, timeout=LIMIT_SECONDS))
        await self.soon(clock.until_awaited(LIMIT_SECONDS))
        await store.update_attempt(ids[0], "latest", status="failed")
        clock.advance(LIMIT_SECONDS - A_BIT_SECONDS)
        await until_idle(store)
        assert not waiter.done()
        clock.advance(2 * A_BIT_SECONDS)
        found = await self.soon(waiter)
        assert [(rollout.rollout_id, rollout.status) for rollout in found] == [
            (ids[0], "failed"),
            (ids[2], "succeeded"),
        ]

    async def test_a_wait_may_be_long(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task")
        waiter = asyncio.ensure_future(
            store.wait_for_rollouts(rollout_ids=[started.rollout_id], timeout=7 * 86_400)
        )
        await self.soon(clock.until_awaited(7 * 86_400))
        for _ in range(6):
            clock.advance(86_400)
            await until_idle(store)
        assert not waiter.done()
        await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        assert len(await self.soon(waiter)) == 1
