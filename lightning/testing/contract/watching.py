"""Watching rollouts: every state that a watcher has time for, the last one in any case."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.store.polling import RevisionGoneError
from lightning.testing.contract.base import UNKNOWN_ROLLOUT, StoreTheme, read, refused, until_idle
from lightning.testing.records import make_span
from lightning.types import RolloutEvent

MANY = 40
"""More than anybody holds at a time."""
CHANGES = 20
FUTURE_REVISION = 2**62


class WatchContract(StoreTheme):
    """`watch_rollouts`, on any store."""

    async def test_watching_nothing_ends_at_once(self, store: LightningStore) -> None:
        assert await self.soon(watched(store, [])) == []

    async def test_finished_ones_are_shown_and_the_watch_ends(self, store: LightningStore) -> None:
        ids = [(await store.start_rollout("task")).rollout_id for _ in range(3)]
        for rollout_id, status in zip(ids, ("succeeded", "failed", "cancelled"), strict=True):
            await store.update_rollout(rollout_id, status=status)  # type: ignore[arg-type]
        events = await self.soon(watched(store, [*ids, ids[0]]))
        assert {event.rollout.rollout_id: event.rollout for event in events} == {
            rollout_id: await read(store, rollout_id) for rollout_id in ids
        }
        assert len(events) == 3

    async def test_a_rollout_is_followed_to_its_end(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout({"question": [1, None]}, mode="val", metadata={"a": "ü"})
        async with aclosing(store.watch_rollouts(rollout_ids=[rollout.rollout_id])) as events:
            seen = [await self.soon(anext(events))]
            claimed = await store.dequeue_rollout(worker_id="w-1")
            assert claimed is not None
            seen.append(await self.soon(anext(events)))
            await store.add_span(make_span(claimed))
            seen.append(await self.soon(anext(events)))
            await store.update_rollout(rollout.rollout_id, metadata={"b": 1.0})
            seen.append(await self.soon(anext(events)))
            await store.update_attempt(rollout.rollout_id, claimed.attempt.attempt_id, status="succeeded")
            seen.append(await self.soon(anext(events)))
            assert await self.soon(anext(events, None)) is None
        assert seen[0].rollout == rollout
        assert seen[-1].rollout == await read(store, rollout.rollout_id)
        statuses = [event.rollout.status for event in seen]
        assert statuses == ["queuing", "preparing", "running", "running", "succeeded"]
        assert (seen[2].rollout.metadata, seen[3].rollout.metadata) == ({"a": "ü"}, {"b": 1.0})
        revisions = [event.revision for event in seen]
        assert revisions == sorted(set(revisions))

    async def test_a_slow_watcher_sees_the_latest_state(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        async with aclosing(store.watch_rollouts(rollout_ids=[started.rollout_id])) as events:
            assert (await self.soon(anext(events))).rollout.metadata is None
            for number in range(CHANGES):
                await store.update_rollout(started.rollout_id, metadata={"number": number})
            await store.update_rollout(started.rollout_id, status="cancelled")
            seen = await self.soon(rest(events))
        last = seen[-1].rollout
        assert (last.status, last.metadata) == ("cancelled", {"number": CHANGES - 1})
        assert len(seen) <= CHANGES + 1

    async def test_one_that_had_ended_is_followed_again(self, store: LightningStore) -> None:
        ids = [(await store.start_rollout("task")).rollout_id for _ in range(2)]
        await store.update_rollout(ids[0], status="failed")
        async with aclosing(store.watch_rollouts(rollout_ids=ids)) as events:
            assert {(await self.soon(anext(events))).rollout.status for _ in ids} == {"failed", "preparing"}
            await store.update_rollout(ids[0], status="queuing")
            event = await self.soon(anext(events))
            assert (event.rollout.rollout_id, event.rollout.status) == (ids[0], "queuing")
            await store.update_rollout(ids[1], status="cancelled")
            assert (await self.soon(anext(events))).rollout.status == "cancelled"
            await store.update_rollout(ids[0], status="cancelled")
            seen = await self.soon(rest(events))
            assert [(event.rollout.rollout_id, event.rollout.status) for event in seen] == [
                (ids[0], "cancelled")
            ]

    async def test_many_are_watched_by_several(self, store: LightningStore) -> None:
        ids = [(await store.start_rollout(number)).rollout_id for number in range(MANY)]
        watches = [asyncio.ensure_future(watched(store, ids)) for _ in range(2)]
        await until_idle(store)
        for rollout_id in ids:
            await store.update_attempt(rollout_id, "latest", status="succeeded")
        for events in await self.soon(asyncio.gather(*watches)):
            last = {event.rollout.rollout_id: event.rollout.status for event in events}
            assert last == dict.fromkeys(ids, "succeeded")
            assert MANY <= len(events) <= 2 * MANY

    async def test_a_watch_can_be_given_up(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        events = store.watch_rollouts(rollout_ids=[started.rollout_id])
        await self.soon(anext(events))
        waiter = asyncio.ensure_future(anext(events))
        await until_idle(store)
        waiter.cancel()
        (outcome,) = await self.soon(asyncio.gather(waiter, return_exceptions=True))
        assert isinstance(outcome, asyncio.CancelledError)
        await self.soon(events.aclose())
        await store.update_rollout(started.rollout_id, status="cancelled")
        assert len(await self.soon(watched(store, [started.rollout_id]))) == 1

    async def test_an_unknown_rollout_is_not_watched(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await self.soon(watched(store, [started.rollout_id, UNKNOWN_ROLLOUT]))

    @pytest.mark.parametrize("revision", [-1, 1.5, True, "1"])
    async def test_what_is_no_revision_is_refused(self, store: LightningStore, revision: Any) -> None:
        started = await store.start_rollout("task")
        with refused(ValueError, "after_revision", repr(revision)):
            await self.soon(watched(store, [started.rollout_id], revision))

    async def test_a_revision_of_another_store_is_refused(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        with refused(RevisionGoneError, str(FUTURE_REVISION), "without after_revision"):
            await self.soon(watched(store, [started.rollout_id], FUTURE_REVISION))


class ResumedWatchContract(StoreTheme):
    """Going on with a watch where an earlier one broke off, on a store that keeps revisions."""

    async def test_a_watch_goes_on_where_it_broke_off(self, store: LightningStore) -> None:
        ids = [(await store.start_rollout(number)).rollout_id for number in range(MANY)]
        async with aclosing(store.watch_rollouts(rollout_ids=ids)) as events:
            seen = [await self.soon(anext(events)) for _ in ids]
        changed = ids[5:8]
        for rollout_id in changed:
            await store.update_rollout(rollout_id, metadata={"changed": True})
        async with aclosing(
            store.watch_rollouts(rollout_ids=ids, after_revision=seen[-1].progress_revision)
        ) as events:
            # a state may come again: one that was told last, by a store that is careful
            told = {event.rollout.rollout_id: event.revision for event in seen}
            news: list[str] = []
            while len(news) < len(changed):
                event = await self.soon(anext(events))
                if event.revision > told[event.rollout.rollout_id]:
                    assert event.rollout.metadata == {"changed": True}
                    news.append(event.rollout.rollout_id)
            assert sorted(news) == sorted(changed)
            await store.update_rollout(ids[0], status="cancelled")
            while (event := await self.soon(anext(events))).rollout.rollout_id != ids[0]:
                assert event.revision <= told[event.rollout.rollout_id]
            assert event.rollout.status == "cancelled"

    async def test_going_on_after_the_end_ends(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        await store.update_rollout(started.rollout_id, status="succeeded")
        (event,) = await self.soon(watched(store, [started.rollout_id]))
        again = await self.soon(watched(store, [started.rollout_id], event.progress_revision))
        assert [told.rollout for told in again] in ([], [event.rollout])


async def watched(
    store: LightningStore, rollout_ids: list[str], after_revision: int | None = None
) -> list[RolloutEvent]:
    """All events of a watch."""
    return await rest(store.watch_rollouts(rollout_ids=rollout_ids, after_revision=after_revision))


async def rest(events: Any) -> list[RolloutEvent]:
    """All events that are left of a watch."""
    return [event async for event in events]
