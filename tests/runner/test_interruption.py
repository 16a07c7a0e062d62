"""Attempts that must not go on: stopped in the agent's code, within 200 ms, and the next task is taken."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from opentelemetry import trace

from lightning.runner import AgentInterrupted, AgentRunner
from lightning.testing.unreliable import UnreliableStore
from lightning.types import Attempt, AttemptedRollout, CancelAttempt, Rollout, RolloutConfig

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0
REACTION_SECONDS = 0.2
TRACER = trace.get_tracer("tests")


class Agents:
    """An agent that works for ever on "hang", in one of two ways, and notes when it was stopped."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.stopped = threading.Event()
        self.stopped_at: float | None = None
        self.stopped_by: BaseException | None = None

    async def asynchronous(self, task: Any) -> None:
        TRACER.start_span(f"began {task}").end()
        try:
            self.begun.set()
            if task == "hang":
                await asyncio.sleep(3600)
        except BaseException as error:
            self.note(error)
            raise

    def plain(self, task: Any) -> None:
        TRACER.start_span(f"began {task}").end()
        try:
            self.begun.set()
            while task == "hang":
                time.sleep(0.005)
        except BaseException as error:
            self.note(error)
            raise

    def note(self, error: BaseException) -> None:
        self.stopped_at = time.monotonic()
        self.stopped_by = error
        self.stopped.set()
        TRACER.start_span("cleaned up").end()


KINDS = pytest.mark.parametrize("kind", ["asynchronous", "plain"])


async def begun(agents: Agents) -> None:
    assert await asyncio.to_thread(agents.begun.wait, DEADLINE_SECONDS)


async def ended(store: UnreliableStore, rollout: Rollout) -> Rollout:
    (one,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=DEADLINE_SECONDS)
    return one


async def latest_attempt(store: UnreliableStore, rollout: Rollout) -> Attempt:
    attempt = await store.get_latest_attempt(rollout.rollout_id)
    assert attempt is not None
    return attempt


@KINDS
@pytest.mark.parametrize("mode", ["thread", "asyncio"])
async def test_a_cancelled_rollout_is_stopped_in_the_agents_code_and_the_next_is_taken(
    store: UnreliableStore, kind: str, mode: Any
) -> None:
    agents = Agents()
    hanging, following = await store.enqueue_rollout("hang"), await store.enqueue_rollout("next")
    runner = AgentRunner(store=store, agent=getattr(agents, kind), max_rollouts=2, heartbeat_launch_mode=mode)
    work = asyncio.create_task(runner.run())
    await begun(agents)
    await store.wait_for_calls("receive_commands")
    before = time.monotonic()
    await store.update_rollout(hanging.rollout_id, status="cancelled")
    assert (await ended(store, following)).status == "succeeded"
    assert agents.stopped_at is not None
    assert agents.stopped_at - before < REACTION_SECONDS
    assert isinstance(agents.stopped_by, (AgentInterrupted, asyncio.CancelledError))
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert (await latest_attempt(store, hanging)).status == "cancelled"
    names = [span.name for span in await store.query_spans(hanging.rollout_id)]
    assert names == ["began hang", "cleaned up"]


@KINDS
async def test_an_attempt_that_runs_out_of_time_is_stopped(store: UnreliableStore, kind: str) -> None:
    agents = Agents()
    config = RolloutConfig(timeout_seconds=0.1)
    hanging = await store.enqueue_rollout("hang", config=config)
    following = await store.enqueue_rollout("next", config=RolloutConfig(timeout_seconds=3600))
    work = asyncio.create_task(AgentRunner(store=store, agent=getattr(agents, kind), max_rollouts=2).run())
    await begun(agents)
    before = time.monotonic()
    assert (await ended(store, following)).status == "succeeded"
    assert agents.stopped_at is not None
    assert agents.stopped_at - before < 0.1 + REACTION_SECONDS
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert (await latest_attempt(store, hanging)).status == "timeout"
    assert (await ended(store, hanging)).status == "failed"


async def test_time_runs_out_even_if_the_store_cannot_say_so(store: UnreliableStore) -> None:
    agents = Agents()
    hanging = await store.enqueue_rollout("hang", config=RolloutConfig(timeout_seconds=0.1))
    work = asyncio.create_task(AgentRunner(store=store, agent=agents.asynchronous, max_rollouts=1).run())
    await begun(agents)
    store.away = True
    assert await asyncio.to_thread(agents.stopped.wait, DEADLINE_SECONDS)
    store.away = False
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert (await ended(store, hanging)).status == "failed"
    assert (await latest_attempt(store, hanging)).status == "timeout"


