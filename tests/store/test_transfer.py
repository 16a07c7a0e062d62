"""What is exported from one backend and imported into another is exported from that as it was."""

from __future__ import annotations

import json
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning.store import InMemoryLightningStore, SQLiteLightningStore
from lightning.store.engine import StoreEngine
from lightning.store.idempotency import request
from lightning.store.persistence.abc import SpansEvictedError
from lightning.store.transfer import ImportRefusedError, export_lines, import_lines
from lightning.testing import FakeClock
from lightning.types import PromptTemplate, RolloutConfig, Span, WorkerHeartbeat

pytestmark = pytest.mark.anyio

STRANGE = {"é\0": [1, 1.0, 2**70, -0.0, 1e300, None, True, {}, [], "\u2028\n"], "$a.b": {"": "😀"}}
BACKENDS = ("memory", "sqlite", "sqlite in memory")


@asynccontextmanager
async def opened(backend: str, folder: Path, clock: FakeClock | None = None) -> AsyncIterator[StoreEngine]:
    stores = {
        "memory": lambda: InMemoryLightningStore(clock=clock),
        "sqlite": lambda: SQLiteLightningStore(folder.with_suffix(".db"), clock=clock, durability="normal"),
        "sqlite in memory": lambda: SQLiteLightningStore(":memory:", clock=clock),
    }
    store = stores[backend]()
    await store.statistics()  # opens it
    yield store
    await store.close()


async def exported(store: StoreEngine) -> list[bytes]:
    return [line async for line in export_lines(store.persistence)]


def span(rollout_id: str, attempt_id: str, number: int) -> Span:
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=0,
        trace_id="1".rjust(32, "0"),
        span_id=f"{number:016x}",
        name=f"step {number}",
        start_time=1.5,
        attributes={"nan": math.nan, "infinite": -math.inf, "big": 2**62, "list": [1.5, 2.0], "text": "é\0"},
        more={"of": "it"},
    )


async def live(store: StoreEngine, clock: FakeClock, seed: int) -> None:
    """Have a store go through a bit of everything."""
    dice = random.Random(seed)
    config = RolloutConfig(
        max_attempts=3,
        retry_condition=["failed", "unresponsive"],
        unresponsive_seconds=50,
        timeout_seconds=500,
    )
    resources_id = ""
    open_attempts: list[tuple[str, str]] = []
    for number in range(300):
        clock.advance(dice.random())
        choice = dice.randrange(9)
        if choice == 0:
            prompt = PromptTemplate(template=f"{number}", engine="f-string")
            if resources_id and dice.random() < 0.5:
                await store.update_resources(resources_id, {"b": prompt, "a": prompt})
            else:
                with request(f"request {number}"):
                    resources_id = (await store.add_resources({"b": prompt, "a": prompt})).resources_id
        elif choice <= 3:
            await store.enqueue_rollout(
                dice.choice([STRANGE, None, number]), "val", None, config, {"n": number}
            )
        elif choice <= 5:
            claimed = await store.dequeue_many_rollouts(limit=2, worker_id=f"w-{dice.randrange(3)}")
            open_attempts.extend((rollout.rollout_id, rollout.attempt.attempt_id) for rollout in claimed)
        elif choice == 6 and open_attempts:
            key = dice.choice(open_attempts)
            with request(f"request {number}"):
                await store.get_next_span_sequence_id(*key)
            await store.add_many_spans([span(*key, 100 * number + k) for k in range(dice.randrange(4))])
        elif choice == 7 and open_attempts:
            key = open_attempts.pop(dice.randrange(len(open_attempts)))
            await store.update_attempt(*key, status=dice.choice(["failed", "succeeded"]), metadata=STRANGE)
        elif choice == 8:
            heartbeat = WorkerHeartbeat(
                worker_id="w-1", instance_id="i-1", heartbeat_stats=STRANGE, silent_after_seconds=9
            )
            await store.send_heartbeat(heartbeat)
    with request("the last one"):
        rollout = await store.start_rollout("task", worker_id="w-2")
        await store.update_rollout(rollout.rollout_id, metadata=STRANGE)


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("source", BACKENDS)
async def test_there_and_back(source: str, target: str, tmp_path: Path) -> None:
    clock = FakeClock()
    async with opened(source, tmp_path / "one", clock) as one:
        await live(one, clock, BACKENDS.index(source))
        lines = await exported(one)
    kinds = [json.loads(line)["kind"] for line in lines]
    assert min(kinds.count(kind) for kind in ("rollout", "span", "resources", "worker")) > 2
    places = [line["queue_place"] for line in map(json.loads, lines) if line["kind"] == "rollout"]
    queue = [place for place in places if place is not None]
    assert sorted(queue) == list(range(len(queue))) != queue, "some were queued again"
    async with opened(target, tmp_path / "two", clock) as two:
        assert await import_lines(lines, two.persistence) == len(lines) - 2
        assert await exported(two) == lines
        clock.advance(1000)
        second = await live_on(two, clock)
    async with opened(source, tmp_path / "three", clock) as three:
        await import_lines(lines, three.persistence)
        assert await live_on(three, clock) == second


async def live_on(store: StoreEngine, clock: FakeClock) -> list[Any]:
    """What a store does that has been imported: nothing may depend on where it was."""
    with request("the last one"):
        repeated = await store.start_rollout("task", worker_id="w-2")
    statistics: dict[str, Any] = {**await store.statistics()}
    for name in ("name", "uptime", "total_span_bytes", "eviction_threshold_bytes"):
        statistics.pop(name, None)
    claimed = await store.dequeue_many_rollouts(limit=1000)
    latest = await store.get_latest_resources()
    number = await store.get_next_span_sequence_id(repeated.rollout_id, repeated.attempt.attempt_id)
    counts = {
        name: value for name, value in statistics.items() if isinstance(value, int) and "_bytes" not in name
    }
    return [repeated.rollout_id, counts, [rollout.rollout_id for rollout in claimed], latest, number]


