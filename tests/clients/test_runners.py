"""The example runners in other languages at work for a store: real programs, on stubs made from `protos/`."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import lightning as lt
from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.rpc.tokens import add_token
from lightning.testing.proxy import TcpProxy
from tests.clients.conftest import CLIENTS, DEADLINE_SECONDS, StartProgram

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]  # the first one builds the runners

SPANS = ["think", "square", "agentlightning.annotation"]


async def said_by(program: asyncio.subprocess.Process) -> str:
    """What a program said until it ended well."""
    said, _ = await asyncio.wait_for(program.communicate(), DEADLINE_SECONDS)
    assert program.returncode == 0, said
    return said.decode()


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    """Ask again and again, for the store tells nobody of heartbeats and first spans."""

    async def ask() -> None:
        while not await condition():  # noqa: ASYNC110  # others are waited for here
            await asyncio.sleep(0.02)

    await asyncio.wait_for(ask(), DEADLINE_SECONDS)


class TryPrompts(lt.Algorithm):
    """Publishes a prompt, hands out work, and reads the rewards."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[float | None] = []
        self.prompts: set[Any] = set()

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        await store.add_resources({"prompt": lt.PromptTemplate(template="square {n}")})
        rollouts = [await store.enqueue_rollout({"n": n}) for n in train_dataset]
        ids = [rollout.rollout_id for rollout in rollouts]
        await store.wait_for_rollouts(rollout_ids=ids, timeout=DEADLINE_SECONDS)
        for rollout_id in ids:
            spans = await store.query_spans(rollout_id, sort_by="sequence_id")
            assert [span.name for span in spans] == SPANS
            assert spans[0].parent_id == spans[1].span_id
            assert type(spans[1].attributes["n"]) is int
            self.rewards.append(lt.find_final_reward(spans))
            self.prompts.add(spans[0].attributes["prompt"])


async def test_an_algorithm_in_python_learns_from_it(
    runner: list[str], start: StartProgram, tmp_path: Path
) -> None:
    """By a store server that is a program too, and that asks for a token."""
    tokens = tmp_path / "tokens.json"
    algorithm_token, _ = add_token(tokens, "algorithm", None, None)
    runner_token, _ = add_token(tokens, "runner", None, None)
    words = ["store", "--port", "0", "--backend", "memory", "--tokens", str(tokens)]
    served = await start(sys.executable, "-um", "lightning", *words)
    assert served.stdout is not None
    greeting = (await asyncio.wait_for(served.stdout.readline(), DEADLINE_SECONDS)).decode()
    found = re.search(r" at (\S+), Ctrl-C ends it", greeting)
    assert found is not None, greeting
    working = await start(*runner, found.group(1), "w-1", LIGHTNING_TOKEN=runner_token)
    client = LightningStoreClient(found.group(1), token=algorithm_token)
    algorithm = TryPrompts()
    algorithm.set_store(client)
    await algorithm.run(train_dataset=range(5))
    assert algorithm.rewards == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert algorithm.prompts == {"square {n}"}
    worker = await client.get_worker_by_id("w-1")
    assert worker is not None
    assert worker.last_heartbeat_time is not None
    await client.close()
    working.send_signal(signal.SIGTERM)
    assert "drained" in await said_by(working)


async def test_a_failure_is_reported_and_tried_again(
    runner: list[str], start: StartProgram, server: LightningStoreServer
) -> None:
    await start(*runner, server.endpoint, "w-1")
    config = lt.RolloutConfig(max_attempts=3, retry_condition=["failed"])
    rollout = await server.enqueue_rollout({"n": 1, "fail": "on purpose"}, config=config)
    (done,) = await server.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=DEADLINE_SECONDS)
    assert done.status == "failed"
    attempts = await server.query_attempts(rollout.rollout_id)
    assert [(attempt.status, attempt.worker_id) for attempt in attempts] == [("failed", "w-1")] * 3


async def test_cancelling_reaches_the_agent_and_heartbeats_keep_it_alive(
    runner: list[str], start: StartProgram, server: LightningStoreServer
) -> None:
    program = await start(*runner, server.endpoint, "w-1")
    rollout = await server.enqueue_rollout({"n": 1, "seconds": 1000})

    async def is_shown_alive() -> bool:
        attempt = await server.get_latest_attempt(rollout.rollout_id)
        if attempt is None or attempt.status != "running" or attempt.last_heartbeat_time is None:
            return False
        seen.add(attempt.last_heartbeat_time)
        return len(seen) > 2  # the span makes one

    seen: set[float] = set()
    await until(is_shown_alive)
    await server.update_rollout(rollout.rollout_id, status="cancelled")
    after = await server.enqueue_rollout({"n": 2})  # nobody else can do it
    (done,) = await server.wait_for_rollouts(rollout_ids=[after.rollout_id], timeout=DEADLINE_SECONDS)
    assert done.status == "succeeded"
    (attempt,) = await server.query_attempts(rollout.rollout_id)
    assert attempt.status == "cancelled"
    program.send_signal(signal.SIGTERM)
    assert f"interrupted: {attempt.attempt_id}" in await said_by(program)


