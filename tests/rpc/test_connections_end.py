"""Connections that die without a word, and those that the server ends because of their age."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from lightningpb.v1 import store_service_pb2 as pb

from lightning.rpc import LightningStoreServer, options, sessions
from lightning.store import InMemoryLightningStore
from lightning.testing import make_span
from lightning.testing.proxy import TcpProxy
from lightning.testing.unreliable import UnreliableStore
from lightning.types import Drain

pytestmark = pytest.mark.anyio

SOON_SECONDS = 20


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, SOON_SECONDS)


class Listening(UnreliableStore):
    """Notes when a worker's session is over on the server."""

    def __init__(self) -> None:
        super().__init__(InMemoryLightningStore())
        self.left = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._forward(verb, *args, **kwargs)
        except asyncio.CancelledError:
            if verb == "receive_commands":
                self._loop.call_soon_threadsafe(self.left.set)
            raise


async def test_both_sides_notice_that_a_connection_is_dead(
    serve: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing arrives any more, and nobody hangs up: as when a cable is cut, or a machine has lost its power."""
    monkeypatch.setattr(options, "_KEEPALIVE_INTERVAL_MS", 300)
    monkeypatch.setattr(options, "_KEEPALIVE_TIMEOUT_MS", 300)
    monkeypatch.setattr(options, "_KEEPALIVE_HEAD_START_MS", 50)
    monkeypatch.setattr(options, "_MIN_PING_INTERVAL_MS", 100)
    store = Listening()
    proxy = TcpProxy((await serve(store)).port)
    listener = connect(await proxy.start(), retry_delays=(0.05,) * 100)
    try:
        assert not await listener.receive_commands("w", instance_id="i", timeout=0)
        proxy.passes.clear()
        await soon(store.left.wait())
        proxy.passes.set()
        await soon(proxy.wait_for_connections(2))
        await store.wait_for_calls(
            "receive_commands", 4
        )  # of each session one that does not wait, and one that does
        await store.send_command(Drain(), "w")
        (command,) = await soon(listener.receive_commands("w", instance_id="i"))
        assert command == Drain()
    finally:
        await listener.close()
        await proxy.close()


def test_a_dead_connection_is_noticed_between_two_heartbeats() -> None:
    noticed_ms = options._KEEPALIVE_INTERVAL_MS + options._KEEPALIVE_TIMEOUT_MS
    assert noticed_ms < 10_000  # the default interval
    assert 2 * options._KEEPALIVE_INTERVAL_MS > 10_500  # the same with its jitter
    assert options._MIN_PING_INTERVAL_MS < options._KEEPALIVE_INTERVAL_MS
    assert 0 < options._KEEPALIVE_HEAD_START_MS < options._KEEPALIVE_TIMEOUT_MS


async def test_clients_do_not_mind_that_connections_grow_old(
    serve: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[int] = []
    take = sessions.CommandSession._take

    def taking(self: Any, message: Any) -> None:
        if message.HasField("closing"):
            reasons.append(message.closing.reason)
        take(self, message)

    monkeypatch.setattr(sessions.CommandSession, "_take", taking)
    store = UnreliableStore(InMemoryLightningStore())
    server: LightningStoreServer = await serve(store, max_connection_age=0.2)
    client = connect(server.endpoint, retry_delays=(0.05,) * 100)
    started = await store.start_rollout("task")
    names = [str(number) for number in range(20)]
    async with aclosing(client.watch_rollouts(rollout_ids=[started.rollout_id])) as events:
        assert (await soon(anext(events))).rollout.status == "preparing"
        assert not await client.receive_commands("w", instance_id="i", timeout=0)
        following = asyncio.ensure_future(anext(events))
        await store.wait_for_calls("watch_rollouts", 3)
        for name in names[:10]:
            assert await client.deliver_spans([make_span(started, name=name)]) == 1
        await store.wait_for_calls("receive_commands", 8)
        for name in names[10:]:
            assert await client.deliver_spans([make_span(started, name=name)]) == 1
        assert (await soon(following)).rollout.status == "running"
        await store.send_command(Drain(), "w")
        assert await soon(client.receive_commands("w", instance_id="i")) == [Drain()]
        await store.update_rollout(started.rollout_id, status="cancelled")
        assert (await soon(anext(events))).rollout.status == "cancelled"
    assert [span.name for span in await client.query_spans(started.rollout_id)] == names
    assert set(reasons) == {pb.CLOSE_REASON_MAX_AGE}


@pytest.mark.parametrize("age", [0, -1, float("inf"), "1", True])
def test_an_age_must_be_seconds(age: Any) -> None:
    with pytest.raises(ValueError, match="max_connection_age must be a positive number of seconds"):
        LightningStoreServer(InMemoryLightningStore(), port=0, max_connection_age=age)
