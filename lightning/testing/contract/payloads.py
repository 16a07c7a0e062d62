"""Payloads: JSON values come back equal and of the same type; everything else is refused, naming the path."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import StoreTheme, claim, everything, read, refused, same
from lightning.types import EnqueueRolloutRequest

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1.0,
    -0.0,
    0.1,
    1e308,
    5e-324,
    2**53 + 1,
    -(2**63) - 1,
    2**64,
    10**300,
    "",
    "text",
    "\x00",
    "a\x00b\u2028\x7f",
    "völlig \U0001f680 \u202e \ufeff \uffff",
    [],
    {},
    [[], {}, [[]], None],
    [1, 1.0, True, "1", None],
    {"": {}, ".": 1, "$": 2, "a.b": {"$set": {"$in": [1]}}, "\x00": 3, "__proto__": 4, "völlig": 5},
    {"b": 1, "a": 2, "c": [{"z": 1, "y": 2}]},
    {"resource_type": "llm", "rollout_id": "x"},
    "NaN",
]


class Opaque:
    """No JSON value. Shown alike in every process, for the tests that it parametrizes have the same names in all."""

    def __repr__(self) -> str:
        return "Opaque()"


@dataclasses.dataclass
class Point:
    """A dataclass that a user might hand in."""

    x: int
    tags: tuple[str, ...] = ("a",)


class Task(BaseModel):
    """A model that a user might hand in."""

    question: str
    point: Point | None = None
    options: tuple[int, float] = (1, 2.0)


class Level(enum.IntEnum):
    """An enumeration that is also a number."""

    HIGH = 3


CONVERTED: list[tuple[Any, Any]] = [
    ((1, (2, [3, ()])), [1, [2, [3, []]]]),
    (Point(1), {"x": 1, "tags": ["a"]}),
    (
        Task(question="why", point=Point(2)),
        {"question": "why", "point": {"x": 2, "tags": ["a"]}, "options": [1, 2.0]},
    ),
    (
        [{"nested": Task(question="why")}],
        [{"nested": {"question": "why", "point": None, "options": [1, 2.0]}}],
    ),
    (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    ({"level": Level.HIGH}, {"level": 3}),
]
"""What becomes a JSON value at the door, and which."""

REFUSED: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "", {1, 2}),
    (TypeError, '["a"][3]', {"a": [0, 1, 2, Opaque()]}),
    (TypeError, "[0]", [b"bytes"]),
    (TypeError, '["a"]', {"a": 1j}),
    (TypeError, '["x"]', {"x": Point}),
    (TypeError, '["point"]["x"]', {"point": Point(x=frozenset())}),  # type: ignore[arg-type]
    (ValueError, '["a"]', {"a": math.nan}),
    (ValueError, "[1]", [0, math.inf]),
    (ValueError, '["a"]["b"]', {"a": {"b": -math.inf}}),
    (ValueError, "[0]", ["\ud800"]),
    (ValueError, "surrogate", {"\udfff": 1}),
    (ValueError, '["a"]', {"a": {1: "one"}}),
    (ValueError, "None", {None: 1}),
]
"""What is no JSON value, the error, and what it must mention (after the name of the payload)."""

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**200), max_value=2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), children, max_size=4)
    ),
    max_leaves=20,
)

# The store may be shared by the examples: each has a rollout of its own.
examples = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


Call = Callable[[], Awaitable[Any]]


class PayloadContract(StoreTheme):
    """`input`, `metadata` and `heartbeat_stats`."""

    @pytest.mark.parametrize("value", VALUES, ids=repr)
    async def test_an_input_comes_back_as_it_was(self, store: LightningStore, value: Any) -> None:
        enqueued = await store.enqueue_rollout(value)
        (many,) = await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=value)])
        started = await store.start_rollout(value)
        updated = await store.update_rollout((await store.enqueue_rollout("old")).rollout_id, input=value)
        for rollout in (enqueued, many, started, updated):
            assert same(rollout.input, value)
            assert same((await read(store, rollout.rollout_id)).input, value)
        assert same((await claim(store)).input, value)
        assert all(same(rollout.input, value) for rollout in await store.query_rollouts())

    @pytest.mark.parametrize("value", VALUES, ids=repr)
    async def test_metadata_and_stats_come_back_as_they_were(self, store: LightningStore, value: Any) -> None:
        holding = {"value": value}
        started = await store.start_rollout("task", metadata=holding)
        assert same(started.metadata, holding)
        updated = await store.update_rollout(started.rollout_id, metadata={"other": [value]})
        assert same(updated.metadata, {"other": [value]})
        attempt = await store.update_attempt(started.rollout_id, "latest", metadata=holding)
        found = await store.get_latest_attempt(started.rollout_id)
        assert found is not None
        worker = await store.update_worker("w-1", holding)
        known = await store.get_worker_by_id("w-1")
        assert known is not None
        for stored in (attempt.metadata, found.metadata, worker.heartbeat_stats, known.heartbeat_stats):
            assert same(stored, holding)

    @examples
    @given(value=json_values)
    async def test_any_json_value_comes_back_as_it_was(self, store: LightningStore, value: Any) -> None:
        rollout = await store.start_rollout(value, metadata={"value": value})
        found = await read(store, rollout.rollout_id)
        assert same(found.input, value)
        assert same(found.metadata, {"value": value})

    async def test_a_deep_value_comes_back(self, store: LightningStore) -> None:
        deep: Any = "bottom"
        for level in range(100):
            deep = {"down": deep} if level % 2 else [deep]
        rollout = await store.enqueue_rollout(deep)
        assert (await read(store, rollout.rollout_id)).input == deep

    async def test_a_bottomless_value_is_refused(self, store: LightningStore) -> None:
        endless: list[Any] = []
        endless.append(endless)
        before = await everything(store)
        with refused(ValueError, "input"):
            await store.enqueue_rollout(endless)
        assert await everything(store) == before

    async def test_a_large_value_comes_back(self, store: LightningStore) -> None:
        large = {"text": "x" * 1_000_000, "many": list(range(10_000))}
        rollout = await store.enqueue_rollout(large)
        assert (await read(store, rollout.rollout_id)).input == large

    @pytest.mark.parametrize(("given", "expected"), CONVERTED, ids=repr)
    async def test_models_become_json_at_the_door(
        self, store: LightningStore, given: Any, expected: Any
    ) -> None:
        rollout = await store.enqueue_rollout(given, metadata={"value": given})
        worker = await store.update_worker("w-1", {"value": given})
        assert same(rollout.input, expected)
        assert same(rollout.metadata, {"value": expected})
        assert same(worker.heartbeat_stats, {"value": expected})
        assert same((await read(store, rollout.rollout_id)).input, expected)

    async def test_an_object_may_be_given_as_a_model(self, store: LightningStore) -> None:
        metadata: Any = Task(question="why")
        rollout = await store.enqueue_rollout("task", metadata=metadata)
        assert same(rollout.metadata, {"question": "why", "point": None, "options": [1, 2.0]})

    @pytest.mark.parametrize(("kind", "mentions", "bad"), REFUSED, ids=repr)
    async def test_what_is_no_json_is_refused(
        self, store: LightningStore, kind: type[Exception], mentions: str, bad: Any
    ) -> None:
        started = await store.start_rollout("task")
        await store.update_worker("w-1")
        ids = (started.rollout_id, started.attempt.attempt_id)
        before = await everything(store)
        calls: list[Call] = [
            lambda: store.enqueue_rollout(bad),
            lambda: store.start_rollout(bad),
            lambda: store.enqueue_many_rollouts([EnqueueRolloutRequest(input=item) for item in (1, bad)]),
            lambda: store.update_rollout(ids[0], input=bad),
        ]
        for call in calls:
            with refused(kind, f"input{mentions}" if mentions.startswith("[") else mentions):
                await call()
        holding = {"value": bad}
        path = f'["value"]{mentions}' if mentions.startswith("[") else mentions
        named_calls: list[tuple[str, Call]] = [
            ("metadata", lambda: store.enqueue_rollout("task", metadata=holding)),
            ("metadata", lambda: store.start_rollout("task", metadata=holding)),
            ("metadata", lambda: store.update_rollout(ids[0], metadata=holding)),
            ("metadata", lambda: store.update_attempt(*ids, metadata=holding)),
            ("heartbeat_stats", lambda: store.update_worker("w-1", holding)),
            ("heartbeat_stats", lambda: store.update_worker("w-new", holding)),
        ]
        for name, call in named_calls:
            with refused(kind, name, path):
                await call()
        assert await everything(store) == before

    @pytest.mark.parametrize("bad", [[], "text", 1, True, [("a", 1)]], ids=repr)
    async def test_metadata_must_be_an_object(self, store: LightningStore, bad: Any) -> None:
        started = await store.start_rollout("task")
        before = await everything(store)
        calls: list[tuple[str, Call]] = [
            ("metadata", lambda: store.enqueue_rollout("task", metadata=bad)),
            ("metadata", lambda: store.start_rollout("task", metadata=bad)),
            ("metadata", lambda: store.update_rollout(started.rollout_id, metadata=bad)),
            ("metadata", lambda: store.update_attempt(started.rollout_id, "latest", metadata=bad)),
            ("heartbeat_stats", lambda: store.update_worker("w-1", bad)),
        ]
        for name, call in calls:
            with refused(TypeError, name):
                await call()
        assert await everything(store) == before
