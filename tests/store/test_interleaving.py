"""The engine over a backend that takes its time: whatever else happens between two of its steps, verbs stay atomic."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lightning.store import InMemoryLightningStore
from lightning.store.contract import LightningStore
from lightning.store.persistence.abc import Persistence
from lightning.testing import ClockedStoreContractSuite, FakeClock, RunnerContract, make_span
from lightning.types import RolloutConfig

DEADLINE_SECONDS = 20.0
PRIMITIVES = [name for name, member in vars(Persistence).items() if inspect.iscoroutinefunction(member)]


class Unhurried:
    """A backend that lets others go first, before each primitive and after it.

    Args:
        backend: Does the work.
        turns: How many turns of the event loop to wait; a different number each time.
    """

    def __init__(self, backend: Persistence, turns: random.Random) -> None:
        self._backend = backend
        self._turns = turns

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._backend, name)
        if name not in PRIMITIVES:
            return member

        async def primitive(*args: Any, **kwargs: Any) -> Any:
            for _ in range(self._turns.randrange(3)):
                await asyncio.sleep(0)
            result = await member(*args, **kwargs)
            for _ in range(self._turns.randrange(3)):
                await asyncio.sleep(0)
            return result

        return primitive


def unhurried_store(seed: int, **options: Any) -> InMemoryLightningStore:
    """The memory store over such a backend."""
    store = InMemoryLightningStore(**options)
    backend: Any = Unhurried(store._persistence, random.Random(seed))
    store._persistence = backend
    store._outside._persistence = backend
    return store


class TestUnhurriedMemory(ClockedStoreContractSuite, RunnerContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[LightningStore]:
        store = unhurried_store(0, clock=clock)
        yield store
        await store.close()


@pytest.mark.anyio
async def test_it_is_opened_once_however_many_come_first() -> None:
    store = unhurried_store(0)
    opened = 0

    class Counting(Unhurried):
        async def open(self) -> None:
            nonlocal opened
            opened += 1
            await asyncio.sleep(0)

    backend: Any = Counting(store._persistence, random.Random(0))
    store._persistence = backend
    await asyncio.gather(*(store.statistics() for _ in range(10)))
    assert opened == 1
    await store.close()


async def held_by_workers(store: LightningStore) -> dict[str, set[str]]:
    """The open attempts of each worker, read off the attempts."""
    held: dict[str, set[str]] = {}
    for rollout in await store.query_rollouts():
        for attempt in await store.query_attempts(rollout.rollout_id):
            if attempt.status in ("preparing", "running") and attempt.worker_id:
                held.setdefault(attempt.worker_id, set()).add(attempt.attempt_id)
    return held


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(20))
async def test_workers_hold_what_they_hold_when_everything_has_settled(seed: int) -> None:
    clock = FakeClock()
    store = unhurried_store(seed, clock=clock)
    dice = random.Random(seed)
    config = RolloutConfig(
        timeout_seconds=50, unresponsive_seconds=5, max_attempts=3, retry_condition=["unresponsive", "failed"]
    )
    ids = [(await store.enqueue_rollout(n, config=config)).rollout_id for n in range(6)]

    async def work(worker_id: str) -> None:
        for _ in range(12):
            claimed = await store.dequeue_rollout(worker_id=worker_id)
            if claimed is None:
                continue
            for _ in range(dice.randrange(3)):
                await store.add_span(make_span(claimed))
            status: Any = dice.choice(["succeeded", "failed", "running"])
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status=status)

    async def disturb() -> None:
        for _ in range(12):
            what = dice.randrange(4)
            rollout_id = dice.choice(ids)
            if what == 0:
                await store.update_rollout(rollout_id, status="cancelled")
            elif what == 1:
                clock.advance(dice.choice([1, 4, 6]))
            else:
                await store.update_worker(f"w-{what}")
            await asyncio.sleep(0)

    await asyncio.wait_for(asyncio.gather(disturb(), *(work(f"w-{n}") for n in range(4))), DEADLINE_SECONDS)
    held = await held_by_workers(store)
    for record in await store._persistence.find_workers():
        leases = {lease.attempt_id for lease in record.leases}
        assert leases == held.get(record.worker_id, set()), record.worker_id
    await store.close()
