"""What the themes of the contract suite share."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.clock import FakeClock
from lightning.types import AttemptedRollout, PaginatedResult, Rollout

T = TypeVar("T")

UNKNOWN_ROLLOUT = "ro-nobody-has-made-this-one"
UNKNOWN_ATTEMPT = "at-nobody-has-made-this-one"
UNKNOWN_RESOURCES = "rs-nobody-has-made-these"


class StoreTheme:
    """Base of all themes: tests of one part of the contract, each a method that takes the `store` fixture.

    A test module gets them by subclassing a suite and defining that fixture; see `docs/testing-a-store.md`.
    """

    pytestmark = pytest.mark.anyio

    deadline_seconds: ClassVar[float] = 10.0
    """How long a call that must return may take before the test fails; no test waits that long when all is well."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        """The product runs on asyncio."""
        return "asyncio"

    @pytest.fixture
    def store(self) -> Any:
        """An empty store. To be defined by whoever runs the suite; an async fixture that closes it afterwards."""
        raise NotImplementedError(f"{type(self).__name__} must define the fixture `store`")

    async def soon(self, awaitable: Awaitable[T]) -> T:
        """Await what must happen without anybody doing anything more; fails when the deadline passes."""
        return await asyncio.wait_for(awaitable, self.deadline_seconds)


class ClockedTheme(StoreTheme):
    """Base of the themes that move time, for stores that can be given a clock."""

    @pytest.fixture
    def clock(self) -> FakeClock:
        """The clock; whoever runs the suite builds the store of the fixture `store` with it."""
        return FakeClock()


# --- Getting a store into a state ------------------------------------------------------------------------------


async def claim(store: LightningStore, worker_id: str | None = None) -> AttemptedRollout:
    """`dequeue_rollout`, where there must be something to claim."""
    claimed = await store.dequeue_rollout(worker_id=worker_id)
    assert claimed is not None, "the queue is empty"
    return claimed


async def drain(store: LightningStore) -> list[str]:
    """Claim all there is; the rollouts' ids in the order in which they were handed out."""
    order: list[str] = []
    while (claimed := await store.dequeue_rollout()) is not None:
        order.append(claimed.rollout_id)
        assert len(order) < 10_000, "the queue never gets empty"
    return order


async def read(store: LightningStore, rollout_id: str) -> Rollout:
    """`get_rollout_by_id`, where there must be one."""
    rollout = await store.get_rollout_by_id(rollout_id)
    assert rollout is not None, f"{rollout_id} is not there"
    return rollout


async def statuses(store: LightningStore, rollout_id: str) -> tuple[str, ...]:
    """The rollout's status, then those of its attempts, oldest first."""
    rollout = await read(store, rollout_id)
    return (rollout.status, *(attempt.status for attempt in await store.query_attempts(rollout_id)))


async def everything(store: LightningStore) -> dict[str, Any]:
    """All that can be read of a store, to show that a call that was refused changed nothing."""
    rollouts = await store.query_rollouts()
    return {
        "rollouts": list(rollouts),
        "attempts": [list(await store.query_attempts(rollout.rollout_id)) for rollout in rollouts],
        "spans": [list(await store.query_spans(rollout.rollout_id)) for rollout in rollouts],
        "resources": list(await store.query_resources()),
        "latest_resources": await store.get_latest_resources(),
        "workers": list(await store.query_workers()),
    }


async def until_idle(store: LightningStore) -> None:
    """Let every task that can run do so, and a few calls through, so that a waiter waits."""
    for _ in range(5):
        await store.statistics()
        await asyncio.sleep(0)


# --- Checking what it does -------------------------------------------------------------------------------------


@contextmanager
def refused(kind: type[Exception], *mentions: str) -> Iterator[None]:
    """The block must raise `kind`, with every one of `mentions` in the message."""
    with pytest.raises(kind) as caught:
        yield
    for mention in mentions:
        assert mention in str(caught.value), f"{mention!r} is not mentioned in: {caught.value}"


@contextmanager
def refused_for(kind: type[Exception], pattern: str) -> Iterator[None]:
    """The block must raise `kind` with a message in which `pattern` is found, case aside."""
    with pytest.raises(kind) as caught:
        yield
    assert re.search(pattern, str(caught.value), re.IGNORECASE), f"{pattern!r} does not match: {caught.value}"


def same(left: Any, right: Any) -> bool:
    """Equal and of the same types through and through: `1` is not `1.0`, nor is `True`; NaN is NaN, -0.0 not 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


async def check_pages(
    query: Callable[..., Awaitable[PaginatedResult[T]]], expected: Sequence[T], **arguments: Any
) -> None:
    """A query cut into pages in every way must yield the parts of `expected`, and say how many there are."""
    total = len(expected)
    for limit in (-1, 0, 1, 2, total, total + 1):
        for offset in (0, 1, total, total + 5):
            page = await query(**arguments, limit=limit, offset=offset)
            stop = None if limit < 0 else offset + limit
            assert list(page) == list(expected[offset:stop]), f"limit={limit}, offset={offset}"
            assert (page.limit, page.offset, page.total) == (limit, offset, total)


async def check_sorting(
    query: Callable[..., Awaitable[PaginatedResult[Any]]], fields: Sequence[str], **arguments: Any
) -> None:
    """A query must sort by each of `fields`, both ways, missing values first (last, when descending)."""
    everyone = await query(**arguments)
    for field in fields:
        values = [getattr(item, field) for item in everyone]
        for sort_order in ("asc", "desc"):
            expected = sorted(
                values, key=lambda value: (value is not None, value), reverse=sort_order == "desc"
            )
            page = await query(**arguments, sort_by=field, sort_order=sort_order)
            assert [getattr(item, field) for item in page] == expected, f"sort_by={field!r} {sort_order}"
            part = await query(**arguments, sort_by=field, sort_order=sort_order, limit=2, offset=1)
            assert [getattr(item, field) for item in part] == expected[1:3], f"page of sort_by={field!r}"
            assert part.total == len(values)


async def check_bad_pages(query: Callable[..., Awaitable[Any]], **arguments: Any) -> None:
    """A query must refuse what means nothing, naming it."""
    for bad, mentions in (
        ({"sort_by": "no_such_field"}, "no_such_field"),
        ({"sort_order": "sideways"}, "sideways"),
        ({"limit": -2}, "-2"),
        ({"offset": -1}, "-1"),
    ):
        with refused(ValueError, mentions):
            await query(**arguments, **bad)
