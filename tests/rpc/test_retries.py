"""Networks that lose answers, servers that go away: nothing happens twice, and nothing is misreported."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer, StoreUnavailableError
from lightning.store import InMemoryLightningStore
from lightning.store.contract import LightningStore
from lightning.store.forwarding import ForeignStore
from lightning.testing import make_span
from lightning.testing.proxy import TcpProxy
from lightning.testing.unreliable import UnreliableStore
from lightning.types import LLM, CancelAttempt, Stop, WorkerHeartbeat

pytestmark = pytest.mark.anyio

Lose = Callable[[str, Callable[[LightningStoreClient], Awaitable[Any]]], Awaitable[Any]]


@pytest.fixture
def through_proxy(proxy: TcpProxy, connect: Any) -> Callable[..., Awaitable[LightningStoreClient]]:
    """Makes a client that reaches the server by the proxy only."""

    async def make(**options: Any) -> LightningStoreClient:
        client: LightningStoreClient = connect(await proxy.start(), **options)
        await client.wait_until_ready(10)
        return client

    return make


@pytest.fixture
async def lose_answer(
    proxy: TcpProxy, store: UnreliableStore, through_proxy: Callable[..., Awaitable[LightningStoreClient]]
) -> Lose:
    """Makes a call whose first answer is lost with its connection, after the store has answered."""
    client = await through_proxy()

    async def call(verb: str, make: Callable[[LightningStoreClient], Awaitable[Any]]) -> Any:
        count = store.answers[verb]
        proxy.swallows_answers = True
        pending = asyncio.ensure_future(make(client))
        await store.wait_for_answers(verb, count + 1)
        proxy.swallows_answers = False
        proxy.cut()
        return await asyncio.wait_for(pending, 30)

    return call


async def test_a_lost_answer_never_enqueues_twice(lose_answer: Lose, server: LightningStoreServer) -> None:
    rollout = await lose_answer("enqueue_many_rollouts", lambda client: client.enqueue_rollout("task"))
    assert [found.rollout_id for found in await server.query_rollouts()] == [rollout.rollout_id]


async def test_a_lost_answer_never_claims_twice(lose_answer: Lose, server: LightningStoreServer) -> None:
    first = await server.enqueue_rollout("first")
    second = await server.enqueue_rollout("second")
    claimed = await lose_answer("dequeue_many_rollouts", lambda client: client.dequeue_rollout("w"))
    assert claimed.rollout_id == first.rollout_id
    assert [a.attempt_id for a in await server.query_attempts(first.rollout_id)] == [
        claimed.attempt.attempt_id
    ]
    assert (await server.get_rollout_by_id(second.rollout_id)).status == "queuing"  # type: ignore[union-attr]


async def test_a_lost_answer_to_a_long_poll_never_claims_twice(
    lose_answer: Lose, server: LightningStoreServer
) -> None:
    first = await server.enqueue_rollout("first")
    await server.enqueue_rollout("second")
    (claimed,) = await lose_answer(
        "claim_rollouts", lambda client: client.claim_rollouts(worker_id="w", instance_id="i", timeout=10)
    )
    assert claimed.rollout_id == first.rollout_id
    assert (await server.statistics())["rollouts_by_status"]["queuing"] == 1


async def test_a_lost_answer_never_does_anything_twice(
    lose_answer: Lose, server: LightningStoreServer
) -> None:
    started = await lose_answer("start_rollout", lambda client: client.start_rollout("task", worker_id="w"))
    assert (await server.query_rollouts()).total == 1
    ids = (started.rollout_id, started.attempt.attempt_id)

    retried = await lose_answer("start_attempt", lambda client: client.start_attempt(ids[0]))
    assert retried.attempt.sequence_id == 2
    assert (await server.query_attempts(ids[0])).total == 2

    assert (
        await lose_answer("get_many_span_sequence_ids", lambda client: client.get_next_span_sequence_id(*ids))
        == 1
    )
    assert await server.get_next_span_sequence_id(*ids) == 2

    span = make_span(started)
    stored = await lose_answer("add_many_spans", lambda client: client.add_span(span))
    assert stored.span_id == span.span_id, "the span that the lost call stored is no duplicate"
    assert (await server.query_spans(ids[0])).total == 1

    added = await lose_answer("add_resources", lambda client: client.add_resources({"m": LLM(endpoint="e")}))
    updated = await lose_answer(
        "update_resources",
        lambda client: client.update_resources(added.resources_id, {"m": LLM(endpoint="f")}),
    )
    assert updated.version == 2
    assert (await server.query_resources()).total == 2


async def test_a_store_that_knows_no_requests_is_protected_by_the_server(serve: Any, connect: Any) -> None:
    """The table of outcomes, alone: this store would enqueue a second time."""

    class Forgetful(ForeignStore):
        def __init__(self) -> None:
            super().__init__(InMemoryLightningStore())
            self.enqueued = 0

        async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
            self.enqueued += verb == "enqueue_many_rollouts"
            from lightning.store.idempotency import request

            with request(None):
                return await super()._forward(verb, *args, **kwargs)

    store = UnreliableStore(Forgetful())
    server = await serve(store)
    proxy = TcpProxy(server.port)
    client = connect(await proxy.start())
    await client.wait_until_ready(10)
    proxy.swallows_answers = True
    pending = asyncio.ensure_future(client.enqueue_rollout("task"))
    await store.wait_for_answers("enqueue_many_rollouts")
    proxy.swallows_answers = False
    proxy.cut()
    rollout = await pending
    assert [found.rollout_id for found in await server.query_rollouts()] == [rollout.rollout_id]
    await proxy.close()


async def test_a_repeat_joins_a_call_that_is_still_at_work(serve: Any, connect: Any) -> None:
    class Slow(InMemoryLightningStore):
        def __init__(self) -> None:
            super().__init__()
            self.begun = asyncio.Event()
            self.may_end = asyncio.Event()
            self.calls = 0

        async def add_resources(self, resources: Any) -> Any:
            self.calls += 1
            self.begun.set()
            await self.may_end.wait()
            return await super().add_resources(resources)

    store = Slow()
    server: LightningStoreServer = await serve(store)
    proxy = TcpProxy(server.port)
    client = connect(await proxy.start())
    await client.wait_until_ready(10)
    pending = asyncio.ensure_future(client.add_resources({}))
    loop_of_server = server._running.thread  # type: ignore[union-attr]
    await asyncio.wait_for(loop_of_server.run(store.begun.wait()), 10)
    proxy.cut()
    await proxy.wait_for_connections(2)

    async def let_end() -> None:
        store.may_end.set()

    await loop_of_server.run(let_end())
    assert (await asyncio.wait_for(pending, 30)).version == 1
    assert store.calls == 1
    await proxy.close()


async def test_a_read_is_repeated(
    proxy: TcpProxy, through_proxy: Any, server: LightningStoreServer, store: UnreliableStore
) -> None:
    await server.enqueue_rollout("task")
    client = await through_proxy()
    for verb, read in (("statistics", client.statistics), ("query_rollouts", client.query_rollouts)):
        proxy.swallows_answers = True
        count = store.answers[verb]
        pending = asyncio.ensure_future(read())
        await store.wait_for_answers(verb, count + 1)
        proxy.swallows_answers = False
        proxy.cut()
        await asyncio.wait_for(pending, 30)


async def test_a_claim_that_nobody_waits_for_ends(
    proxy: TcpProxy, through_proxy: Any, server: LightningStoreServer, store: UnreliableStore
) -> None:
    """A runner that died in a long poll must not be handed the next rollout."""
    client = await through_proxy(retry_delays=())
    pending = asyncio.ensure_future(client.claim_rollouts(worker_id="dead"))
    await store.wait_for_calls("claim_rollouts")
    proxy.cut()
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(pending, 10)
    await no_claim_waits(server)
    rollout = await server.enqueue_rollout("task")
    (claimed,) = await server.claim_rollouts(worker_id="alive", timeout=10)
    assert (claimed.rollout_id, claimed.attempt.worker_id) == (rollout.rollout_id, "alive")


async def test_a_cancelled_claim_ends_on_the_server(
    server: LightningStoreServer, client: LightningStoreClient, store: UnreliableStore
) -> None:
    pending = asyncio.ensure_future(client.claim_rollouts(worker_id="bored"))
    await store.wait_for_calls("claim_rollouts")
    pending.cancel()
    await asyncio.gather(pending, return_exceptions=True)
    await no_claim_waits(server)
    await server.enqueue_rollout("task")
    (claimed,) = await server.claim_rollouts(worker_id="alive", timeout=10)
    assert claimed.attempt.worker_id == "alive"


async def no_claim_waits(server: LightningStoreServer) -> None:
    """Wait until the server has noticed that a caller is gone."""
    running = server._running
    assert running is not None

    await asyncio.wait_for(running.thread.run(running.service._in_flight.ended.wait()), 10)


# --- The server is away ----------------------------------------------------------------------------------------


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


CALLS: dict[str, Callable[[LightningStore], Awaitable[Any]]] = {
    "get": lambda store: store.get_rollout_by_id("ro-1"),
    "dequeue": lambda store: store.dequeue_rollout(),
    "claim": lambda store: store.claim_rollouts(timeout=0.1),
    "wait": lambda store: store.wait_for_rollouts(rollout_ids=["ro-1"], timeout=0.1),
    "enqueue": lambda store: store.enqueue_rollout(1),
    "query": lambda store: store.query_rollouts(),
    "commands": lambda store: store.receive_commands("w", timeout=0.1),
    "heartbeat": lambda store: store.send_heartbeat(WorkerHeartbeat(worker_id="w", instance_id="i")),
    "statistics": lambda store: store.statistics(),
}


@pytest.mark.parametrize("call", CALLS)
async def test_unreachable_is_never_reported_as_nothing_there(call: str, connect: Any) -> None:
    address = f"127.0.0.1:{unused_port()}"
    client = connect(address)
    with pytest.raises(StoreUnavailableError, match=f"{address} is unavailable.*4 tries.*lightning store"):
        await CALLS[call](client)


async def test_retries_follow_the_schedule(connect: Any) -> None:
    client = connect(f"127.0.0.1:{unused_port()}", retry_delays=(0.1, 0.2), health_retry_delays=(0.05,))
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="3 tries"):
        await client.statistics()
    assert 0.3 < time.monotonic() - began < 5


async def test_the_last_word_of_a_storage_that_is_out_of_reach(
    client: LightningStoreClient, store: UnreliableStore
) -> None:
    store.away = True
    with pytest.raises(StoreUnavailableError, match="the store is out of reach, as the test wants it"):
        await client.enqueue_rollout(1)
    assert (
        store.calls["enqueue_many_rollouts"] == 1
    )  # the server's health says that the others would be in vain
    store.away = False
    assert (await client.enqueue_rollout(1)).status == "queuing"


async def test_an_error_of_the_application_is_not_repeated(
    client: LightningStoreClient, store: UnreliableStore
) -> None:
    with pytest.raises(ValueError, match="ro-1"):
        await client.start_attempt("ro-1")
    assert store.calls["start_attempt"] == 1


async def test_a_server_that_starts_late_is_found(connect: Any, serve: Any) -> None:
    port = unused_port()
    client = connect(f"127.0.0.1:{port}", retry_delays=(0.05,) * 100)
    call = asyncio.ensure_future(client.enqueue_rollout("early"))
    ready = asyncio.ensure_future(client.wait_until_ready(30))
    server = await serve(port=port)
    await asyncio.wait_for(ready, 30)
    await asyncio.wait_for(call, 30)
    assert (await server.statistics())["total_rollouts"] == 1


async def test_waiting_for_a_server_ends_with_the_time(connect: Any) -> None:
    client = connect(f"127.0.0.1:{unused_port()}")
    with pytest.raises(StoreUnavailableError, match="no store answered"):
        await client.wait_until_ready(0.1)


async def test_a_server_that_does_not_answer_is_unavailable(connect: Any) -> None:
    """It accepts connections, and that is all."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = connect(
            f"127.0.0.1:{silent.getsockname()[1]}",
            retry_delays=(0.01,),
            health_retry_delays=(),
            request_timeout=0.2,
            connection_timeout=0.2,
        )
        with pytest.raises(StoreUnavailableError):
            await asyncio.wait_for(client.statistics(), 10)


