"""The contract suite on the memory backend."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lightning.store import InMemoryLightningStore
from lightning.testing import (
    ClockedStoreContractSuite,
    EvictionContract,
    FakeClock,
    LaxResourcesContract,
    ResumedWatchContract,
    RunnerContract,
    StoreContractSuite,
)
from lightning.testing.records import make_span


class TestMemory(ClockedStoreContractSuite, RunnerContract, ResumedWatchContract):
    @pytest.fixture
    async def store(self, clock: FakeClock) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore(clock=clock)
        yield store
        await store.close()


class TestMemoryInRealTime(StoreContractSuite):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore()
        yield store
        await store.close()


class TestMemoryWithLaxResources(LaxResourcesContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore(validate_resources=False)
        yield store
        await store.close()


class TestMemoryEviction(EvictionContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[InMemoryLightningStore]:
        store = InMemoryLightningStore(
            eviction_memory_threshold=self.eviction_threshold_bytes,
            safe_memory_threshold=self.safe_threshold_bytes,
        )
        yield store
        await store.close()


@pytest.mark.anyio
async def test_spans_count_as_what_the_estimator_says() -> None:
    store = InMemoryLightningStore(
        eviction_memory_threshold=100,
        safe_memory_threshold=50,
        span_size_estimator=lambda span: len(span.name),
    )
    started = await store.start_rollout("task")
    await store.add_many_spans([make_span(started, name="x" * 60), make_span(started, name="y" * 40)])
    await store.update_attempt(started.rollout_id, "latest", status="succeeded")
    assert (await store.statistics())["total_span_bytes"] == 100
    await store.add_span(make_span(await store.start_rollout("task"), name="z"))
    assert (await store.statistics())["total_span_bytes"] == 1
    assert (await store.statistics())["evicted_spans"] == 2
    await store.close()


@pytest.mark.anyio
async def test_an_estimator_that_gives_no_size_is_told_so_before_anything_is_stored() -> None:
    store = InMemoryLightningStore(span_size_estimator=lambda span: -1)
    started = await store.start_rollout("task")
    with pytest.raises(
        ValueError, match="span_size_estimator must return a number of bytes, 0 or more, not -1"
    ):
        await store.add_span(make_span(started))
    assert await store.get_rollout_by_id(started.rollout_id) == started
    assert list(await store.query_spans(started.rollout_id)) == []
    await store.close()
