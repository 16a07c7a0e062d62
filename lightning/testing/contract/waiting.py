"""Waiting for rollouts: woken when the last one ends, without anybody polling."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import UNKNOWN_ROLLOUT, StoreTheme, read, refused, until_idle
from lightning.testing.records import make_span

WAITERS = 500


class WaitingContract(StoreTheme):
    """`wait_for_rollouts`, as far as no time needs to pass."""

    async def test_waiting_for_nothing_returns_at_once(self, store: LightningStore) -> None:
        assert await self.soon(store.wait_for_rollouts(rollout_ids=[])) == []

    @pytest.mark.parametrize("timeout", [None, 0, 0.0, 1e9, math.inf])
    async def test_finished_ones_are_returned_at_once(self, store: LightningStore, timeout: Any) -> None:
        ended_as: list[Any] = ["succeeded", "failed", "cancelled"]
        ids = [(await store.start_rollout("task")).rollout_id for _ in ended_as]
        for rollout_id, status in zip(ids, ended_as, strict=True):
            await store.update_rollout(rollout_id, status=status)
        found = await self.soon(store.wait_for_rollouts(rollout_ids=ids[::-1], timeout=timeout))
        assert found == [await read(store, rollout_id) for rollout_id in ids[::-1]]

    async def test_without_waiting_only_the_finished_are_returned(self, store: LightningStore) -> None:
        ids = [(await store.start_rollout("task")).rollout_id for _ in range(4)]
        assert await self.soon(store.wait_for_rollouts(rollout_ids=ids, timeout=0)) == []
        await store.update_attempt(ids[2], "latest", status="succeeded")
        await store.update_attempt(ids[1], "latest", status="failed")
        found = await self.soon(store.wait_for_rollouts(rollout_ids=ids, timeout=0))
        assert [rollout.rollout_id for rollout in found] == [ids[1], ids[2]]

    async def test_each_rollout_is_returned_once(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        await store.update_rollout(started.rollout_id, status="succeeded")
        found = await self.soon(store.wait_for_rollouts(rollout_ids=[started.rollout_id] * 3))
        assert [rollout.rollout_id for rollout in found] == [started.rollout_id]

    async def test_it_waits_for_the_last(self, store: LightningStore) -> None:
        ids = [(await store.start_rollout("task")).rollout_id for _ in range(3)]
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=ids))
        await until_idle(store)
        await store.update_attempt(ids[1], "latest", status="succeeded")
        await store.update_attempt(ids[0], "latest", status="failed")
        await store.add_span(make_span((await store.query_attempts(ids[2]))[0]))
        await until_idle(store)
        assert not waiter.done()
        await store.update_rollout(ids[2], status="cancelled")
        found = await self.soon(waiter)
        assert [rollout.status for rollout in found] == ["failed", "succeeded", "cancelled"]
        assert found == [await read(store, rollout_id) for rollout_id in ids]

    async def test_one_that_is_tried_again_is_waited_for(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        other = await store.start_rollout("task")
        ids = [started.rollout_id, other.rollout_id]
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=ids))
        await until_idle(store)
        await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        await until_idle(store)
        await store.update_rollout(started.rollout_id, status="queuing")
        await store.update_attempt(other.rollout_id, "latest", status="succeeded")
        await until_idle(store)
        assert not waiter.done()
        await store.update_rollout(started.rollout_id, status="failed")
        found = await self.soon(waiter)
        assert [rollout.status for rollout in found] == ["failed", "succeeded"]

    async def test_many_waiters_are_woken(self, store: LightningStore) -> None:
        first, second = [(await store.start_rollout("task")).rollout_id for _ in range(2)]
        waiters = [
            asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[first, second] if n % 2 else [second]))
            for n in range(WAITERS)
        ]
        await until_idle(store)
        for rollout_id in (first, second):
            await store.update_attempt(rollout_id, "latest", status="succeeded")
        found = await self.soon(asyncio.gather(*waiters))
        assert [len(rollouts) for rollouts in found] == [1 + n % 2 for n in range(WAITERS)]

    async def test_a_wait_can_be_given_up(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        waiters = [
            asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[started.rollout_id])) for _ in range(2)
        ]
        await until_idle(store)
        waiters[0].cancel()
        (outcome,) = await self.soon(asyncio.gather(waiters[0], return_exceptions=True))
        assert isinstance(outcome, asyncio.CancelledError)
        await store.update_attempt(started.rollout_id, "latest", status="succeeded")
        assert len(await self.soon(waiters[1])) == 1

    async def test_an_unknown_rollout_is_not_waited_for(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        for timeout in (None, 0, 5.0):
            with refused(ValueError, UNKNOWN_ROLLOUT):
                await self.soon(
                    store.wait_for_rollouts(
                        rollout_ids=[started.rollout_id, UNKNOWN_ROLLOUT], timeout=timeout
                    )
                )

    @pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, -math.inf])
    async def test_a_wait_that_means_nothing_is_refused(self, store: LightningStore, timeout: float) -> None:
        started = await store.start_rollout("task")
        with refused(ValueError, "timeout"):
            await self.soon(store.wait_for_rollouts(rollout_ids=[started.rollout_id], timeout=timeout))
