"""Hooks: when they are called, with what, and what they cannot break."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace

from lightning.runner import AgentRunner, Hook
from lightning.testing.unreliable import UnreliableStore
from lightning.types import AttemptedRollout

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0
TRACER = trace.get_tracer("tests")


class Recorder(Hook):
    """Notes what it is called with."""

    def __init__(self, log: list[str], name: str = "") -> None:
        self.log = log
        self.name = name
        self.given: dict[str, dict[str, Any]] = {}

    async def _note(self, what: str, given: dict[str, Any]) -> None:
        self.log.append(f"{self.name}{what}")
        self.given[what] = given

    async def on_rollout_start(self, **given: Any) -> None:
        await self._note("rollout start", given)

    async def on_trace_start(self, **given: Any) -> None:
        TRACER.start_span("by on_trace_start").end()
        await self._note("trace start", given)

    async def on_trace_end(self, **given: Any) -> None:
        TRACER.start_span("by on_trace_end").end()
        await self._note("trace end", given)

    async def on_rollout_end(self, **given: Any) -> None:
        await self._note("rollout end", given)


async def execute(store: UnreliableStore, agent: Any, hooks: list[Hook]) -> AttemptedRollout:
    enqueued = await store.enqueue_rollout("x")
    runner = AgentRunner(store=store, agent=agent, hooks=hooks, max_rollouts=1)
    await asyncio.wait_for(runner.run(), DEADLINE_SECONDS)
    ended = await store.get_rollout_by_id(enqueued.rollout_id)
    assert isinstance(ended, AttemptedRollout)
    return ended


async def test_hooks_are_called_around_the_agent_in_the_order_of_an_onion(store: UnreliableStore) -> None:
    log: list[str] = []
    hooks: list[Hook] = [Recorder(log, "1 "), Recorder(log, "2 ")]
    await execute(store, lambda task: log.append("agent"), hooks)
    assert log == [
        *("1 rollout start", "2 rollout start", "1 trace start", "2 trace start"),
        "agent",
        *("2 trace end", "1 trace end", "2 rollout end", "1 rollout end"),
    ]


async def test_hooks_are_given_who_does_what_and_in_the_end_the_spans(store: UnreliableStore) -> None:
    hook = Recorder([])

    def agent(task: Any) -> float:
        TRACER.start_span("by the agent").end()
        return 1.0

    ended = await execute(store, agent, [hook])
    for what, names in (
        ("rollout start", {"agent", "runner", "rollout"}),
        ("trace start", {"agent", "runner", "tracer", "rollout"}),
        ("trace end", {"agent", "runner", "tracer", "rollout"}),
        ("rollout end", {"agent", "runner", "rollout", "spans"}),
    ):
        assert set(hook.given[what]) == names
        assert hook.given[what]["rollout"].rollout_id == ended.rollout_id
        assert isinstance(hook.given[what]["runner"], AgentRunner)
    spans = hook.given["rollout end"]["spans"]
    assert [span.name for span in spans] == [
        "by on_trace_start",
        "by the agent",
        "agentlightning.annotation",
        "by on_trace_end",
    ]
    assert [span.sequence_id for span in spans] == [1, 2, 3, 4]


async def test_the_spans_are_read_only_if_a_hook_wants_them(store: UnreliableStore) -> None:
    class Start(Hook):
        async def on_rollout_start(self, **given: Any) -> None: ...

    await execute(store, lambda task: None, [Start()])
    assert store.calls["query_spans"] == 0


@pytest.mark.parametrize("name", ["on_rollout_start", "on_trace_start", "on_trace_end", "on_rollout_end"])
async def test_a_hook_that_raises_is_logged_and_changes_nothing(
    store: UnreliableStore, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    async def fail(**given: Any) -> None:
        raise LookupError("by a hook")

    broken = Hook()
    setattr(broken, name, fail)
    log: list[str] = []
    ended = await execute(store, lambda task: log.append("agent"), [broken, Recorder(log)])
    assert ended.status == "succeeded"
    assert log == ["rollout start", "trace start", "agent", "trace end", "rollout end"]
    assert any("by a hook" in (record.exc_text or "") for record in caplog.records)


async def test_hooks_are_ended_when_the_agent_fails(store: UnreliableStore) -> None:
    log: list[str] = []

    def agent(task: Any) -> None:
        raise LookupError

    ended = await execute(store, agent, [Recorder(log)])
    assert ended.status == "failed"
    assert log == ["rollout start", "trace start", "trace end", "rollout end"]


async def test_hooks_are_ended_when_the_attempt_is_cancelled(store: UnreliableStore) -> None:
    log: list[str] = []

    async def agent(task: Any, rollout: AttemptedRollout) -> None:
        await store.update_rollout(rollout.rollout_id, status="cancelled")
        await asyncio.sleep(3600)

    runner = AgentRunner(store=store, agent=agent, hooks=[Recorder(log)], max_rollouts=1)
    await runner.start()
    await store.wait_for_calls("receive_commands")
    enqueued = await store.enqueue_rollout("x")
    await asyncio.wait_for(runner.run(), DEADLINE_SECONDS)
    await runner.stop()
    ended = await store.get_rollout_by_id(enqueued.rollout_id)
    assert ended is not None
    assert ended.status == "cancelled"
    assert log == ["rollout start", "trace start", "trace end", "rollout end"]


async def test_spans_that_cannot_be_read_are_none(
    store: UnreliableStore, caplog: pytest.LogCaptureFixture
) -> None:
    class Evicting(UnreliableStore):
        async def query_spans(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            raise RuntimeError("the spans were evicted")

    hook = Recorder([])
    await execute(Evicting(store), lambda task: 1.0, [hook])
    assert list(hook.given["rollout end"]["spans"]) == []
    assert any("cannot be read for the hooks" in record.message for record in caplog.records)