async def test_sigterm_finishes_what_runs_and_claims_no_more(
    runner: list[str], start: StartProgram, server: LightningStoreServer
) -> None:
    program = await start(*runner, server.endpoint, "w-1")
    first = await server.enqueue_rollout({"n": 1, "seconds": 1})

    async def runs() -> bool:
        rollout = await server.get_rollout_by_id(first.rollout_id)
        return rollout is not None and rollout.status == "running"

    await until(runs)
    second = await server.enqueue_rollout({"n": 2})
    program.send_signal(signal.SIGTERM)
    assert "drained" in await said_by(program)
    statuses = [await server.get_rollout_by_id(rollout.rollout_id) for rollout in (first, second)]
    assert [rollout and rollout.status for rollout in statuses] == ["succeeded", "queuing"]


async def test_an_idle_one_drains_when_told_by_the_server(
    runner: list[str], start: StartProgram, server: LightningStoreServer
) -> None:
    program = await start(*runner, server.endpoint, "w-1")

    async def heard() -> bool:
        return await server.send_command(lt.types.Drain(reason="enough"), "w-1") > 0

    await until(heard)
    assert "drained" in await said_by(program)


async def test_a_claim_whose_answer_is_lost_is_asked_for_again(
    runner: list[str], start: StartProgram, server: LightningStoreServer
) -> None:
    proxy = TcpProxy(server.port)
    await start(*runner, await proxy.start(), "w-1")

    async def asks_for_work() -> bool:
        return await server.get_worker_by_id("w-1") is not None

    await until(asks_for_work)
    proxy.swallows_answers = True
    rollout = await server.enqueue_rollout({"n": 3})

    async def is_claimed() -> bool:
        return await server.get_latest_attempt(rollout.rollout_id) is not None

    await until(is_claimed)
    proxy.cut()
    proxy.swallows_answers = False
    (done,) = await server.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=DEADLINE_SECONDS)
    assert done.status == "succeeded"
    assert (await server.query_attempts(rollout.rollout_id)).total == 1
    await proxy.close()


async def test_broken_connections_cost_nothing_and_double_nothing(
    runner: list[str], start: StartProgram, server: LightningStoreServer
) -> None:
    proxy = TcpProxy(server.port)
    program = await start(*runner, await proxy.start(), "w-1")
    rollouts = [await server.enqueue_rollout({"n": n, "seconds": 0.02}) for n in range(40)]
    ids = [rollout.rollout_id for rollout in rollouts]
    async with cutting(proxy):
        done = await server.wait_for_rollouts(rollout_ids=ids, timeout=DEADLINE_SECONDS)
    assert [rollout.status for rollout in done] == ["succeeded"] * 40
    for rollout_id in ids:
        assert (await server.query_attempts(rollout_id)).total == 1
        spans = await server.query_spans(rollout_id, sort_by="sequence_id")
        assert [span.name for span in spans] == SPANS
    assert proxy.connections > 2
    program.send_signal(signal.SIGTERM)
    assert "drained" in await said_by(program)
    await proxy.close()


@asynccontextmanager
async def cutting(proxy: TcpProxy) -> AsyncIterator[None]:
    """Breaks the connections again and again: each time a new one was made and has carried something."""

    async def cut() -> None:
        for count in range(1, 6):
            await proxy.wait_for_connections(count)
            await asyncio.sleep(0.15)
            proxy.cut()

    task = asyncio.create_task(cut())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_opentelemetry_for_node_lands_in_its_attempt(
    node: list[str], start: StartProgram, server: LightningStoreServer
) -> None:
    rollout = await server.start_rollout("task")
    ids = (rollout.rollout_id, rollout.attempt.attempt_id)
    program = await start("node", str(CLIENTS / "node" / "otlp.mjs"), server.endpoint, *ids)
    assert await said_by(program) == ""
    tool, chat = await server.query_spans(rollout.rollout_id, sort_by="sequence_id")
    assert (tool.name, chat.name) == ("tool", "chat")
    assert (tool.parent_id, tool.trace_id) == (chat.span_id, chat.trace_id)
    assert chat.attributes == {"model": "none", "tokens": 3, "ratio": 0.5, "stops": ["a", "b"]}
    assert [(event.name, event.attributes) for event in chat.events] == [("token", {"text": "ä"})]
    assert (chat.status.status_code, chat.status.description) == ("ERROR", "went wrong")
    assert chat.attempt_id == rollout.attempt.attempt_id
