"""Watches over the wire: connections that break, servers that go, watchers that do not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from lightningpb.v1 import errors_pb2
from lightningpb.v1 import store_service_pb2 as pb
from lightningpb.v1.store_service_pb2_grpc import LightningStoreServiceStub

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.rpc.errors import DETAIL_METADATA_KEY
from lightning.store import InMemoryLightningStore, LightningStore
from lightning.testing.proxy import TcpProxy
from lightning.testing.unreliable import UnreliableStore
from lightning.types import RolloutEvent

pytestmark = pytest.mark.anyio


class Revisionless(UnreliableStore):
    """A store that can say how rollouts are, and nothing of what they were."""

    watch_rollouts = LightningStore.watch_rollouts


SOON_SECONDS = 20
LARGE = "x" * 256 * 1024


async def soon(events: AsyncGenerator[RolloutEvent, None]) -> RolloutEvent | None:
    """The next event of a watch; None when it has ended."""
    return await asyncio.wait_for(anext(events, None), SOON_SECONDS)


async def numbers(events: AsyncGenerator[RolloutEvent, None], last: int) -> list[Any]:
    """What the rollout's metadata was in each event, up to `last`."""
    found: list[Any] = []
    while not found or found[-1] != last:
        event = await soon(events)
        assert event is not None
        found.append((event.rollout.metadata or {}).get("number"))
    return found


async def test_nothing_is_missed_or_told_twice_over_broken_connections(
    proxy: TcpProxy, store: UnreliableStore, connect: Any
) -> None:
    client = connect(await proxy.start())
    ids = [(await store.start_rollout(number)).rollout_id for number in range(3)]
    async with aclosing(client.watch_rollouts(rollout_ids=ids)) as events:
        seen = [await soon(events) for _ in ids]
        for number in range(5):
            proxy.cut()
            await store.update_rollout(ids[number % 3], metadata={"number": number})  # nobody is listening
            seen.append(await soon(events))
        for rollout_id in ids:
            await store.update_rollout(rollout_id, status="succeeded")
        seen += [await soon(events) for _ in ids]
        assert await soon(events) is None
    told = [(event.rollout.rollout_id, event.revision) for event in seen if event]
    assert len(told) == len(set(told)) == 3 + 5 + 3
    assert [event.rollout.metadata for event in seen[3:8] if event] == [{"number": n} for n in range(5)]


async def test_a_watch_outlives_its_server(serve: Any, connect: Any) -> None:
    store = InMemoryLightningStore()
    server: LightningStoreServer = await serve(store)
    client = connect(server.endpoint, retry_delays=(0.05,) * 100)
    rollout_id = (await store.start_rollout("task")).rollout_id
    async with aclosing(client.watch_rollouts(rollout_ids=[rollout_id])) as events:
        assert (await soon(events)) is not None
        following = asyncio.ensure_future(soon(events))
        await server.stop(grace=SOON_SECONDS)  # which does not wait for watches to end by themselves
        await store.update_rollout(rollout_id, status="cancelled")
        await serve(store, port=server.port)
        event = await following
        assert event is not None
        assert event.rollout.status == "cancelled"
        assert await soon(events) is None


async def test_where_the_store_is_another_one_the_watch_begins_again(serve: Any, connect: Any) -> None:
    """As when a server keeps no revisions over a restart: what is told twice is better than what is not told."""
    store = InMemoryLightningStore()
    server: LightningStoreServer = await serve(store)
    client = connect(server.endpoint, retry_delays=(0.05,) * 100)
    rollout_id = (await store.start_rollout("task")).rollout_id
    async with aclosing(client.watch_rollouts(rollout_ids=[rollout_id])) as events:
        assert (await soon(events)) is not None
        await server.stop()
        await serve(Revisionless(store), port=server.port)
        event = await soon(events)
        assert event is not None
        assert event.rollout.status == "preparing"
        await store.update_rollout(rollout_id, status="cancelled")
        event = await soon(events)
        assert event is not None
        assert event.rollout.status == "cancelled"
        assert await soon(events) is None


async def test_nothing_piles_up_for_a_watcher_who_does_not_read(
    client: LightningStoreClient, store: UnreliableStore
) -> None:
    rollout_id = (await store.start_rollout(LARGE)).rollout_id
    async with aclosing(client.watch_rollouts(rollout_ids=[rollout_id])) as events:
        assert (await soon(events)) is not None
        for number in range(400):
            await store.update_rollout(rollout_id, metadata={"number": number})
        seen = await numbers(events, 399)
    assert seen == sorted(seen)
    assert len(seen) < 200, "all 100 MB of it were sent"


async def test_who_leaves_is_forgotten(serve: Any, connect: Any) -> None:
    left = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Noting(InMemoryLightningStore):
        async def watch_rollouts(self, **arguments: Any) -> AsyncGenerator[RolloutEvent, None]:
            try:
                async for event in super().watch_rollouts(**arguments):
                    yield event
            finally:
                loop.call_soon_threadsafe(left.set)

    store = Noting()
    client = connect((await serve(store)).endpoint)
    rollout_id = (await store.start_rollout("task")).rollout_id
    async with aclosing(client.watch_rollouts(rollout_ids=[rollout_id])) as events:
        assert (await soon(events)) is not None
        assert not left.is_set()
    await asyncio.wait_for(left.wait(), SOON_SECONDS)


async def test_a_revision_that_is_not_known_has_a_status_of_its_own(
    server: LightningStoreServer, store: UnreliableStore
) -> None:
    rollout_id = (await store.start_rollout("task")).rollout_id
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        stub: Any = LightningStoreServiceStub(channel)
        request = pb.WatchRolloutsRequest(rollout_ids=[rollout_id], after_revision=1000)
        with pytest.raises(grpc.aio.AioRpcError, match="watch without after_revision") as caught:
            await stub.WatchRollouts(request, timeout=SOON_SECONDS).read()
    assert caught.value.code() is StatusCode.OUT_OF_RANGE
    detail = dict(caught.value.trailing_metadata() or ())[DETAIL_METADATA_KEY]
    assert isinstance(detail, bytes)
    reason = errors_pb2.ErrorDetail.FromString(detail).reason
    assert reason == errors_pb2.ERROR_REASON_REVISION_COMPACTED


async def test_a_closed_client_ends_its_watches(client: LightningStoreClient, store: UnreliableStore) -> None:
    rollout_id = (await store.start_rollout("task")).rollout_id
    events = client.watch_rollouts(rollout_ids=[rollout_id])
    assert (await soon(events)) is not None
    following = asyncio.ensure_future(soon(events))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(RuntimeError, match="was closed"):
        await following