async def test_a_heartbeats_reply_stops_an_attempt_whose_command_was_missed(store: UnreliableStore) -> None:
    class Deaf(UnreliableStore):
        async def receive_commands(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            await asyncio.sleep(3600)

    agents = Agents()
    deaf = Deaf(store)
    hanging = await store.enqueue_rollout("hang")
    runner = AgentRunner(store=deaf, agent=agents.asynchronous, max_rollouts=1)
    await runner.start()
    work = asyncio.create_task(runner.run())
    await begun(agents)
    await store.update_rollout(hanging.rollout_id, status="cancelled")
    assert agents.stopped_at is None
    await runner.heartbeat()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert isinstance(agents.stopped_by, asyncio.CancelledError)
    await runner.stop()


@KINDS
async def test_what_an_interrupted_agent_returns_or_raises_in_spite_of_it_does_not_count(
    store: UnreliableStore, kind: str
) -> None:
    agents = Agents()

    async def asynchronous(task: Any) -> float:
        try:
            await agents.asynchronous(task)
        except asyncio.CancelledError:
            return 1.0
        raise LookupError("not interrupted")

    def plain(task: Any) -> float:
        try:
            agents.plain(task)
        except AgentInterrupted:
            raise RuntimeError("cleaning up failed") from None
        return 1.0

    hanging = await store.enqueue_rollout("hang")
    agent = asynchronous if kind == "asynchronous" else plain
    work = asyncio.create_task(AgentRunner(store=store, agent=agent, max_rollouts=1).run())
    await begun(agents)
    await store.wait_for_calls("receive_commands")
    await store.update_rollout(hanging.rollout_id, status="cancelled")
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    attempt = await latest_attempt(store, hanging)
    assert (attempt.status, attempt.metadata) == ("cancelled", None)
    assert store.calls["update_attempt"] == 0


@KINDS
async def test_code_that_will_not_stop_is_left_behind_and_the_next_task_is_taken(
    store: UnreliableStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    released = asyncio.Event()
    begun_hanging = threading.Event()

    def plain(task: Any) -> None:
        if task == "hang":
            begun_hanging.set()
            release.wait()  # in C code, where no exception reaches it

    async def asynchronous(task: Any) -> None:
        if task == "hang":
            begun_hanging.set()
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError:
                    continue

    hanging, following = await store.enqueue_rollout("hang"), await store.enqueue_rollout("next")
    agent = asynchronous if kind == "asynchronous" else plain
    work = asyncio.create_task(
        AgentRunner(store=store, agent=agent, max_rollouts=2, interrupt_grace=0.05).run()
    )
    assert await asyncio.to_thread(begun_hanging.wait, DEADLINE_SECONDS)
    await store.wait_for_calls("receive_commands")
    await store.update_rollout(hanging.rollout_id, status="cancelled")
    assert (await ended(store, following)).status == "succeeded"
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert any("left behind" in record.message for record in caplog.records)
    release.set()
    released.set()
    await asyncio.sleep(0)


async def test_a_cancellation_before_the_agent_is_called_keeps_it_from_being_called(
    store: UnreliableStore,
) -> None:
    fetching, go_on = asyncio.Event(), asyncio.Event()

    class Slow(UnreliableStore):
        async def get_resources_by_id(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            fetching.set()
            await go_on.wait()
            return await store.get_resources_by_id(*args, **kwargs)

    called: list[Any] = []
    await store.add_resources({})
    enqueued = await store.enqueue_rollout("x")
    slow = Slow(store)
    work = asyncio.create_task(AgentRunner(store=slow, agent=called.append, max_rollouts=1).run())
    await asyncio.wait_for(fetching.wait(), DEADLINE_SECONDS)
    await slow.wait_for_calls("receive_commands")
    await store.update_rollout(enqueued.rollout_id, status="cancelled")
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert called == []
    assert slow.calls["update_attempt"] == 0


async def test_a_command_for_an_attempt_that_is_not_in_hand_is_ignored(store: UnreliableStore) -> None:
    runner = AgentRunner(store=store, agent=lambda task: 1.0, max_rollouts=1)
    work = asyncio.create_task(runner.run())
    await store.wait_for_calls("receive_commands")
    await store.send_command(CancelAttempt(rollout_id="ro", attempt_id="at", status="cancelled"))
    enqueued = await store.enqueue_rollout("x")
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert (await ended(store, enqueued)).status == "succeeded"


async def test_cancelling_one_of_several_leaves_the_others_alone(store: UnreliableStore) -> None:
    begun_all, stopped, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    count = [0]

    async def agent(task: int) -> None:
        count[0] += 1
        if count[0] == 3:
            begun_all.set()
        try:
            await go_on.wait()
        finally:
            stopped.set()

    enqueued = [await store.enqueue_rollout(number) for number in range(3)]
    runner = AgentRunner(store=store, agent=agent, concurrency=3, max_rollouts=3)
    work = asyncio.create_task(runner.run())
    await asyncio.wait_for(begun_all.wait(), DEADLINE_SECONDS)
    await store.wait_for_calls("receive_commands")
    await store.update_rollout(enqueued[1].rollout_id, status="cancelled")
    await asyncio.wait_for(stopped.wait(), DEADLINE_SECONDS)
    go_on.set()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    statuses = [(await ended(store, one)).status for one in enqueued]
    assert statuses == ["succeeded", "cancelled", "succeeded"]


async def test_an_attempt_taken_over_by_another_worker_is_stopped(store: UnreliableStore) -> None:
    agents = Agents()
    hanging = await store.enqueue_rollout("hang")
    runner = AgentRunner(store=store, agent=agents.asynchronous, max_rollouts=1)
    await runner.start()
    work = asyncio.create_task(runner.run())
    await begun(agents)
    claimed = await store.get_rollout_by_id(hanging.rollout_id)
    assert isinstance(claimed, AttemptedRollout)
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, worker_id="another")
    await runner.heartbeat()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert agents.stopped_at is not None
    await runner.stop()
