"""Doing together what is asked for at the same time; without a MongoDB."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from lightning.store.persistence.abc import BackendFullError
from lightning.store.persistence.mongo.batches import Batcher, KeyedBatcher

pytestmark = pytest.mark.anyio


async def test_one_at_fault_is_no_hindrance() -> None:
    performed: list[list[int]] = []

    async def perform(items: list[int]) -> Sequence[int]:
        performed.append(items)
        if 1 in items:
            raise ValueError("1 cannot be done")
        return [10 * item for item in items]

    batcher = Batcher(perform, max_items=10)
    results = await asyncio.gather(*map(batcher.do, range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["0", "1 cannot be done", "20"]
    assert performed == [[0, 1, 2], [0], [1], [2]]


async def test_what_the_backend_refuses_is_not_done_again() -> None:
    """A part of it may have been done."""
    performed: list[list[int]] = []

    async def perform(items: list[int]) -> Sequence[int]:
        performed.append(items)
        raise BackendFullError("no disk space left")

    batcher = Batcher(perform, max_items=10)
    results = await asyncio.gather(*map(batcher.do, range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [BackendFullError] * 3
    assert performed == [[0, 1, 2]]


async def test_batches_for_the_same_key_are_done_one_after_the_other() -> None:
    log: list[str] = []
    both_began, goes_on = asyncio.Event(), asyncio.Event()

    async def perform(key: str, items: list[int]) -> Sequence[int]:
        log.append(f"{key} begins {items}")
        if len(log) == 2:
            both_began.set()
        await goes_on.wait()
        log.append(f"{key} ends")
        return items

    batcher = KeyedBatcher(perform, max_items=10)
    calls = [asyncio.ensure_future(batcher.do(*item)) for item in (("a", 1), ("b", 2))]
    await asyncio.wait_for(both_began.wait(), 10)
    calls += [asyncio.ensure_future(batcher.do("a", number)) for number in (3, 4)]
    await asyncio.sleep(0)
    goes_on.set()
    assert await asyncio.gather(*calls) == [1, 2, 3, 4]
    assert sorted(log[:2]) == ["a begins [1]", "b begins [2]"]
    assert log.index("a ends") < log.index("a begins [3, 4]")