async def test_long_calls_survive_a_restart_of_the_server(
    server: LightningStoreServer, store: UnreliableStore, connect: Any
) -> None:
    client = connect(server.endpoint, retry_delays=(0.05,) * 100)
    rollout = await client.start_rollout("task")
    claim = asyncio.ensure_future(client.claim_rollouts(worker_id="w"))
    wait = asyncio.ensure_future(client.wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
    commands = asyncio.ensure_future(client.receive_commands("w", instance_id="i"))
    await store.wait_for_calls("claim_rollouts")
    await store.wait_for_calls("wait_for_rollouts")
    await store.wait_for_calls("receive_commands", 2)
    await server.stop()
    await server.start()
    await store.wait_for_calls("claim_rollouts", 2)
    await store.wait_for_calls("wait_for_rollouts", 2)
    await store.wait_for_calls(
        "receive_commands", 5
    )  # at the first welcome, then, at the end, then twice anew
    await server.enqueue_rollout("more")
    await server.update_attempt(rollout.rollout_id, "latest", status="succeeded")
    await server.send_command(Stop(reason="over"))
    assert [claimed.input for claimed in await asyncio.wait_for(claim, 30)] == ["more"]
    assert [finished.status for finished in await asyncio.wait_for(wait, 30)] == ["succeeded"]
    assert await asyncio.wait_for(commands, 30) == [Stop(reason="over")]


async def test_a_cut_connection_is_no_stop_for_a_worker(
    proxy: TcpProxy, through_proxy: Any, server: LightningStoreServer, store: UnreliableStore
) -> None:
    client = await through_proxy()
    commands = asyncio.ensure_future(client.receive_commands("w", instance_id="i"))
    await store.wait_for_calls("receive_commands", 2)
    proxy.cut()
    await store.wait_for_calls("receive_commands", 4)
    assert not commands.done()
    cancel = CancelAttempt(rollout_id="ro-1", attempt_id="at-1", status="cancelled")
    assert await server.send_command(cancel, "w") == 1
    assert await asyncio.wait_for(commands, 10) == [cancel]
