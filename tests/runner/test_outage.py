"""A store that is out of reach for a while costs time, not work."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from opentelemetry import trace

from lightning.backoff import Backoff
from lightning.runner import AgentRunner
from lightning.testing.unreliable import UnreliableStore
from lightning.tracing import find_final_reward
from lightning.types import AttemptedRollout, PromptTemplate

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 15.0
TRACER = trace.get_tracer("tests")


async def test_an_idle_runner_waits_for_the_store_and_says_so_once(
    store: UnreliableStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.away = True
    runner = AgentRunner(store=store, agent=lambda task: 1.0, max_rollouts=1)
    work = asyncio.create_task(runner.run())
    await store.wait_for_calls("get_worker_by_id", 2)  # whether the claim came through
    store.away = False
    enqueued = await store.enqueue_rollout("x")
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    (ended,) = await store.wait_for_rollouts(rollout_ids=[enqueued.rollout_id], timeout=0)
    assert ended.status == "succeeded"
    said = [record.message for record in caplog.records if "waits for the store" in record.message]
    assert len(said) == 1


async def test_a_claim_that_waits_when_the_store_goes_away_is_repeated(store: UnreliableStore) -> None:
    runner = AgentRunner(store=store, agent=lambda task: 1.0, max_rollouts=1)
    work = asyncio.create_task(runner.run())
    await store.wait_for_calls("claim_rollouts", 1)
    store.away = True
    await store.wait_for_calls("get_worker_by_id", 1)
    store.away = False
    await store.enqueue_rollout("x")
    await asyncio.wait_for(work, DEADLINE_SECONDS)


async def test_what_a_claim_had_claimed_whose_answer_was_lost_is_executed(store: UnreliableStore) -> None:
    class LosesAnAnswer(UnreliableStore):
        async def claim_rollouts(self, **arguments: Any) -> Any:
            claimed = await self._forward("claim_rollouts", **arguments)
            if self.calls["claim_rollouts"] == 1:
                raise ConnectionError("the reply was lost, and so were those to its repeats")
            return claimed

    executed: list[int] = []
    for number in range(4):
        await store.enqueue_rollout(number)
    runner = AgentRunner(store=LosesAnAnswer(store), agent=executed.append, concurrency=2, max_rollouts=4)
    await asyncio.wait_for(runner.run(), DEADLINE_SECONDS)
    assert sorted(executed) == [0, 1, 2, 3]
    assert {one.status for one in await store.query_rollouts()} == {"succeeded"}
    assert len(await store.query_attempts((await store.query_rollouts())[0].rollout_id)) == 1


async def test_work_goes_on_while_the_store_is_away_and_all_of_it_arrives(store: UnreliableStore) -> None:
    async def agent(task: Any, prompt: PromptTemplate) -> float:
        store.away = True
        for number in range(20):
            with TRACER.start_as_current_span(f"s{number}"):
                await asyncio.sleep(0)
        return 1.0

    await store.add_resources({"prompt": PromptTemplate(template="x")})
    enqueued = await store.enqueue_rollout("x")
    work = asyncio.create_task(AgentRunner(store=store, agent=agent, max_rollouts=1).run())
    await store.wait_for_calls("deliver_spans", 3)
    assert store.calls["update_attempt"] == 0
    store.away = False
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    (ended,) = await store.wait_for_rollouts(rollout_ids=[enqueued.rollout_id], timeout=0)
    assert isinstance(ended, AttemptedRollout)
    assert (ended.status, ended.attempt.metadata) == ("succeeded", None)
    spans = await store.query_spans(enqueued.rollout_id)
    assert [span.name for span in spans] == [f"s{n}" for n in range(20)] + ["agentlightning.annotation"]
    assert find_final_reward(spans) == 1.0


async def test_a_result_waits_for_the_store(store: UnreliableStore) -> None:
    class LosesReports(UnreliableStore):
        failures = 2

        async def update_attempt(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            self.calls["update_attempt"] += 1
            if self.calls["update_attempt"] <= self.failures:
                raise ConnectionError("away")
            return await store.update_attempt(*args, **kwargs)

    loses = LosesReports(store)
    await store.enqueue_rollout("x")
    await asyncio.wait_for(
        AgentRunner(store=loses, agent=lambda task: 1.0, max_rollouts=1).run(), DEADLINE_SECONDS
    )
    assert loses.calls["update_attempt"] == 3
    assert [one.status for one in await store.query_rollouts()] == ["succeeded"]


async def test_resources_wait_for_the_store(store: UnreliableStore) -> None:
    class LosesResources(UnreliableStore):
        async def get_resources_by_id(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            self.calls["get_resources_by_id"] += 1
            if self.calls["get_resources_by_id"] == 1:
                raise ConnectionError("away")
            return await store.get_resources_by_id(*args, **kwargs)

    loses = LosesResources(store)
    await store.add_resources({"prompt": PromptTemplate(template="x")})
    await store.enqueue_rollout("x")
    runner = AgentRunner(store=loses, agent=lambda task, prompt: 1.0, max_rollouts=1)
    await asyncio.wait_for(runner.run(), DEADLINE_SECONDS)
    assert [one.status for one in await store.query_rollouts()] == ["succeeded"]


async def test_a_report_that_is_refused_costs_the_result_and_not_the_runner(
    store: UnreliableStore, caplog: pytest.LogCaptureFixture
) -> None:
    class Refuses(UnreliableStore):
        async def update_attempt(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            raise ValueError("unknown attempt")

    await store.enqueue_rollout("x")
    await store.enqueue_rollout("y")
    runner = AgentRunner(store=Refuses(store), agent=lambda task: 1.0, max_rollouts=2)
    await asyncio.wait_for(runner.run(), DEADLINE_SECONDS)
    assert sum("was refused" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("idle", [True, False])
async def test_a_runner_can_be_stopped_while_the_store_is_away(
    store: UnreliableStore,
    idle: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in (
        "attempt._LAST_SPANS_SECONDS",
        "attempt._LAST_REPORT_SECONDS",
        "agent._LAST_HEARTBEAT_SECONDS",
    ):
        monkeypatch.setattr(f"lightning.runner.{name}", 0.05)
    event = threading.Event()

    async def agent(task: Any) -> float:
        store.away = True
        return 1.0

    runner = AgentRunner(store=store, agent=agent, stop_grace=0.05)
    work = asyncio.create_task(runner.run(event))
    await store.wait_for_calls("claim_rollouts")
    if idle:
        store.away = True
    else:
        await store.enqueue_rollout("x")
        await store.wait_for_calls("deliver_spans")
    event.set()
    await asyncio.wait_for(work, DEADLINE_SECONDS)
    messages = [record.message for record in caplog.records]
    assert any("gave up sending 1 spans" in message for message in messages) is not idle
    assert any("cannot be reported" in message for message in messages) is not idle


def test_delays_double_up_to_a_limit_and_start_over() -> None:
    backoff = Backoff()
    delays = [backoff.next_delay() for _ in range(10)]
    for number, delay in enumerate(delays):
        longest = min(0.1 * 2**number, 2.0)
        assert longest / 2 <= delay <= longest
    backoff.recovered()
    assert backoff.next_delay() <= 0.1
