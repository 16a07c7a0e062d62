"""What the tests of the runner share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from lightning.store.backends import InMemoryLightningStore
from lightning.testing.unreliable import UnreliableStore

_THREAD_END_SECONDS = 5.0


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A test must end the threads of ours that it started."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("lightning"):
            thread.join(_THREAD_END_SECONDS)
            assert not thread.is_alive(), f"{thread.name} was left behind"


@pytest.fixture
async def store(anyio_backend: str) -> AsyncIterator[UnreliableStore]:
    """A store in memory that can be told to be out of reach. Afterwards no task may be left."""
    store = UnreliableStore(InMemoryLightningStore())
    yield store
    store.away = False
    await store.close()
    left = [task for task in asyncio.all_tasks() if "TestRunner" not in repr(task.get_coro())]
    assert not left, f"tasks were left behind: {left}"
