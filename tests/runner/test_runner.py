"""The runner: what becomes of rollouts in its hands."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan

from lightning.agents import Agent, rollout
from lightning.runner import AgentRunner
from lightning.store.contract import LightningStore
from lightning.testing.unreliable import UnreliableStore
from lightning.tracing import emit_reward, find_final_reward
from lightning.types import (
    LLM,
    AttemptedRollout,
    Drain,
    NamedResources,
    PromptTemplate,
    Rollout,
    RolloutConfig,
    Span,
    Stop,
)

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0
TRACER = trace.get_tracer("tests")


@asynccontextmanager
async def running(store: LightningStore, agent: Any, **settings: Any) -> AsyncIterator[AgentRunner]:
    """A runner at work; afterwards it is told to stop, and must."""
    runner = AgentRunner(store=store, agent=agent, **settings)
    event = threading.Event()
    work = asyncio.create_task(runner.run(event))
    try:
        yield runner
    finally:
        event.set()
        await asyncio.wait_for(work, DEADLINE_SECONDS)


async def finished(store: LightningStore, *rollouts: Rollout) -> list[Rollout]:
    ids = [one.rollout_id for one in rollouts]
    ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=DEADLINE_SECONDS)
    assert len(ended) == len(ids)
    return ended


async def run_one(
    store: LightningStore,
    agent: Any,
    input: Any = "task",
    *,
    config: RolloutConfig | None = None,
    **settings: Any,
) -> AttemptedRollout:
    enqueued = await store.enqueue_rollout(input, config=config)
    async with running(store, agent, **settings):
        (ended,) = await finished(store, enqueued)
    assert isinstance(ended, AttemptedRollout)
    return ended


async def names_of(store: LightningStore, of: Rollout) -> list[str]:
    return [span.name for span in await store.query_spans(of.rollout_id)]


@rollout
async def async_agent(task: Any) -> float:
    with TRACER.start_as_current_span(f"work on {task}"):
        await asyncio.sleep(0)
    return 0.5


@rollout
def sync_agent(task: Any) -> float:
    with TRACER.start_as_current_span(f"work on {task}"):
        return 0.5


class ClassAgent(Agent):
    def rollout(self, task: Any, resources: NamedResources, rollout: AttemptedRollout) -> float:
        with TRACER.start_as_current_span(f"work on {task}"):
            return 0.5


# --- Results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [async_agent, sync_agent, ClassAgent()])
@pytest.mark.parametrize("mode", ["thread", "asyncio"])
async def test_a_rollout_is_claimed_executed_traced_and_reported(
    store: UnreliableStore, agent: Any, mode: Any
) -> None:
    ended = await run_one(store, agent, "x", heartbeat_launch_mode=mode)
    assert ended.status == "succeeded"
    assert ended.attempt.status == "succeeded"
    assert ended.attempt.metadata is None
    assert await names_of(store, ended) == ["work on x", "agentlightning.annotation"]
    assert find_final_reward(await store.query_spans(ended.rollout_id)) == 0.5
    worker = await store.get_worker_by_id(ended.attempt.worker_id or "")
    assert worker is not None
    assert worker.status == "idle"


async def test_many_rollouts_are_executed_in_order_each_once(store: UnreliableStore) -> None:
    seen: list[int] = []
    enqueued = [await store.enqueue_rollout(number) for number in range(50)]
    async with running(store, rollout(seen.append)):
        ended = await finished(store, *enqueued)
    assert seen == list(range(50))
    assert {one.status for one in ended} == {"succeeded"}


async def test_as_many_rollouts_run_at_once_as_wanted(store: UnreliableStore) -> None:
    at_once: list[int] = [0]
    all_in = asyncio.Event()

    async def agent(task: int) -> None:
        at_once[0] += 1
        if at_once[0] == 3:
            all_in.set()
        await all_in.wait()
        with TRACER.start_as_current_span(str(task)):
            await asyncio.sleep(0)

    enqueued = [await store.enqueue_rollout(number) for number in range(3)]
    async with running(store, agent, concurrency=3):
        await finished(store, *enqueued)
    for number, one in enumerate(enqueued):
        assert await names_of(store, one) == [str(number)]


async def test_plain_functions_run_at_once_too_and_keep_their_spans_apart(store: UnreliableStore) -> None:
    barrier = threading.Barrier(3, timeout=DEADLINE_SECONDS)

    def agent(task: int) -> None:
        with TRACER.start_as_current_span(str(task)):
            barrier.wait()
            emit_reward(float(task))

    enqueued = [await store.enqueue_rollout(number) for number in range(3)]
    async with running(store, agent, concurrency=3):
        await finished(store, *enqueued)
    for number, one in enumerate(enqueued):
        assert await names_of(store, one) == ["agentlightning.annotation", str(number)]
        assert find_final_reward(await store.query_spans(one.rollout_id)) == float(number)


async def test_a_plain_function_finds_itself_on_the_same_thread_each_time(store: UnreliableStore) -> None:
    threads: set[str] = set()
    enqueued = [await store.enqueue_rollout(number) for number in range(5)]
    async with running(store, rollout(lambda task: threads.add(threading.current_thread().name))):
        await finished(store, *enqueued)
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


async def test_an_idle_runner_begins_at_once(store: UnreliableStore) -> None:
    begun: list[float] = []
    async with running(store, rollout(lambda task: begun.append(time.monotonic()))):
        await store.wait_for_calls("claim_rollouts")
        before = time.monotonic()
        await finished(store, await store.enqueue_rollout("x"))
    assert begun[0] - before < 0.2  # not the seconds of one who polls


async def test_the_first_span_is_stored_while_the_agent_still_works(store: UnreliableStore) -> None:
    go_on = asyncio.Event()

    async def agent(task: Any) -> None:
        TRACER.start_span("early").end()
        await go_on.wait()

    enqueued = await store.enqueue_rollout("x")
    async with running(store, agent):
        await store.wait_for_answers("deliver_spans")
        assert (await store.query_rollouts(status_in=["running"])).total == 1
        assert await names_of(store, enqueued) == ["early"]
        go_on.set()
        await finished(store, enqueued)


@pytest.mark.parametrize("make_async", [True, False])
async def test_an_agent_that_raises_fails_its_attempt_with_what_it_raised(
    store: UnreliableStore, make_async: bool
) -> None:
    def fail(task: Any) -> None:
        TRACER.start_span("before").end()
        raise LookupError("no such \ud800 thing")

    async def fail_async(task: Any) -> None:
        fail(task)

    ended = await run_one(store, fail_async if make_async else fail)
    assert (ended.status, ended.attempt.status) == ("failed", "failed")
    assert ended.attempt.metadata is not None
    error = ended.attempt.metadata["error"]
    assert error["type"] == "LookupError"
    assert error["message"] == "no such \\ud800 thing"
    assert "in fail" in error["traceback"]
    assert await names_of(store, ended) == ["before"]


@pytest.mark.parametrize("error", [SystemExit(2), GeneratorExit(), asyncio.CancelledError(), StopIteration()])
@pytest.mark.parametrize("make_async", [True, False])
async def test_an_agent_that_wants_to_end_everything_only_fails(
    store: UnreliableStore, make_async: bool, error: BaseException
) -> None:
    def fail(task: Any) -> None:
        raise error

    async def fail_async(task: Any) -> None:
        raise error

    ended = await run_one(store, fail_async if make_async else fail)
    assert ended.attempt.status == "failed"
    assert ended.attempt.metadata is not None
    # a coroutine turns StopIteration into a RuntimeError by itself
    assert ended.attempt.metadata["error"]["type"] in (type(error).__name__, "RuntimeError")


async def test_a_failed_attempt_is_retried_as_configured(store: UnreliableStore) -> None:
    attempts: list[int] = []

    async def agent(task: Any, rollout: AttemptedRollout) -> None:
        attempts.append(rollout.attempt.sequence_id)
        if len(attempts) < 3:
            raise RuntimeError("not yet")

    config = RolloutConfig(max_attempts=3, retry_condition=["failed"])
    ended = await run_one(store, agent, config=config)
    assert attempts == [1, 2, 3]
    assert ended.status == "succeeded"


async def test_a_missing_parameter_fails_the_attempt_naming_what_there_is(store: UnreliableStore) -> None:
    await store.add_resources({"model": LLM(endpoint="http://x")})
    ended = await run_one(store, rollout(lambda task, weights: None))
    assert ended.attempt.metadata is not None
    assert "'model' (llm)" in ended.attempt.metadata["error"]["message"]


async def test_an_agent_is_given_the_newest_version_of_the_resources_the_rollout_is_bound_to(
    store: UnreliableStore,
) -> None:
    seen: list[str] = []

    async def agent(task: Any, prompt: PromptTemplate) -> None:
        seen.append(prompt.template)

    bound = await store.add_resources({"prompt": PromptTemplate(template="one")})
    async with running(store, agent):
        await finished(store, await store.enqueue_rollout("x", resources_id=bound.resources_id))
        await store.update_resources(bound.resources_id, {"prompt": PromptTemplate(template="two")})
        await store.add_resources({"prompt": PromptTemplate(template="another")})
        await finished(store, await store.enqueue_rollout("x", resources_id=bound.resources_id))
        await finished(store, await store.enqueue_rollout("x"))
    assert seen == ["one", "two", "another"]


async def test_resources_that_do_not_exist_fail_the_attempt() -> None:
    from lightning.store.backends import InMemoryLightningStore

    store = InMemoryLightningStore(validate_resources=False)
    enqueued = await store.enqueue_rollout("x", resources_id="rs-gone")
    async with running(store, async_agent):
        (ended,) = await finished(store, enqueued)
    assert isinstance(ended, AttemptedRollout)
    assert ended.attempt.metadata is not None
    assert "rs-gone" in ended.attempt.metadata["error"]["message"]
    await store.close()


async def test_a_plain_function_may_return_an_awaitable(store: UnreliableStore) -> None:
    def agent(task: Any) -> Any:
        return async_agent(task)

    ended = await run_one(store, agent)
    assert ended.status == "succeeded"
    assert find_final_reward(await store.query_spans(ended.rollout_id)) == 0.5


@pytest.mark.parametrize("value", [1, True, 0.25])
async def test_a_returned_number_is_the_final_reward(store: UnreliableStore, value: float) -> None:
    def agent(task: Any) -> float:
        emit_reward(99.0)
        return value

    ended = await run_one(store, agent)
    assert find_final_reward(await store.query_spans(ended.rollout_id)) == float(value)


async def test_returned_spans_are_stored_as_the_attempts(store: UnreliableStore) -> None:
    def agent(task: Any) -> list[Any]:
        span = TRACER.start_span("recorded anyway")
        span.end()
        assert isinstance(span, ReadableSpan)
        by_hand = Span(
            rollout_id="?", attempt_id="?", sequence_id=0, trace_id="1" * 32, span_id="2" * 16, name="by hand"
        )
        return [span, by_hand]

    ended = await run_one(store, agent)
    assert sorted(await names_of(store, ended)) == ["by hand", "recorded anyway"]


@pytest.mark.parametrize("value", ["great", {"a": 1}, [1.0], object()])
async def test_anything_else_that_is_returned_fails_the_attempt(store: UnreliableStore, value: Any) -> None:
    ended = await run_one(store, rollout(lambda task: value))
    assert ended.status == "failed"
    assert ended.attempt.metadata is not None
    assert "the agent returned a" in ended.attempt.metadata["error"]["message"]


async def test_spans_that_could_not_be_stored_are_counted_in_the_result(store: UnreliableStore) -> None:
    def agent(task: Any) -> list[Span]:
        ids = {"rollout_id": "?", "attempt_id": "?", "trace_id": "1" * 32, "span_id": "2" * 16}
        return [Span(sequence_id=0, name="bad", attributes={"x": object()}, **ids)]

    ended = await run_one(store, agent)
    assert ended.status == "succeeded"
    assert ended.attempt.metadata == {"spans_refused": 1}


# --- The end ---------------------------------------------------------------------------------------------------


async def test_the_runner_returns_after_max_rollouts(store: UnreliableStore) -> None:
    for number in range(6):
        await store.enqueue_rollout(number)
    runner = AgentRunner(store=store, agent=async_agent, max_rollouts=3, concurrency=2)
    for done in (3, 6):
        await asyncio.wait_for(runner.run(), DEADLINE_SECONDS)
        statuses = [one.status for one in await store.query_rollouts()]
        assert statuses == ["succeeded"] * done + ["queuing"] * (6 - done)


async def test_an_event_that_is_set_already_means_no_work(store: UnreliableStore) -> None:
    event = threading.Event()
    event.set()
    await AgentRunner(store=store, agent=async_agent).run(event)
    assert store.calls["claim_rollouts"] == 0


async def test_an_event_ends_an_idle_runner_at_once(store: UnreliableStore) -> None:
    runner = AgentRunner(store=store, agent=async_agent)
    event = threading.Event()
    work = asyncio.create_task(runner.run(event))
    await store.wait_for_calls("claim_rollouts")
    before = time.monotonic()
    event.set()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert time.monotonic() - before < 0.5


async def test_when_the_event_is_set_work_in_hand_may_end(store: UnreliableStore) -> None:
    event = threading.Event()

    async def agent(task: Any) -> float:
        event.set()
        await asyncio.sleep(0.05)
        return 1.0

    enqueued = await store.enqueue_rollout("x")
    waiting = await store.enqueue_rollout("y")
    await asyncio.wait_for(AgentRunner(store=store, agent=agent).run(event), DEADLINE_SECONDS)
    (ended,) = await finished(store, enqueued)
    assert ended.status == "succeeded"
    left = await store.get_rollout_by_id(waiting.rollout_id)
    assert left is not None
    assert left.status == "queuing"


async def test_work_that_outlasts_the_grace_is_interrupted_and_given_back(store: UnreliableStore) -> None:
    event = threading.Event()

    async def agent(task: Any) -> None:
        event.set()
        await asyncio.sleep(3600)

    config = RolloutConfig(max_attempts=2, retry_condition=["unresponsive"])
    enqueued = await store.enqueue_rollout("x", config=config)
    await asyncio.wait_for(
        AgentRunner(store=store, agent=agent, stop_grace=0.05).run(event), DEADLINE_SECONDS
    )
    left = await store.get_rollout_by_id(enqueued.rollout_id)
    assert isinstance(left, AttemptedRollout)
    assert (left.status, left.attempt.status) == ("requeuing", "unresponsive")
    assert left.attempt.metadata == {"interrupted": "its runner was stopped"}


async def test_a_worker_that_could_not_listen_listens_again(store: UnreliableStore) -> None:
    class Superseding(UnreliableStore):
        superseded = False

        async def receive_commands(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            if not self.superseded:
                self.superseded = True
                raise RuntimeError("this worker's session was ended: the same process opened another stream")
            return await super().receive_commands(*args, **kwargs)

    superseding = Superseding(store)
    runner = AgentRunner(store=superseding, agent=lambda task: None, heartbeat_interval=0.05)
    work = asyncio.create_task(runner.run())

    async def drain() -> None:
        while not await store.send_command(Drain(reason="test"), runner.worker_id):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await asyncio.wait_for(drain(), DEADLINE_SECONDS)
    await asyncio.wait_for(work, DEADLINE_SECONDS)


async def test_a_drain_lets_work_end_and_takes_no_more(store: UnreliableStore) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def agent(task: Any) -> None:
        begun.set()
        await go_on.wait()

    one, other = await store.enqueue_rollout(1), await store.enqueue_rollout(2)
    runner = AgentRunner(store=store, agent=agent)
    work = asyncio.create_task(runner.run())
    await asyncio.wait_for(begun.wait(), DEADLINE_SECONDS)
    await store.wait_for_calls("receive_commands")
    assert await store.send_command(Drain(reason="test"), runner.worker_id) == 1
    await store.wait_for_calls("receive_commands", 2)  # the first one brought it
    assert not work.done()
    go_on.set()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert [(await store.get_rollout_by_id(r.rollout_id)).status for r in (one, other)] == [  # type: ignore[union-attr]
        "succeeded",
        "queuing",
    ]


async def test_drain_can_be_asked_of_the_runner_itself(store: UnreliableStore) -> None:
    runner = AgentRunner(store=store, agent=async_agent)
    work = asyncio.create_task(runner.run())
    await store.wait_for_calls("claim_rollouts")
    threading.Thread(target=runner.drain).start()
    await asyncio.wait_for(work, DEADLINE_SECONDS)


async def test_a_stop_command_interrupts_and_ends_the_runner(store: UnreliableStore) -> None:
    begun = asyncio.Event()

    async def agent(task: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    enqueued = await store.enqueue_rollout(1)
    runner = AgentRunner(store=store, agent=agent)
    work = asyncio.create_task(runner.run())
    await asyncio.wait_for(begun.wait(), DEADLINE_SECONDS)
    await store.wait_for_calls("receive_commands")
    await store.send_command(Stop(reason="test"))
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    left = await store.get_rollout_by_id(enqueued.rollout_id)
    assert isinstance(left, AttemptedRollout)
    assert left.attempt.status == "unresponsive"


async def test_cancelling_run_interrupts_and_leaves_nothing_behind(store: UnreliableStore) -> None:
    begun, cleaned_up = asyncio.Event(), asyncio.Event()

    async def agent(task: Any) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned_up.set()

    enqueued = await store.enqueue_rollout(1)
    work = asyncio.create_task(AgentRunner(store=store, agent=agent).run())
    await asyncio.wait_for(begun.wait(), DEADLINE_SECONDS)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert cleaned_up.is_set()
    left = await store.get_rollout_by_id(enqueued.rollout_id)
    assert isinstance(left, AttemptedRollout)
    assert left.attempt.status == "unresponsive"


class LosesAnswers(UnreliableStore):
    """Claims, but does not come to say so before the call is broken off."""

    async def claim_rollouts(self, **arguments: Any) -> Any:
        await self._forward("claim_rollouts", **arguments)
        await asyncio.sleep(3600)


@pytest.mark.parametrize("anothers", [False, True])
async def test_what_a_broken_off_claim_had_claimed_is_executed_unless_it_is_anothers(
    store: UnreliableStore, anothers: bool
) -> None:
    executed: list[Any] = []
    enqueued = [await store.enqueue_rollout(number) for number in range(3)]
    if anothers:  # a process of the same name
        await store.claim_rollouts(limit=1, worker_id="w", instance_id="another")
    loses = LosesAnswers(store)
    runner = AgentRunner(store=loses, agent=executed.append, worker_id="w", concurrency=2)
    work = asyncio.create_task(runner.run())
    await loses.wait_for_answers("claim_rollouts")
    runner.drain()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    assert sorted(executed) == ([1, 2] if anothers else [0, 1])
    statuses = [one.status for one in await store.query_rollouts()]
    assert statuses == (
        ["preparing", "succeeded", "succeeded"] if anothers else ["succeeded", "succeeded", "queuing"]
    )
    assert len(enqueued) == 3


async def test_stop_ends_a_run_that_is_going_on_elsewhere(store: UnreliableStore) -> None:
    runner = AgentRunner(store=store, agent=async_agent)
    await runner.start()
    work = asyncio.create_task(runner.run())
    await store.wait_for_calls("claim_rollouts")
    await asyncio.wait_for(runner.stop(), DEADLINE_SECONDS)
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    await runner.stop()


async def test_a_store_that_was_closed_is_an_error_of_run(store: UnreliableStore) -> None:
    work = asyncio.create_task(AgentRunner(store=store, agent=async_agent).run())
    await store.wait_for_calls("claim_rollouts")
    await store.close()
    with pytest.raises(RuntimeError, match="the store was closed"):
        await asyncio.wait_for(work, DEADLINE_SECONDS)


# --- One task at once ------------------------------------------------------------------------------------------


async def test_step_executes_a_task_outside_the_queue(store: UnreliableStore) -> None:
    queued = await store.enqueue_rollout("queued")
    runner = AgentRunner(store=store, agent=lambda task, p: len(p.template), worker_id="w")
    done = await runner.step("x", resources={"p": PromptTemplate(template="four")}, mode="val")
    assert (done.status, done.mode, done.input) == ("succeeded", "val", "x")
    assert isinstance(done, AttemptedRollout)
    assert done.attempt.worker_id == "w"
    assert find_final_reward(await store.query_spans(done.rollout_id)) == 4.0
    left = await store.get_rollout_by_id(queued.rollout_id)
    assert left is not None
    assert left.status == "queuing"


async def test_step_raises_what_the_agent_raised_after_it_was_reported(store: UnreliableStore) -> None:
    def agent(task: Any) -> None:
        raise LookupError("mine")

    runner = AgentRunner(store=store, agent=agent)
    await runner.start()
    with pytest.raises(LookupError, match="mine"):
        await runner.step("x")
    (failed,) = await store.query_rollouts()
    assert failed.status == "failed"
    await runner.stop()


# --- Misuse ----------------------------------------------------------------------------------------------------


async def test_a_runner_without_an_agent_says_so(store: UnreliableStore) -> None:
    runner = AgentRunner(store=store)
    for attempt in (runner.run(), runner.step("x")):
        with pytest.raises(RuntimeError, match="no agent"):
            await attempt
    with pytest.raises(RuntimeError, match="is not started"):
        await runner.heartbeat()


async def test_a_runner_is_started_once(store: UnreliableStore) -> None:
    runner = AgentRunner(store=store)
    await runner.start()
    with pytest.raises(RuntimeError, match="started already"):
        await runner.start()
    await runner.stop()
    await runner.start()
    await runner.stop()


async def test_a_start_that_is_cancelled_leaves_nothing_behind(store: UnreliableStore) -> None:
    store.away = True
    runner = AgentRunner(store=store, agent=async_agent)
    starting = asyncio.create_task(runner.start())
    await store.wait_for_calls("send_heartbeat")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, DEADLINE_SECONDS)
    store.away = False
    await runner.step("x")


@pytest.mark.parametrize(
    "setting",
    [
        {"concurrency": 0},
        {"max_rollouts": 0},
        {"heartbeat_interval": 0},
        {"heartbeat_interval": float("nan")},
        {"interval_jitter": -1},
        {"interrupt_grace": -1},
        {"stop_grace": float("inf")},
        {"worker_id": ""},
        {"heartbeat_launch_mode": "process"},
    ],
)
async def test_a_setting_out_of_range_is_refused_by_name(
    store: UnreliableStore, setting: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        AgentRunner(store=store, agent=async_agent, **setting)


async def test_a_hook_that_is_none_is_refused(store: UnreliableStore) -> None:
    with pytest.raises(TypeError, match="a hook must be a Hook"):
        AgentRunner(store=store, agent=async_agent, hooks=[print])  # type: ignore[list-item]


async def test_thread_mode_needs_a_thread_safe_store_and_is_the_default_where_there_is_one(
    store: UnreliableStore,
) -> None:
    unsafe = UnreliableStore(store, thread_safe=False)
    with pytest.raises(ValueError, match="LightningStoreThreaded"):
        AgentRunner(store=unsafe, agent=async_agent, heartbeat_launch_mode="thread")
    ended = await run_one(unsafe, async_agent)
    assert ended.status == "succeeded"


async def test_the_worker_id_can_be_asked_for(store: LightningStore) -> None:
    runner = AgentRunner(store=store, worker_id="worker-01")
    assert runner.get_worker_id() == runner.worker_id == "worker-01"
