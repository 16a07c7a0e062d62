"""Watches, as far as only a store of ours can be looked at: what they cost, and what they leave out."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from lightning.store import InMemoryLightningStore, SQLiteLightningStore
from lightning.store.contract import UnknownIdError
from lightning.store.polling import RevisionGoneError
from lightning.testing import FakeClock
from lightning.testing.contract.base import until_idle
from lightning.testing.records import make_span

pytestmark = pytest.mark.anyio


async def test_changes_that_nobody_had_time_for_are_one() -> None:
    store = InMemoryLightningStore()
    started = await store.start_rollout("task")
    async with aclosing(store.watch_rollouts(rollout_ids=[started.rollout_id])) as events:
        await anext(events)
        for number in range(1000):
            await store.update_rollout(started.rollout_id, metadata={"number": number})
        assert (await anext(events)).rollout.metadata == {"number": 999}
        await store.update_rollout(started.rollout_id, status="cancelled")
        assert [event.rollout.status async for event in events] == ["cancelled"]
    await store.close()


async def test_a_watcher_does_not_poll_and_heartbeats_do_not_wake_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = InMemoryLightningStore()
    started = await store.start_rollout("task")
    await store.add_span(make_span(started))
    looks: list[Any] = []
    look = store.persistence.get_rollouts

    async def counted(rollout_ids: Any) -> Any:
        looks.append(rollout_ids)
        return await look(rollout_ids)

    monkeypatch.setattr(store.persistence, "get_rollouts", counted)
    others = [(await store.start_rollout("task")).rollout_id for _ in range(50)]
    async with aclosing(store.watch_rollouts(rollout_ids=[*others, started.rollout_id])) as events:
        for _ in range(51):
            await anext(events)
        looks.clear()
        following = asyncio.ensure_future(anext(events))
        for _ in range(10):
            await store.add_span(make_span(started))
            await until_idle(store)
        assert looks == []
        await store.update_rollout(started.rollout_id, metadata={"a": 1})
        await following
        assert looks == [[started.rollout_id]]
    await store.close()


async def test_going_on_sends_only_what_changed(tmp_path: Any) -> None:
    """Also when the store was closed in between: the file knows its revisions."""
    path = str(tmp_path / "store.db")
    store = SQLiteLightningStore(path)
    ids = [(await store.start_rollout(number)).rollout_id for number in range(5)]
    async with aclosing(store.watch_rollouts(rollout_ids=ids)) as events:
        told = [await anext(events) for _ in ids]
    await store.update_rollout(ids[3], status="failed")
    await store.close()
    store = SQLiteLightningStore(path)
    async with aclosing(
        store.watch_rollouts(rollout_ids=ids, after_revision=told[-1].progress_revision)
    ) as events:
        assert (await anext(events)).rollout.rollout_id == ids[3]
        following = asyncio.ensure_future(anext(events))
        await until_idle(store)
        assert not following.done()
        await store.update_rollout(ids[0], status="failed")
        assert (await following).rollout.rollout_id == ids[0]
    with pytest.raises(RevisionGoneError, match=r"revision 1000: this store has come to \d+ only"):
        await anext(store.watch_rollouts(rollout_ids=ids, after_revision=1000))
    await store.close()


async def test_a_closed_store_ends_its_watches() -> None:
    store = InMemoryLightningStore()
    started = await store.start_rollout("task")
    events = store.watch_rollouts(rollout_ids=[started.rollout_id])
    await anext(events)
    following = asyncio.ensure_future(anext(events))
    await until_idle(store)
    await store.close()
    with pytest.raises(RuntimeError, match="closed"):
        await following


async def test_a_watch_goes_on_without_those_that_were_dropped_since(tmp_path: Path) -> None:
    clock = FakeClock()
    store = SQLiteLightningStore(tmp_path / "store.db", clock=clock, retain="1h")
    ended, other = await store.start_rollout("first"), await store.start_rollout("second")
    ids = [ended.rollout_id, other.rollout_id]
    await store.update_rollout(ended.rollout_id, status="succeeded")
    async with aclosing(store.watch_rollouts(rollout_ids=ids)) as events:
        told = [await anext(events) for _ in ids]
    clock.advance(10_000)
    with anyio.fail_after(40):
        while True:
            if (await store.statistics())["dropped_rollouts"]:
                break
            await asyncio.sleep(0.01)
    await store.update_rollout(other.rollout_id, status="cancelled")
    after = told[-1].progress_revision
    watch = store.watch_rollouts(rollout_ids=ids, after_revision=after)
    assert [(event.rollout.rollout_id, event.rollout.status) async for event in watch] == [
        (other.rollout_id, "cancelled")
    ]
    with pytest.raises(UnknownIdError, match="was dropped"):
        await anext(store.watch_rollouts(rollout_ids=ids))
    with pytest.raises(UnknownIdError, match="'never there'"):
        await anext(store.watch_rollouts(rollout_ids=["never there"], after_revision=after))
    await store.close()
