"""Partial updates: for every optional field, `UNSET` leaves it, `None` clears it, and a value replaces it."""

from __future__ import annotations

from typing import Any

import pytest

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import (
    UNKNOWN_RESOURCES,
    UNKNOWN_ROLLOUT,
    StoreTheme,
    everything,
    read,
    refused,
)
from lightning.types import UNSET, PromptTemplate, Rollout, RolloutConfig

CONFIG = RolloutConfig(timeout_seconds=60, max_attempts=2, retry_condition=["failed"])
OTHER_CONFIG = RolloutConfig(unresponsive_seconds=5)

ROLLOUT_FIELDS: list[tuple[str, Any]] = [
    ("input", {"new": [1]}),
    ("input", None),
    ("input", ""),
    ("mode", "test"),
    ("mode", None),
    ("resources_id", None),
    ("config", OTHER_CONFIG),
    ("metadata", {"new": {}}),
    ("metadata", {}),
    ("metadata", None),
]
ATTEMPT_FIELDS: list[tuple[str, Any]] = [
    ("worker_id", "w-2"),
    ("worker_id", None),
    ("last_heartbeat_time", 1_000_000.25),
    ("last_heartbeat_time", None),
    ("metadata", {"new": [None]}),
    ("metadata", {}),
    ("metadata", None),
]


async def full_rollout(store: LightningStore) -> Rollout:
    """A rollout whose every optional field has a value."""
    await store.add_resources({"prompt": PromptTemplate(template="one")})
    rollout = await store.enqueue_rollout({"old": 1}, mode="train", config=CONFIG, metadata={"old": 1})
    assert rollout.resources_id is not None
    return rollout


