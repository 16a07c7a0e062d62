"""The table of outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from lightning.rpc.errors import Failure, StoreUnavailableError, to_failure
from lightning.rpc.repeats import Outcome, RepeatTable

pytestmark = pytest.mark.anyio


class Work:
    """Something to do, which counts how often it is done and ends when told."""

    def __init__(self, outcome: Outcome = b"done") -> None:
        self.outcome = outcome
        self.begun = 0
        self.cancelled = 0
        self.may_end = asyncio.Event()
        self.has_begun = asyncio.Event()

    async def __call__(self) -> Outcome:
        self.begun += 1
        self.has_begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.outcome


def done(outcome: Outcome = b"done") -> Work:
    work = Work(outcome)
    work.may_end.set()
    return work


@pytest.fixture
def table() -> RepeatTable:
    return RepeatTable(max_bytes=1_000_000, keep_seconds=1_000.0)


async def test_a_repeat_gets_the_first_outcome(table: RepeatTable) -> None:
    work = done()
    assert await table.run(("m", "1"), work) == b"done"
    assert await table.run(("m", "1"), work) == b"done"
    assert work.begun == 1
    await table.run(("m", "2"), work)
    await table.run(("other", "1"), work)
    assert work.begun == 3


async def test_a_repeat_joins_the_first_call_in_flight(table: RepeatTable) -> None:
    work = Work()
    calls = [asyncio.ensure_future(table.run(("m", "1"), work)) for _ in range(3)]
    await work.has_begun.wait()
    work.may_end.set()
    assert await asyncio.gather(*calls) == [b"done"] * 3
    assert work.begun == 1


async def test_an_error_is_an_outcome(table: RepeatTable) -> None:
    work = done(to_failure(ValueError("no")))
    first = await table.run(("m", "1"), work)
    assert isinstance(first, Failure)
    assert await table.run(("m", "1"), work) is first
    assert work.begun == 1


async def test_unavailability_is_no_outcome(table: RepeatTable) -> None:
    work = done(to_failure(StoreUnavailableError("the database is away")))
    await table.run(("m", "1"), work)
    await table.run(("m", "1"), work)
    assert work.begun == 2


async def test_work_goes_on_when_its_caller_is_gone(table: RepeatTable) -> None:
    work = Work()
    call = asyncio.ensure_future(table.run(("m", "1"), work))
    await work.has_begun.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    work.may_end.set()
    assert await table.run(("m", "1"), work) == b"done"
    assert (work.begun, work.cancelled) == (1, 0)


async def test_abandonable_work_ends_with_its_last_caller(table: RepeatTable) -> None:
    work = Work()
    calls = [asyncio.ensure_future(table.run(("m", "1"), work, abandonable=True)) for _ in range(2)]
    await work.has_begun.wait()
    calls[0].cancel()
    await asyncio.gather(calls[0], return_exceptions=True)
    assert work.cancelled == 0
    calls[1].cancel()
    await asyncio.gather(calls[1], return_exceptions=True)
    work.may_end.set()
    assert await table.run(("m", "1"), work, abandonable=True) == b"done"
    assert (work.begun, work.cancelled) == (2, 1)


@pytest.mark.parametrize("comes_to_an_end", [False, True])
async def test_a_repeat_does_not_join_work_that_is_being_abandoned(
    table: RepeatTable, comes_to_an_end: bool
) -> None:
    """Such as a claim whose runner's connection broke while it was being stored that something was claimed."""
    begun: list[asyncio.Event] = []

    async def work() -> Outcome:
        may_end = asyncio.Event()
        begun.append(may_end)
        number = len(begun)
        if number == 1:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await may_end.wait()
                if not comes_to_an_end:
                    raise
        return b"outcome %d" % number

    first = asyncio.ensure_future(table.run(("m", "1"), work, abandonable=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    repeat = asyncio.ensure_future(table.run(("m", "1"), work, abandonable=True))
    await asyncio.sleep(0)
    begun[0].set()
    assert await asyncio.wait_for(repeat, 10) == (b"outcome 1" if comes_to_an_end else b"outcome 2")


async def test_the_oldest_are_forgotten_when_memory_is_short() -> None:
    table = RepeatTable(max_bytes=3_000, keep_seconds=1_000.0)
    work = done(b"x" * 500)
    for number in range(5):
        await table.run(("m", str(number)), work)
    assert work.begun == 5
    await table.run(("m", "4"), work)
    await table.run(("m", "3"), work)
    assert work.begun == 5
    await table.run(("m", "0"), work)
    assert work.begun == 6


async def test_the_newest_is_remembered_however_large() -> None:
    table = RepeatTable(max_bytes=10, keep_seconds=1_000.0)
    work = done(b"x" * 10_000)
    await table.run(("m", "1"), work)
    await table.run(("m", "1"), work)
    assert work.begun == 1


async def test_outcomes_are_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("lightning.rpc.repeats.time.monotonic", lambda: now)
    table = RepeatTable(max_bytes=1_000_000, keep_seconds=60.0)
    work = done()
    await table.run(("m", "1"), work)
    now += 59
    await table.run(("m", "2"), work)
    await table.run(("m", "1"), work)
    assert work.begun == 2
    now += 2
    await table.run(("m", "3"), work)
    await table.run(("m", "1"), work)
    assert work.begun == 4


async def test_closing_ends_what_is_at_work(table: RepeatTable) -> None:
    work = Work()
    call = asyncio.ensure_future(table.run(("m", "1"), work))
    await work.has_begun.wait()
    await table.close()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert work.cancelled == 1


async def test_a_defect_is_raised_and_not_remembered(table: RepeatTable) -> None:
    def broken(error: Exception) -> Callable[[], Coroutine[Any, Any, Outcome]]:
        async def work() -> Outcome:
            raise error

        return work

    with pytest.raises(ZeroDivisionError):
        await table.run(("m", "1"), broken(ZeroDivisionError()))
    assert await table.run(("m", "1"), done()) == b"done"
