"""New rollouts: what is recorded about them, what they are bound to, and that records are copies."""

from __future__ import annotations

from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import (
    UNKNOWN_RESOURCES,
    UNKNOWN_ROLLOUT,
    StoreTheme,
    claim,
    everything,
    read,
    refused,
)
from lightning.types import (
    AttemptedRollout,
    EnqueueRolloutRequest,
    PromptTemplate,
    Rollout,
    RolloutConfig,
)

FULL_CONFIG = RolloutConfig(
    timeout_seconds=3600.5, unresponsive_seconds=1800, max_attempts=3, retry_condition=["failed", "timeout"]
)


class RolloutContract(StoreTheme):
    """Creating rollouts."""

    async def test_asking_whether_it_can_write_changes_nothing(self, store: LightningStore) -> None:
        await store.check_writable()
        await store.start_rollout("task", worker_id="w-1")
        before = await everything(store)
        await store.check_writable()
        assert await everything(store) == before

    async def test_an_enqueued_rollout_is_recorded_as_it_was_given(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout(
            {"question": "why"}, mode="val", config=FULL_CONFIG, metadata={"epoch": 3}
        )
        assert (rollout.status, rollout.mode, rollout.end_time) == ("queuing", "val", None)
        assert (rollout.input, rollout.metadata) == ({"question": "why"}, {"epoch": 3})
        assert rollout.config == FULL_CONFIG
        assert rollout.start_time > 0
        assert await read(store, rollout.rollout_id) == rollout
        assert await store.get_latest_attempt(rollout.rollout_id) is None
        assert list(await store.query_attempts(rollout.rollout_id)) == []

    async def test_what_is_left_out_has_its_default(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout("task")
        assert (rollout.mode, rollout.resources_id, rollout.metadata) == (None, None, None)
        assert rollout.config == RolloutConfig()
        assert type(rollout) is Rollout

    async def test_a_started_rollout_has_its_first_attempt(self, store: LightningStore) -> None:
        started = await store.start_rollout(
            [1, 2], mode="train", config=FULL_CONFIG, metadata={"a": None}, worker_id="w-1"
        )
        assert (started.status, started.mode, started.end_time) == ("preparing", "train", None)
        assert (started.input, started.metadata, started.config) == ([1, 2], {"a": None}, FULL_CONFIG)
        attempt = started.attempt
        assert (attempt.sequence_id, attempt.status, attempt.worker_id) == (1, "preparing", "w-1")
        assert (attempt.rollout_id, attempt.end_time) == (started.rollout_id, None)
        assert (attempt.last_heartbeat_time, attempt.metadata) == (None, None)
        assert attempt.start_time >= started.start_time > 0
        assert await store.get_latest_attempt(started.rollout_id) == attempt
        assert await read(store, started.rollout_id) == started

    async def test_a_rollout_with_attempts_is_always_read_with_the_latest(
        self, store: LightningStore
    ) -> None:
        started = await store.start_rollout("task")
        again = await store.start_attempt(started.rollout_id)
        found = [
            await read(store, started.rollout_id),
            (await store.query_rollouts())[0],
            await store.update_rollout(started.rollout_id, metadata={}),
        ]
        for rollout in found:
            assert isinstance(rollout, AttemptedRollout)
            assert rollout.attempt == again.attempt

    async def test_ids_are_fresh_and_say_what_they_name(self, store: LightningStore) -> None:
        rollouts = [await store.start_rollout("task") for _ in range(5)]
        assert len({rollout.rollout_id for rollout in rollouts}) == 5
        assert len({rollout.attempt.attempt_id for rollout in rollouts}) == 5
        assert all(rollout.rollout_id.startswith("ro-") for rollout in rollouts)
        assert all(rollout.attempt.attempt_id.startswith("at-") for rollout in rollouts)

    @pytest.mark.parametrize("mode", ["train", "val", "test", None])
    async def test_every_mode_is_kept(self, store: LightningStore, mode: Any) -> None:
        enqueued = await store.enqueue_rollout("task", mode=mode)
        started = await store.start_rollout("task", mode=mode)
        assert [enqueued.mode, started.mode] == [mode, mode]
        assert (await claim(store)).mode == mode

    async def test_an_unknown_mode_is_refused(self, store: LightningStore) -> None:
        mode: Any = "training"
        before = await everything(store)
        with refused(ValueError, "mode", "training"):
            await store.enqueue_rollout("task", mode=mode)
        with refused(ValueError, "mode", "training"):
            await store.start_rollout("task", mode=mode)
        assert await everything(store) == before

    async def test_a_config_that_became_invalid_is_refused(self, store: LightningStore) -> None:
        config = RolloutConfig()
        config.max_attempts = 0
        before = await everything(store)
        with refused(ValueError, "max_attempts"):
            await store.enqueue_rollout("task", config=config)
        with refused(ValueError, "max_attempts"):
            await store.start_rollout("task", config=config)
        assert await everything(store) == before

    async def test_many_are_created_in_order(self, store: LightningStore) -> None:
        requests = [
            EnqueueRolloutRequest(input=index, mode="test", config=FULL_CONFIG, metadata={"index": index})
            for index in range(4)
        ]
        rollouts = await store.enqueue_many_rollouts(requests)
        assert [rollout.input for rollout in rollouts] == [0, 1, 2, 3]
        assert [rollout.metadata for rollout in rollouts] == [{"index": index} for index in range(4)]
        assert all((r.status, r.mode, r.config) == ("queuing", "test", FULL_CONFIG) for r in rollouts)
        assert list(await store.query_rollouts()) == list(rollouts)

    async def test_many_may_be_none(self, store: LightningStore) -> None:
        assert list(await store.enqueue_many_rollouts([])) == []

    async def test_many_are_created_all_or_none(self, store: LightningStore) -> None:
        before = await everything(store)
        with refused(TypeError, "input"):
            await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=item) for item in (1, 2, {3})])
        with refused(ValueError, UNKNOWN_RESOURCES):
            await store.enqueue_many_rollouts(
                [
                    EnqueueRolloutRequest(input=1),
                    EnqueueRolloutRequest(input=2, resources_id=UNKNOWN_RESOURCES),
                ]
            )
        assert await everything(store) == before
        assert await store.dequeue_rollout() is None

    async def test_many_are_requests(self, store: LightningStore) -> None:
        before = await everything(store)
        for bad in ({"input": 2}, "task", None):
            with refused(TypeError, "rollouts[1]", type(bad).__name__):
                await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=1), bad])  # type: ignore[list-item]
        assert await everything(store) == before

    # --- Bound to resources ---

    async def test_without_an_id_the_latest_resources_are_bound(self, store: LightningStore) -> None:
        first = await store.add_resources({"prompt": PromptTemplate(template="one")})
        early = await store.enqueue_rollout("task")
        second = await store.add_resources({"prompt": PromptTemplate(template="two")})
        late = await store.enqueue_rollout("task")
        started = await store.start_rollout("task")
        many = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input="task")])
        assert early.resources_id == first.resources_id
        assert {late.resources_id, started.resources_id, many[0].resources_id} == {second.resources_id}

    async def test_a_rollout_stays_bound(self, store: LightningStore) -> None:
        first = await store.add_resources({"prompt": PromptTemplate(template="one")})
        rollout = await store.enqueue_rollout("task")
        await store.add_resources({"prompt": PromptTemplate(template="two")})
        claimed = await claim(store)
        again = await store.start_attempt(rollout.rollout_id)
        assert claimed.resources_id == again.resources_id == first.resources_id

    async def test_the_latest_may_be_a_new_version_of_older_resources(self, store: LightningStore) -> None:
        first = await store.add_resources({"prompt": PromptTemplate(template="one")})
        await store.add_resources({"prompt": PromptTemplate(template="two")})
        await store.update_resources(first.resources_id, {"prompt": PromptTemplate(template="three")})
        assert (await store.enqueue_rollout("task")).resources_id == first.resources_id

    async def test_named_resources_are_bound(self, store: LightningStore) -> None:
        first = await store.add_resources({"prompt": PromptTemplate(template="one")})
        await store.add_resources({"prompt": PromptTemplate(template="two")})
        enqueued = await store.enqueue_rollout("task", resources_id=first.resources_id)
        started = await store.start_rollout("task", resources_id=first.resources_id)
        assert enqueued.resources_id == started.resources_id == first.resources_id

    async def test_unknown_resources_are_refused(self, store: LightningStore) -> None:
        before = await everything(store)
        with refused(ValueError, UNKNOWN_RESOURCES):
            await store.enqueue_rollout("task", resources_id=UNKNOWN_RESOURCES)
        with refused(ValueError, UNKNOWN_RESOURCES):
            await store.start_rollout("task", resources_id=UNKNOWN_RESOURCES)
        assert await everything(store) == before

    # --- Copies ---

    async def test_what_was_handed_in_is_a_copy(self, store: LightningStore) -> None:
        config, metadata, task = FULL_CONFIG.model_copy(deep=True), {"tags": ["a"]}, {"parts": [1]}
        enqueued = await store.enqueue_rollout(task, config=config, metadata=metadata)
        started = await store.start_rollout(task, config=config, metadata=metadata)
        requests = [EnqueueRolloutRequest(input=task, config=config, metadata=metadata)]
        (of_many,) = await store.enqueue_many_rollouts(requests)
        _scribble(config, metadata, task)
        for rollout in (enqueued, started, of_many):
            await _check_untouched(store, rollout.rollout_id)

    async def test_what_was_handed_out_is_a_copy(self, store: LightningStore) -> None:
        made: dict[str, Any] = {"config": FULL_CONFIG, "metadata": {"tags": ["a"]}}
        rollout = await store.enqueue_rollout({"parts": [1]}, **made)
        started = await store.start_rollout({"parts": [1]}, **made)
        many = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input={"parts": [1]}, **made)])
        handed_out = [
            rollout,
            started,
            *many,
            *await store.query_rollouts(),
            await read(store, rollout.rollout_id),
            *await store.dequeue_many_rollouts(limit=2),
            await store.start_attempt(rollout.rollout_id),
            await store.update_rollout(rollout.rollout_id, mode="test"),
        ]
        for record in handed_out:
            assert record.metadata is not None
            _scribble(record.config, record.metadata, record.input)
            await _check_untouched(store, record.rollout_id)

    async def test_waiting_hands_out_copies(self, store: LightningStore) -> None:
        rollout = await store.enqueue_rollout({"parts": [1]}, config=FULL_CONFIG, metadata={"tags": ["a"]})
        await store.update_rollout(rollout.rollout_id, status="succeeded")
        (finished,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=0)
        assert finished.metadata is not None
        _scribble(finished.config, finished.metadata, finished.input)
        await _check_untouched(store, rollout.rollout_id)

    async def test_attempts_are_copies(self, store: LightningStore) -> None:
        metadata = {"tags": ["a"]}
        started = await store.start_rollout("task")
        updated = await store.update_attempt(
            started.rollout_id, started.attempt.attempt_id, metadata=metadata
        )
        metadata["tags"].append("b")
        handed_out = [
            updated,
            await store.get_latest_attempt(started.rollout_id),
            (await store.query_attempts(started.rollout_id))[0],
        ]
        for attempt in handed_out:
            assert attempt is not None
            assert attempt.metadata == {"tags": ["a"]}
            attempt.metadata["tags"].append("c")
            attempt.status = "failed"
        latest = await store.get_latest_attempt(started.rollout_id)
        assert latest is not None
        assert (latest.metadata, latest.status) == ({"tags": ["a"]}, "preparing")

    # --- Looking them up ---

    async def test_what_is_unknown_is_none_or_refused(self, store: LightningStore) -> None:
        assert await store.get_rollout_by_id(UNKNOWN_ROLLOUT) is None
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.get_latest_attempt(UNKNOWN_ROLLOUT)
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.query_attempts(UNKNOWN_ROLLOUT)


def _scribble(config: RolloutConfig, metadata: dict[str, Any], task: dict[str, Any]) -> None:
    config.max_attempts = 99
    config.retry_condition.append("unresponsive")
    metadata["tags"].append("scribbled")
    task["parts"].append("scribbled")


async def _check_untouched(store: LightningStore, rollout_id: str) -> None:
    rollout = await read(store, rollout_id)
    assert (rollout.config, rollout.metadata, rollout.input) == (FULL_CONFIG, {"tags": ["a"]}, {"parts": [1]})
