"""Heartbeats: who is alive, which attempts that keeps alive, and what workers are told."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from lightning.store.contract import LightningStore
from lightning.testing.clock import FakeClock
from lightning.testing.contract.base import ClockedTheme, claim, read, statuses, until_idle
from lightning.testing.contract.deadlines import (
    A_BIT_SECONDS,
    LIMIT_SECONDS,
    RETRY_UNRESPONSIVE,
    TIMEOUT,
    UNRESPONSIVE,
    gone_silent,
)
from lightning.testing.contract.workers import worker_of
from lightning.testing.records import make_span
from lightning.types import (
    AttemptedRollout,
    AttemptRef,
    CancelAttempt,
    Drain,
    PromptTemplate,
    ResourcesChanged,
    RolloutConfig,
    Stop,
    WorkerCommand,
    WorkerHeartbeat,
)

SILENT_AFTER_SECONDS = 11.5
"""The default heartbeat interval (10 s) + its jitter (0.5 s) + 1 s."""


def heartbeat(instance_id: str, *rollouts: AttemptedRollout, **fields: float) -> WorkerHeartbeat:
    """A heartbeat of one process of the worker `w-1`, which executes these."""
    refs = [AttemptRef(rollout_id=r.rollout_id, attempt_id=r.attempt.attempt_id) for r in rollouts]
    return WorkerHeartbeat(worker_id="w-1", instance_id=instance_id, attempts=refs, **fields)


async def open_mailboxes(store: LightningStore, *worker_ids: str) -> None:
    """Listen for a moment: from then on commands to these workers are kept for them."""
    for worker_id in worker_ids:
        assert list(await store.receive_commands(worker_id, timeout=0)) == []


class HeartbeatContract(ClockedTheme):
    """`update_worker` as a sign of life, and silence."""

    async def test_a_worker_keeps_its_attempts_alive(self, store: LightningStore, clock: FakeClock) -> None:
        config = RolloutConfig(unresponsive_seconds=1)
        started = await store.start_rollout("task", config=config, worker_id="w-1")
        for _ in range(50):
            clock.advance(0.2)
            await store.update_worker("w-1")
        assert await statuses(store, started.rollout_id) == ("preparing", "preparing")
        attempt = await store.get_latest_attempt(started.rollout_id)
        assert attempt is not None
        assert attempt.last_heartbeat_time == clock.now()
        clock.advance(1 + A_BIT_SECONDS)
        assert await statuses(store, started.rollout_id) == ("failed", "unresponsive")

    async def test_a_worker_keeps_all_its_attempts_alive(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        for n in range(3):
            await store.enqueue_rollout(n, config=UNRESPONSIVE)
        mine = await store.dequeue_many_rollouts(limit=2, worker_id="w-1")
        others = await claim(store, worker_id="w-2")
        for _ in range(3):
            clock.advance(LIMIT_SECONDS / 2)
            await store.update_worker("w-1")
        assert [(await read(store, r.rollout_id)).status for r in mine] == ["preparing", "preparing"]
        assert (await read(store, others.rollout_id)).status == "failed"

    async def test_an_attempt_that_changed_hands_is_kept_alive_by_its_new_worker(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await store.start_rollout("task", config=UNRESPONSIVE, worker_id="w-1")
        await store.update_attempt(started.rollout_id, "latest", worker_id="w-2")
        clock.advance(LIMIT_SECONDS / 2)
        await store.update_worker("w-2")
        clock.advance(LIMIT_SECONDS / 2 + A_BIT_SECONDS)
        await store.update_worker("w-1")
        assert (await read(store, started.rollout_id)).status == "preparing"
        clock.advance(LIMIT_SECONDS / 2)
        assert (await read(store, started.rollout_id)).status == "failed"

    async def test_a_heartbeat_prolongs_no_timeout(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task", config=TIMEOUT, worker_id="w-1")
        for _ in range(5):
            clock.advance(LIMIT_SECONDS / 4)
            await store.update_worker("w-1")
        assert await statuses(store, started.rollout_id) == ("failed", "timeout")

    async def test_a_heartbeat_revives_nothing(self, store: LightningStore, clock: FakeClock) -> None:
        started = await gone_silent(store, clock, worker_id="w-1")
        before = await read(store, started.rollout_id)
        await store.update_worker("w-1")
        assert await read(store, started.rollout_id) == before

    async def test_a_silent_worker_is_unknown(self, store: LightningStore, clock: FakeClock) -> None:
        await store.start_rollout("task", worker_id="w-busy")
        done = await store.start_rollout("task", worker_id="w-idle")
        await store.update_attempt(done.rollout_id, "latest", status="succeeded")
        for worker_id in ("w-busy", "w-idle"):
            await store.update_worker(worker_id)
        clock.advance(SILENT_AFTER_SECONDS)
        assert [worker.status for worker in await store.query_workers()] == ["busy", "idle"]
        clock.advance(A_BIT_SECONDS)
        assert [worker.status for worker in await store.query_workers()] == ["unknown", "unknown"]
        assert (await store.query_workers(status_in=["busy", "idle"])).total == 0
        assert (await store.query_workers(status_in=["unknown"])).total == 2
        silent = await worker_of(store, "w-busy")
        assert (silent.status, silent.current_rollout_id is None) == ("unknown", False)
        for worker_id in ("w-busy", "w-idle"):
            await store.update_worker(worker_id)
        assert [worker.status for worker in await store.query_workers()] == ["busy", "idle"]

    async def test_a_heartbeat_is_no_news(self, store: LightningStore, clock: FakeClock) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        await store.add_span(make_span(started))
        async with aclosing(store.watch_rollouts(rollout_ids=[started.rollout_id])) as events:
            assert (await self.soon(anext(events))).rollout.status == "running"
            following = asyncio.ensure_future(anext(events))
            for _ in range(3):
                clock.advance(1.0)
                await store.add_span(make_span(started))
                await store.update_worker("w-1")
            await until_idle(store)
            await store.update_attempt(started.rollout_id, "latest", metadata={"half": "done"})
            event: Any = await self.soon(following)
            assert event.rollout.attempt.metadata == {"half": "done"}


class RunnerContract(ClockedTheme):
    """The verbs for runners at their best: leases of worker processes, and commands that arrive at once.

    The defaults that `LightningStore` gives to every store do less; a store that overrides them runs this theme too.
    """

    # --- Leases of processes ---

    async def test_a_process_keeps_alive_what_it_names(self, store: LightningStore, clock: FakeClock) -> None:
        for n in range(2):
            await store.enqueue_rollout(n, config=UNRESPONSIVE)
        named, forgotten = await store.claim_rollouts(limit=2, worker_id="w-1", instance_id="i-1")
        for _ in range(3):
            clock.advance(LIMIT_SECONDS / 2)
            reply = await store.send_heartbeat(heartbeat("i-1", named))
            assert reply.commands == []
        assert (await read(store, named.rollout_id)).status == "preparing"
        assert (await read(store, forgotten.rollout_id)).status == "failed"

    async def test_another_process_of_the_same_name_does_not(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        await store.enqueue_rollout("task", config=UNRESPONSIVE)
        (claimed,) = await store.claim_rollouts(worker_id="w-1", instance_id="i-1")
        clock.advance(LIMIT_SECONDS)
        reply = await store.send_heartbeat(heartbeat("i-2", claimed))
        assert reply.commands == [
            CancelAttempt(
                rollout_id=claimed.rollout_id, attempt_id=claimed.attempt.attempt_id, status="cancelled"
            )
        ]
        await store.update_worker("w-1")
        clock.advance(A_BIT_SECONDS)
        assert await statuses(store, claimed.rollout_id) == ("failed", "unresponsive")

    async def test_what_was_claimed_without_a_process_any_may_keep_alive(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await store.start_rollout("task", config=UNRESPONSIVE, worker_id="w-1")
        for instance_id in ("i-1", "i-2", "i-1"):
            clock.advance(LIMIT_SECONDS / 2)
            assert (await store.send_heartbeat(heartbeat(instance_id, started))).commands == []
        assert (await read(store, started.rollout_id)).status == "preparing"

    async def test_a_superseded_attempt_is_to_be_given_up(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await gone_silent(store, clock, worker_id="w-1")
        assert (await store.send_heartbeat(heartbeat("i-1", started))).commands == []
        await claim(store, worker_id="w-2")
        (command,) = (await store.send_heartbeat(heartbeat("i-1", started))).commands
        assert isinstance(command, CancelAttempt)
        assert (command.attempt_id, command.status) == (started.attempt.attempt_id, "unresponsive")

    async def test_an_attempt_that_nobody_knows_is_to_be_given_up(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        lost = started.model_copy(update={"rollout_id": "ro-lost"})
        (command,) = (await store.send_heartbeat(heartbeat("i-1", lost, started))).commands
        assert isinstance(command, CancelAttempt)
        assert (command.rollout_id, command.status) == ("ro-lost", "cancelled")
        attempt = await store.get_latest_attempt(started.rollout_id)
        assert attempt is not None
        assert attempt.last_heartbeat_time == clock.now()

    async def test_a_worker_says_how_long_it_may_be_silent(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        await store.send_heartbeat(heartbeat("i-1", started, silent_after_seconds=60))
        clock.advance(60)
        assert (await worker_of(store, "w-1")).status == "busy"
        clock.advance(A_BIT_SECONDS)
        assert (await worker_of(store, "w-1")).status == "unknown"

    async def test_a_claim_waits_no_longer_than_it_may(self, store: LightningStore, clock: FakeClock) -> None:
        waiter = asyncio.ensure_future(store.claim_rollouts(worker_id="w-1", timeout=LIMIT_SECONDS))
        await self.soon(clock.until_awaited(LIMIT_SECONDS))
        clock.advance(LIMIT_SECONDS - A_BIT_SECONDS)
        await until_idle(store)
        assert not waiter.done()
        clock.advance(2 * A_BIT_SECONDS)
        assert list(await self.soon(waiter)) == []

    # --- Commands ---

    async def test_a_cancellation_reaches_the_worker(self, store: LightningStore, clock: FakeClock) -> None:
        await open_mailboxes(store, "w-1", "w-2")
        started = await store.start_rollout("task", worker_id="w-1")
        waiter = asyncio.ensure_future(store.receive_commands("w-1"))
        await until_idle(store)
        await store.update_rollout(started.rollout_id, status="cancelled")
        assert list(await self.soon(waiter)) == [_cancel(started, "cancelled")]
        assert list(await store.receive_commands("w-2", timeout=0)) == []

    async def test_a_timeout_reaches_the_worker(self, store: LightningStore, clock: FakeClock) -> None:
        await open_mailboxes(store, "w-1")
        started = await store.start_rollout("task", config=TIMEOUT, worker_id="w-1")
        waiter = asyncio.ensure_future(store.receive_commands("w-1"))
        await until_idle(store)
        clock.advance(LIMIT_SECONDS + A_BIT_SECONDS)
        assert list(await self.soon(waiter)) == [_cancel(started, "timeout")]

    async def test_who_ends_an_attempt_itself_is_not_told(
        self, store: LightningStore, clock: FakeClock
    ) -> None:
        await open_mailboxes(store, "w-1")
        started = await store.start_rollout("task", config=RETRY_UNRESPONSIVE, worker_id="w-1")
        await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        silent = await gone_silent(store, clock, worker_id="w-1")  # may yet be revived, so is not told either
        assert (await read(store, silent.rollout_id)).status == "requeuing"
        assert list(await store.receive_commands("w-1", timeout=0)) == []

    async def test_new_resources_reach_all_workers(self, store: LightningStore, clock: FakeClock) -> None:
        await open_mailboxes(store, "w-1", "w-2")
        waiters = [asyncio.ensure_future(store.receive_commands(name)) for name in ("w-1", "w-2")]
        added = await store.add_resources({"prompt": PromptTemplate(template="one")})
        expected = ResourcesChanged(resources_id=added.resources_id, version=1)
        assert [list(commands) for commands in await self.soon(asyncio.gather(*waiters))] == [[expected]] * 2

    async def test_commands_can_be_sent_to_one_or_all(self, store: LightningStore, clock: FakeClock) -> None:
        assert await store.send_command(Drain(), "w-1") == 0
        for name, instance_id in (("w-1", "i-1"), ("w-1", "i-2"), ("w-2", None)):
            assert list(await store.receive_commands(name, instance_id=instance_id, timeout=0)) == []
        assert await store.send_command(Drain(reason="enough"), "w-1") == 2
        assert await store.send_command(Stop()) == 3
        both, stop = [Drain(reason="enough"), Stop()], [Stop()]
        assert await self._receive(store, 2, "w-1", "i-1") == both
        assert await self._receive(store, 2, "w-1", "i-2") == both
        assert await self._receive(store, 1, "w-2", None) == stop
        assert list(await store.receive_commands("w-2", timeout=0)) == []

    async def _receive(
        self, store: LightningStore, count: int, worker_id: str, instance_id: str | None
    ) -> list[WorkerCommand]:
        """So many commands, which may come one by one."""
        commands: list[WorkerCommand] = []
        while len(commands) < count:
            commands += await self.soon(store.receive_commands(worker_id, instance_id=instance_id))
        return commands


def _cancel(rollout: AttemptedRollout, status: str) -> CancelAttempt:
    return CancelAttempt.model_validate(
        {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id, "status": status}
    )
