"""What our own stores say to wrong arguments: the same on every backend and through the client."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import (
    InMemoryLightningStore,
    LightningStore,
    LightningStoreThreaded,
    SQLiteLightningStore,
)
from lightning.testing.records import make_span
from lightning.types import RolloutConfig

pytestmark = pytest.mark.anyio

LAST = 2**63 - 1


@pytest.fixture(params=["memory", "threaded", "sqlite", "client of memory", "client of sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LightningStore]:
    async with AsyncExitStack() as stack:
        store: LightningStore = (
            SQLiteLightningStore(tmp_path / "store.db")
            if "sqlite" in request.param
            else InMemoryLightningStore()
        )
        stack.push_async_callback(store.close)
        if request.param == "threaded":
            store = LightningStoreThreaded(store)
            stack.push_async_callback(store.close)
        if "client" in request.param:
            server = LightningStoreServer(store, port=0)
            await server.start()
            stack.push_async_callback(server.close)
            store = LightningStoreClient(server.endpoint)
            stack.push_async_callback(store.close)
        yield store


async def test_when_sequence_ids_are_used_up_that_is_said_and_nothing_stored(store: LightningStore) -> None:
    started = await store.start_rollout("task")
    ids = (started.rollout_id, started.attempt.attempt_id)
    last = make_span(started, sequence_id=LAST)
    assert await store.add_span(last) == last
    with pytest.raises(ValueError, match=f"has no sequence ids left: they end at {LAST}"):
        await store.add_span(make_span(started))
    with pytest.raises(ValueError, match="no sequence ids left"):
        await store.get_next_span_sequence_id(*ids)
    explicit = make_span(started, sequence_id=7)
    assert await store.add_span(explicit) == explicit
    assert list(await store.query_spans(started.rollout_id)) == [explicit, last]


Call = Callable[[Any], Awaitable[Any]]

BAD_CALLS: dict[str, tuple[type[Exception], str, Call]] = {
    "an id that is none": (
        TypeError,
        "rollout_id must be a string, not NoneType",
        lambda store: store.get_rollout_by_id(None),
    ),
    "a number for an id": (TypeError, "rollout_id must be a string, not int", lambda s: s.query_spans(5)),
    "an id that is no text": (
        ValueError,
        "rollout_id holds a lone surrogate",
        lambda store: store.update_rollout("ro-\ud800", metadata={}),
    ),
    "a rollout for its attempt": (
        TypeError,
        "attempt_id must be a string, not dict",
        lambda store: store.update_attempt("ro-1", {}, status="failed"),
    ),
    "one id to wait for": (
        ValueError,
        "rollout_ids must be a list, not the string 'ro-1'",
        lambda store: store.wait_for_rollouts(rollout_ids="ro-1", timeout=0),
    ),
    "a number to wait for": (
        TypeError,
        r"rollout_ids\[1\] must be a string, not int",
        lambda store: store.wait_for_rollouts(rollout_ids=["ro-1", 1], timeout=0),
    ),
    "one id to watch": (
        ValueError,
        "rollout_ids must be a list, not the string 'ro-1'",
        lambda store: anext(store.watch_rollouts(rollout_ids="ro-1")),
    ),
    "a number to look for": (
        TypeError,
        r"rollout_id_in\[0\] must be a string, not int",
        lambda store: store.query_rollouts(rollout_id_in=[7]),
    ),
    "a part that is no text": (
        TypeError,
        "rollout_id_contains must be a string, not bytes",
        lambda store: store.query_rollouts(rollout_id_contains=b"ro"),
    ),
    "a name that is no text": (
        TypeError,
        "name must be a string, not int",
        lambda store: store.query_spans("ro-1", name=1),
    ),
    "a logic of its own": (
        ValueError,
        "filter_logic must be 'and' or 'or', not 'xor'",
        lambda store: store.query_workers(filter_logic="xor"),
    ),
    "an order of its own": (
        ValueError,
        "sort_order must be 'asc' or 'desc', not 'ASC'",
        lambda store: store.query_resources(sort_order="ASC"),
    ),
    "a truth for a number": (
        ValueError,
        "limit must be -1 .* not True",
        lambda store: store.query_rollouts(limit=True),
    ),
    "more than can be counted": (
        ValueError,
        f"limit must be -1 .* not {2**63}",
        lambda store: store.query_rollouts(limit=2**63),
    ),
    "more than can be claimed": (
        ValueError,
        f"limit must be a whole number of at least 0, not {2**63}",
        lambda store: store.dequeue_many_rollouts(limit=2**63),
    ),
    "a worker that is no text": (
        ValueError,
        "worker_id holds a lone surrogate",
        lambda store: store.dequeue_rollout("\ud800"),
    ),
    "a worker without a name": (
        ValueError,
        "worker_id must be a non-empty string, not 5",
        lambda store: store.update_worker(5),
    ),
    "a version that is none": (
        ValueError,
        "version must be None or a whole number, not '1'",
        lambda store: store.get_resources_by_id("rs-1", "1"),
    ),
    "a truth for a time": (
        ValueError,
        "last_heartbeat_time must be seconds since the epoch or None, not True",
        lambda store: store.update_attempt("ro-1", "at-1", last_heartbeat_time=True),
    ),
    "a time without end": (
        ValueError,
        "last_heartbeat_time must be seconds since the epoch or None, not 1000",
        lambda store: store.update_attempt("ro-1", "at-1", last_heartbeat_time=10**400),
    ),
    "a time to listen that is none": (
        ValueError,
        "timeout must be None or a number of seconds, 0 or more, not nan",
        lambda store: store.receive_commands("worker", timeout=math.nan),
    ),
    "commands for a worker without a name": (
        ValueError,
        "worker_id must be a non-empty string, not ''",
        lambda store: store.receive_commands("", timeout=0),
    ),
    "a number for resources to run against": (
        TypeError,
        "resources_id must be a string, not int",
        lambda store: store.enqueue_rollout("task", resources_id=3),
    ),
    "a number for resources to start with": (
        TypeError,
        "resources_id must be a string, not int",
        lambda store: store.start_rollout("task", resources_id=3),
    ),
    "a number for other resources": (
        TypeError,
        "resources_id must be a string, not int",
        lambda store: store.update_rollout("ro-1", resources_id=3),
    ),
    "more attempts than go over the wire": (
        ValueError,
        f"RolloutConfig.max_attempts is {2**32}: Input should be less than or equal to {2**32 - 1}",
        lambda store: store.enqueue_rollout("task", config=_config(max_attempts=2**32)),
    ),
    "no attempt at all": (
        ValueError,
        "RolloutConfig.max_attempts is 0: Input should be greater than or equal to 1",
        lambda store: store.start_rollout("task", config=_config(max_attempts=0)),
    ),
    "an end before the beginning": (
        ValueError,
        "RolloutConfig.timeout_seconds is -1: Input should be greater than 0",
        lambda store: store.update_rollout("ro-1", config=_config(timeout_seconds=-1)),
    ),
}


def _config(**changes: Any) -> RolloutConfig:
    """A config that was made wrong after it was checked."""
    return RolloutConfig().model_copy(update=changes)


async def test_wrong_arguments_are_named_and_change_nothing(store: LightningStore) -> None:
    for case, (kind, message, call) in BAD_CALLS.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011  # looked at below, to say which case it was
            await call(store)
        assert isinstance(caught.value, kind), f"{case}: {caught.value!r}"
        assert re.match(message, str(caught.value)), f"{case}: {caught.value!r}"
    statistics = await store.statistics()
    assert (statistics["total_workers"], statistics["total_rollouts"]) == (0, 0)


async def test_as_many_attempts_as_go_over_the_wire(store: LightningStore) -> None:
    rollout = await store.enqueue_rollout("task", config=RolloutConfig(max_attempts=2**32 - 1))
    assert rollout.config.max_attempts == 2**32 - 1
    with pytest.raises(ValueError, match=f"less than or equal to {2**32 - 1}"):
        RolloutConfig(max_attempts=2**32)


async def test_the_largest_numbers_are_as_good_as_none(store: LightningStore) -> None:
    rollouts = [await store.enqueue_rollout(number) for number in range(3)]
    assert list(await store.query_rollouts(limit=LAST, offset=1)) == rollouts[1:]
    assert list(await store.query_rollouts(status_in=["queuing"], limit=LAST, offset=1)) == rollouts[1:]
    assert list(await store.query_rollouts(offset=LAST)) == []
    assert len(await store.dequeue_many_rollouts(limit=LAST)) == 3
    assert await store.wait_for_rollouts(rollout_ids=[], timeout=10**400) == []


async def test_what_is_asked_for_may_come_from_a_generator(store: LightningStore) -> None:
    rollout: Any = await store.enqueue_rollout("task")
    words: Any = (word for word in ["queuing", "failed"])
    ids: Any = (rollout_id for rollout_id in [rollout.rollout_id])
    assert list(await store.query_rollouts(status_in=words)) == [rollout]
    assert list(await store.query_rollouts(rollout_id_in=ids)) == [rollout]