def lines_of(*records: dict[str, Any]) -> list[bytes]:
    header = {"kind": "header", "format": "agent-lightning-store", "version": 1}
    end = {"kind": "end", "lines": len(records) + 1}
    return [json.dumps(line).encode() + b"\n" for line in (header, *records, end)]


ATTEMPT = {
    "attempt_id": "at-1",
    "sequence_id": 1,
    "status": "failed",
    "start_time": 1.0,
    "end_time": 2.0,
    "worker_id": None,
    "instance_id": None,
    "last_heartbeat_time": None,
    "metadata": None,
    "last_span_sequence_id": 7,
}
ROLLOUT = {
    "kind": "rollout",
    "rollout_id": "ro-1",
    "input": 1,
    "status": "requeuing",
    "start_time": 1.0,
    "end_time": None,
    "mode": None,
    "resources_id": None,
    "config": {},
    "metadata": None,
    "queue_place": 0,
    "applied": [["digest", 0]],
    "attempts": [ATTEMPT],
}
SPAN = {"kind": "span", "attempt_id": "at-1", "sequence_id": 1, "span": {"span_id": "s-1"}}
RESOURCES = {
    "kind": "resources",
    "resources_id": "rs-1",
    "version": 1,
    "create_time": 1.0,
    "update_time": 1.0,
    "request_digest": None,
    "resources": {"prompt": {"resource_type": "x"}},
}
OTHER = {**ROLLOUT, "rollout_id": "ro-2", "attempts": []}
GOOD = lines_of(RESOURCES, ROLLOUT, SPAN)


async def test_a_small_export() -> None:
    target = InMemoryLightningStore()
    assert await import_lines(GOOD, target.persistence) == 3
    with pytest.raises(ImportRefusedError, match="not empty"):
        await import_lines(GOOD, target.persistence)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the end is missing after line 0"),
        (GOOD[:-1], "the end is missing after line 4: this is not a whole export"),
        (GOOD[1:], "line 1: the header must be the first line"),
        ([*GOOD, GOOD[1]], "line 6: something follows the end"),
        ([*GOOD[:3], *GOOD[4:]], "line 4: the end speaks of 4 lines before it"),
        ([GOOD[0], *GOOD], "line 2: the header must be the first line"),
        ([GOOD[0].replace(b"1", b"2")], "line 1: this is version 2 of the format, known here is 1"),
        ([b"SQLite format 3\0\n"], "line 1: the line is not valid JSON"),
        ([b"\xff\n"], "line 1: the line is not valid JSON"),
        ([b"[]\n"], "line 1: the line: "),
        (lines_of({"kind": "nonsense"}), "line 2: the line: "),
        (lines_of({**ROLLOUT, "status": "done"}), "line 2: rollout.status: "),
        (lines_of({**ROLLOUT, "more": 1}), "line 2: rollout.more: "),
        (lines_of({**ROLLOUT, "config": {"max_attempts": 0}}), "line 2: rollout.config.max_attempts: "),
        (
            lines_of({**ROLLOUT, "attempts": [{**ATTEMPT, "start_time": "1"}]}),
            "line 2: rollout.attempts.0.start_time",
        ),
        (
            lines_of({**ROLLOUT, "attempts": [{**ATTEMPT, "sequence_id": 2}]}),
            "line 2: attempt 'at-1' is number 1",
        ),
        (
            lines_of({**ROLLOUT, "queue_place": None}),
            "line 2: queue_place None does not go with the status 'requeuing'",
        ),
        (
            lines_of({**ROLLOUT, "status": "running"}),
            "line 2: queue_place 0 does not go with the status 'running'",
        ),
        (lines_of(ROLLOUT, OTHER), "line 3: queue_place 0 is taken"),
        (lines_of({**ROLLOUT, "queue_place": 1}), "line 3: nobody has place 0 in the queue"),
        (lines_of(ROLLOUT, ROLLOUT), "line 3: rollout 'ro-1' is there twice"),
        (
            lines_of(ROLLOUT, {**OTHER, "queue_place": 1, "attempts": [ATTEMPT]}),
            "line 3: attempt 'at-1' is there twice",
        ),
        (lines_of(SPAN), "line 2: no rollout with the attempt 'at-1' is before it"),
        (lines_of(ROLLOUT, {**SPAN, "attempt_id": "latest"}), "line 3: no rollout with the attempt 'latest'"),
        (lines_of(ROLLOUT, {**SPAN, "span": {"nonsense": 1}}), "line 3: span: "),
        (lines_of(ROLLOUT, SPAN, SPAN), "span 's-1' of attempt 'at-1' is there twice"),
        (lines_of({**RESOURCES, "version": 2}), "line 2: version 2 of resources 'rs-1' is out of order"),
    ],
)
async def test_what_is_no_whole_export(lines: list[bytes], said: str) -> None:
    with pytest.raises(ImportRefusedError, match=said):
        await import_lines(lines, InMemoryLightningStore().persistence)


async def test_evicted_spans_are_not_left_out_in_silence() -> None:
    store = InMemoryLightningStore(eviction_memory_threshold=10_000, safe_memory_threshold=5_000)
    for _ in range(20):
        rollout = await store.start_rollout("task")
        key = rollout.rollout_id, rollout.attempt.attempt_id
        await store.add_many_spans([span(*key, k) for k in range(5)])
        await store.update_attempt(*key, status="succeeded")
    assert (await store.statistics())["evicted_spans"]
    with pytest.raises(SpansEvictedError):
        await exported(store)
    await store.close()