class UpdateContract(StoreTheme):
    """`update_rollout`, `update_attempt` and `update_worker`."""

    @pytest.mark.parametrize(("field", "value"), ROLLOUT_FIELDS)
    async def test_a_field_of_a_rollout(self, store: LightningStore, field: str, value: Any) -> None:
        rollout = await full_rollout(store)
        arguments: dict[str, Any] = {field: value}
        updated = await store.update_rollout(rollout.rollout_id, **arguments)
        assert updated == rollout.model_copy(update=arguments)
        assert await read(store, rollout.rollout_id) == updated

    async def test_the_resources_of_a_rollout(self, store: LightningStore) -> None:
        rollout = await full_rollout(store)
        other = await store.add_resources({"prompt": PromptTemplate(template="two")})
        updated = await store.update_rollout(rollout.rollout_id, resources_id=other.resources_id)
        assert updated == rollout.model_copy(update={"resources_id": other.resources_id})

    async def test_what_is_unset_in_a_rollout_stays(self, store: LightningStore) -> None:
        rollout = await full_rollout(store)
        assert await store.update_rollout(rollout.rollout_id) == rollout
        unset: dict[str, Any] = dict.fromkeys(
            ("input", "mode", "resources_id", "status", "config", "metadata"), UNSET
        )
        assert await store.update_rollout(rollout.rollout_id, **unset) == rollout
        assert await read(store, rollout.rollout_id) == rollout

    async def test_many_fields_of_a_rollout_at_once(self, store: LightningStore) -> None:
        rollout = await full_rollout(store)
        updated = await store.update_rollout(
            rollout.rollout_id, input=None, mode=None, config=OTHER_CONFIG, metadata=None, status="running"
        )
        assert (updated.input, updated.mode, updated.metadata) == (None, None, None)
        assert (updated.config, updated.status) == (OTHER_CONFIG, "running")
        assert updated.resources_id == rollout.resources_id

    async def test_a_new_config_counts_from_then_on(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        await store.update_rollout(
            started.rollout_id, config=RolloutConfig(max_attempts=2, retry_condition=["failed"])
        )
        await store.update_attempt(started.rollout_id, "latest", status="failed")
        assert (await read(store, started.rollout_id)).status == "requeuing"

    async def test_updates_of_rollouts_take_copies(self, store: LightningStore) -> None:
        rollout = await full_rollout(store)
        config, metadata, task = CONFIG.model_copy(deep=True), {"tags": ["a"]}, {"parts": [1]}
        updated = await store.update_rollout(rollout.rollout_id, input=task, config=config, metadata=metadata)
        config.max_attempts = 99
        metadata["tags"].append("b")
        task["parts"].append(2)
        updated.config.retry_condition.append("timeout")
        updated.input["parts"].append(3)
        found = await read(store, rollout.rollout_id)
        assert (found.config, found.metadata, found.input) == (CONFIG, {"tags": ["a"]}, {"parts": [1]})

    async def test_an_update_of_a_rollout_is_refused_whole(self, store: LightningStore) -> None:
        rollout = await full_rollout(store)
        before = await everything(store)
        refusals: list[tuple[type[Exception], str, dict[str, Any]]] = [
            (ValueError, UNKNOWN_RESOURCES, {"resources_id": UNKNOWN_RESOURCES}),
            (ValueError, "training", {"mode": "training"}),
            (ValueError, "unresponsive", {"status": "unresponsive"}),
            (TypeError, "metadata", {"metadata": ["no", "object"]}),
            (TypeError, 'metadata["a"]', {"metadata": {"a": {1}}}),
            (TypeError, "input[1]", {"input": [0, {1}]}),
        ]
        for kind, mentions, bad in refusals:
            for good in ({"mode": "test", "metadata": None}, {"status": "succeeded", "input": "new"}):
                arguments: dict[str, Any] = {**good, **bad}
                with refused(kind, mentions):
                    await store.update_rollout(rollout.rollout_id, **arguments)
        assert await everything(store) == before

    async def test_an_unknown_rollout_is_not_updated(self, store: LightningStore) -> None:
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.update_rollout(UNKNOWN_ROLLOUT, status="cancelled")
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.update_rollout(UNKNOWN_ROLLOUT)

    @pytest.mark.parametrize(("field", "value"), ATTEMPT_FIELDS)
    async def test_a_field_of_an_attempt(self, store: LightningStore, field: str, value: Any) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        ids = (started.rollout_id, started.attempt.attempt_id)
        attempt = await store.update_attempt(*ids, metadata={"old": 1}, last_heartbeat_time=5.0)
        assert (attempt.metadata, attempt.last_heartbeat_time) == ({"old": 1}, 5.0)
        arguments: dict[str, Any] = {field: value}
        updated = await store.update_attempt(*ids, **arguments)
        assert updated == attempt.model_copy(update=arguments)
        assert await store.get_latest_attempt(started.rollout_id) == updated

    async def test_what_is_unset_in_an_attempt_stays(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        ids = (started.rollout_id, started.attempt.attempt_id)
        attempt = await store.update_attempt(*ids, metadata={"old": 1}, last_heartbeat_time=5.0)
        assert await store.update_attempt(*ids) == attempt
        unset: dict[str, Any] = dict.fromkeys(
            ("status", "worker_id", "last_heartbeat_time", "metadata"), UNSET
        )
        assert await store.update_attempt(*ids, **unset) == attempt
        updated = await store.update_attempt(*ids, status="succeeded")
        assert (updated.metadata, updated.last_heartbeat_time) == ({"old": 1}, 5.0)

    async def test_an_update_of_an_attempt_is_refused_whole(self, store: LightningStore) -> None:
        started = await store.start_rollout("task", worker_id="w-1")
        before = await everything(store)
        refusals: list[tuple[type[Exception], str, dict[str, Any]]] = [
            (ValueError, "done", {"status": "done"}),
            (TypeError, "metadata", {"metadata": "text"}),
            (ValueError, 'metadata["a"]', {"metadata": {"a": float("nan")}}),
        ]
        for kind, mentions, bad in refusals:
            arguments: dict[str, Any] = {"worker_id": "w-2", "status": "succeeded", **bad}
            with refused(kind, mentions):
                await store.update_attempt(started.rollout_id, "latest", **arguments)
        assert await everything(store) == before

    async def test_the_stats_of_a_worker(self, store: LightningStore) -> None:
        steps: list[tuple[dict[str, Any], Any]] = [
            ({}, None),
            ({"heartbeat_stats": {"cpu": 0.5}}, {"cpu": 0.5}),
            ({}, {"cpu": 0.5}),
            ({"heartbeat_stats": UNSET}, {"cpu": 0.5}),
            ({"heartbeat_stats": {}}, {}),
            ({"heartbeat_stats": {"cpu": 1}}, {"cpu": 1}),
            ({"heartbeat_stats": None}, None),
        ]
        for arguments, expected in steps:
            worker = await store.update_worker("w-1", **arguments)
            assert worker.heartbeat_stats == expected
            found = await store.get_worker_by_id("w-1")
            assert found is not None
            assert found.heartbeat_stats == expected

    async def test_stats_that_cannot_be_stored_are_refused(self, store: LightningStore) -> None:
        await store.update_worker("w-1", {"cpu": 0.5})
        before = await everything(store)
        stats: Any = {"gpus": [{1}]}
        with refused(TypeError, 'heartbeat_stats["gpus"][0]'):
            await store.update_worker("w-1", stats)
        with refused(TypeError, "heartbeat_stats"):
            await store.update_worker("w-2", stats["gpus"])
        assert await everything(store) == before
