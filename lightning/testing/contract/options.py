"""Themes for options that not every store has; each says how its `store` fixture must be set up."""

from __future__ import annotations

from typing import ClassVar

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import (
    UNKNOWN_RESOURCES,
    StoreTheme,
    claim,
    read,
    refused,
    refused_for,
    statuses,
)
from lightning.testing.records import make_span
from lightning.types import AttemptedRollout


class LaxResourcesContract(StoreTheme):
    """For a store made with `validate_resources=False`: resources may be named before they are published."""

    async def test_unknown_resources_can_be_named(self, store: LightningStore) -> None:
        enqueued = await store.enqueue_rollout("task", resources_id=UNKNOWN_RESOURCES)
        started = await store.start_rollout("task", resources_id=UNKNOWN_RESOURCES)
        updated = await store.update_rollout(
            (await store.enqueue_rollout("task")).rollout_id, resources_id=UNKNOWN_RESOURCES
        )
        assert {r.resources_id for r in (enqueued, started, updated)} == {UNKNOWN_RESOURCES}
        assert (await claim(store)).resources_id == UNKNOWN_RESOURCES
        assert await store.get_resources_by_id(UNKNOWN_RESOURCES) is None

    async def test_unknown_resources_can_still_not_be_updated(self, store: LightningStore) -> None:
        with refused(ValueError, UNKNOWN_RESOURCES):
            await store.update_resources(UNKNOWN_RESOURCES, {})


class EvictionContract(StoreTheme):
    """For a store that keeps the memory of spans within the limits given here, in bytes."""

    eviction_threshold_bytes: ClassVar[int] = 200_000
    safe_threshold_bytes: ClassVar[int] = 100_000
    _SPANS_PER_ROLLOUT: ClassVar[int] = 10
    _ROLLOUTS_TO_THRESHOLD: ClassVar[int] = 20
    """At 1 KB a span, as many rollouts as are sure to pass the threshold when one more is stored."""

    async def _rollout(self, store: LightningStore) -> AttemptedRollout:
        started = await store.start_rollout("task")
        await self._fill(store, started)
        return started

    async def _fill(self, store: LightningStore, started: AttemptedRollout) -> None:
        text = {"text": "x" * 1000}
        await store.add_many_spans(
            [make_span(started, attributes=text) for _ in range(self._SPANS_PER_ROLLOUT)]
        )

    async def _evicted(self, store: LightningStore, rollouts: list[AttemptedRollout]) -> list[bool]:
        outcomes = []
        for rollout in rollouts:
            try:
                await store.query_spans(rollout.rollout_id)
                outcomes.append(False)
            except RuntimeError:
                outcomes.append(True)
        return outcomes

    async def test_span_bytes_are_accounted_for(self, store: LightningStore) -> None:
        before = await store.statistics()
        assert (before["total_spans"], before["total_span_bytes"], before["evicted_spans"]) == (0, 0, 0)
        assert before["eviction_threshold_bytes"] == self.eviction_threshold_bytes
        assert before["safe_threshold_bytes"] == self.safe_threshold_bytes
        await self._rollout(store)
        after = await store.statistics()
        assert after["total_spans"] == self._SPANS_PER_ROLLOUT
        assert 1_000 <= after["total_span_bytes"] / self._SPANS_PER_ROLLOUT <= 2_500
        assert after["evicted_spans"] == 0

    async def test_the_first_to_finish_are_evicted(self, store: LightningStore) -> None:
        rollouts = [await self._rollout(store)]
        while (await store.statistics())["total_span_bytes"] < 0.8 * self.eviction_threshold_bytes:
            rollouts.append(await self._rollout(store))
        order = [*rollouts[1::2], *rollouts[::2]]
        for rollout in order:
            await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
        while not any(await self._evicted(store, order)):
            await self._rollout(store)
        evicted = await self._evicted(store, order)
        assert evicted == sorted(evicted, reverse=True), "those that finished earlier go first"
        assert not all(evicted), "and no more of them than need be"
        statistics = await store.statistics()
        number = sum(evicted) * self._SPANS_PER_ROLLOUT
        assert statistics["evicted_spans"] == number
        everything_else = (statistics["total_rollouts"] - sum(evicted)) * self._SPANS_PER_ROLLOUT
        assert statistics["total_spans"] == everything_else

    async def test_eviction_goes_down_to_the_safe_threshold(self, store: LightningStore) -> None:
        for _ in range(2 * self._ROLLOUTS_TO_THRESHOLD):
            rollout = await self._rollout(store)
            assert (await store.statistics())["total_span_bytes"] <= self.eviction_threshold_bytes
            await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
            if (await store.statistics())["evicted_spans"]:
                break
        statistics = await store.statistics()
        assert statistics["evicted_spans"] > 0
        assert statistics["total_span_bytes"] <= self.safe_threshold_bytes

    async def test_spans_of_unfinished_rollouts_are_never_evicted(self, store: LightningStore) -> None:
        finished = await self._rollout(store)
        await store.update_attempt(finished.rollout_id, "latest", status="failed")
        rollouts = [await self._rollout(store) for _ in range(2 * self._ROLLOUTS_TO_THRESHOLD)]
        await store.update_rollout(rollouts[0].rollout_id, status="requeuing")
        assert await self._evicted(store, [finished, *rollouts]) == [True] + [False] * len(rollouts)
        statistics = await store.statistics()
        assert statistics["evicted_spans"] == self._SPANS_PER_ROLLOUT
        assert statistics["total_span_bytes"] > self.eviction_threshold_bytes

    async def _evict(self, store: LightningStore) -> AttemptedRollout:
        rollout = await self._rollout(store)
        await store.update_attempt(rollout.rollout_id, "latest", status="succeeded")
        while (await store.statistics())["evicted_spans"] == 0:
            await self._rollout(store)
        return rollout

    async def test_evicted_spans_are_an_error_that_says_what_to_do(self, store: LightningStore) -> None:
        rollout = await self._evict(store)
        for attempt_id in (None, "latest", rollout.attempt.attempt_id):
            with refused(RuntimeError, rollout.rollout_id, str(self._SPANS_PER_ROLLOUT), "evict"):
                await store.query_spans(rollout.rollout_id, attempt_id)
        with refused_for(RuntimeError, "eviction_memory_threshold"):
            await store.query_spans(rollout.rollout_id, limit=0)

    async def test_all_but_the_spans_is_still_there(self, store: LightningStore) -> None:
        rollout = await self._evict(store)
        assert (await read(store, rollout.rollout_id)).input == "task"
        assert await statuses(store, rollout.rollout_id) == ("succeeded", "succeeded")
        ids = (rollout.rollout_id, rollout.attempt.attempt_id)
        assert await store.get_next_span_sequence_id(*ids) == self._SPANS_PER_ROLLOUT + 1

    async def test_what_came_after_an_eviction_is_there(self, store: LightningStore) -> None:
        rollout = await self._evict(store)
        assert await store.add_span(make_span(rollout)) is not None
        with refused(RuntimeError, rollout.rollout_id):
            await store.query_spans(rollout.rollout_id, "latest")
        again = await store.start_attempt(rollout.rollout_id)
        stored = await store.add_span(make_span(again))
        assert list(await store.query_spans(rollout.rollout_id, "latest")) == [stored]
        with refused(RuntimeError, rollout.rollout_id):
            await store.query_spans(rollout.rollout_id)
