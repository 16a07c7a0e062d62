"""What a runner hears from its parent process beside what it hears from the store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from lightning import InMemoryLightningStore
from lightning.execution.commands import CommandedStore
from lightning.testing.unreliable import UnreliableStore
from lightning.types import Drain, Stop, WorkerCommand

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 20.0
DRAIN, STOP = Drain(reason="by the parent"), Stop(reason="by the parent")


def listen(store: CommandedStore, worker_id: str = "w-1") -> asyncio.Future[Sequence[WorkerCommand]]:
    return asyncio.ensure_future(store.receive_commands(worker_id, instance_id="i"))


async def heard(listening: asyncio.Future[Sequence[WorkerCommand]]) -> list[WorkerCommand]:
    return list(await asyncio.wait_for(listening, DEADLINE_SECONDS))


async def test_the_parent_is_heard_at_once_by_who_listens_and_by_who_begins_to() -> None:
    store = CommandedStore(InMemoryLightningStore())
    early = listen(store)
    await asyncio.sleep(0)
    assert not early.done()
    await asyncio.to_thread(store.tell, DRAIN)
    assert await heard(early) == [DRAIN]
    assert await heard(listen(store, "w-2")) == [DRAIN]


async def test_each_listener_hears_it_once_and_then_what_the_store_says() -> None:
    inner = InMemoryLightningStore()
    store = CommandedStore(inner)
    store.tell(DRAIN)
    assert await heard(listen(store)) == [DRAIN]
    assert list(await store.receive_commands("w-1", instance_id="i", timeout=0)) == []
    await inner.send_command(STOP, "w-1")
    assert await heard(listen(store)) == [STOP]
    store.tell(STOP)  # a later command of the parent's is another one
    assert await heard(listen(store)) == [STOP]


async def test_the_parent_is_heard_while_the_store_is_away() -> None:
    inner = UnreliableStore(InMemoryLightningStore())
    inner.away = True
    store = CommandedStore(inner)
    with pytest.raises(ConnectionError):
        await heard(listen(store))
    store.tell(STOP)
    assert await heard(listen(store)) == [STOP]


async def test_who_stops_listening_stops_listening_at_the_store() -> None:
    class Asked(InMemoryLightningStore):
        asked = asyncio.Event()
        left = asyncio.Event()

        async def receive_commands(self, *args: Any, **kwargs: Any) -> Sequence[WorkerCommand]:
            self.asked.set()
            try:
                return await super().receive_commands(*args, **kwargs)
            finally:
                self.left.set()

    inner = Asked()
    listening = listen(CommandedStore(inner))
    await asyncio.wait_for(inner.asked.wait(), DEADLINE_SECONDS)
    listening.cancel()
    await asyncio.wait_for(inner.left.wait(), DEADLINE_SECONDS)
    assert listening.cancelled() or await asyncio.wait({listening})
