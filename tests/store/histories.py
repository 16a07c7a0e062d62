"""Histories: what hypothesis does to a backend, and to that in memory, which is plain Python and its own specification.

Both must have the same results, errors and traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

from hypothesis import strategies as st

from lightning.codec.spans import encode_span_ids
from lightning.store import lifecycle
from lightning.store.idempotency import mark_applied
from lightning.store.persistence.abc import Persistence
from lightning.store.persistence.memory import MemoryPersistence
from lightning.store.queries import ROLLOUT_SORT_FIELDS, Page, RolloutQuery
from lightning.store.records import (
    ConfigRecord,
    Lease,
    ResourcesRecord,
    RolloutRecord,
    SpanRecord,
    WorkerRecord,
)

# Few different ones of each, so that operations meet; strange ones among them, for they are anybody's to choose.
ROLLOUT_IDS = st.sampled_from(["ro-1", "ro-2", "RO-1%", "ro_é😀\0x"])
UNKNOWN_IDS = st.sampled_from(["", "ro-", "none", "ro-\ud800", "at-1-0"])
SPAN_IDS = st.sampled_from(["s1", "S1", "", "é\0"])
WORKER_IDS = st.sampled_from(["w1", "w2", "wörker\0"])
RESOURCES_IDS = st.sampled_from(["rs-1", "rs-2", "ü"])
TIMES = st.sampled_from([0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 10.0, 1e9 + 1 / 3])
PAYLOADS = st.sampled_from([b"null", b"1", b"1.0", b'{"a":[]}', b'"\xc3\xa9"', b"[" + b"0," * 9000 + b"0]"])
METADATA = st.none() | st.sampled_from([b"{}", b'{"$a.b":null}'])
TEXTS = st.none() | st.sampled_from(["", "x", "é\0"])
CONFIGS = st.builds(
    ConfigRecord,
    timeout_seconds=st.sampled_from([None, 1.0, 2.0]),
    unresponsive_seconds=st.sampled_from([None, 1.0]),
    max_attempts=st.integers(1, 3),
    retry_condition=st.sampled_from([(), ("failed",), ("failed", "timeout", "unresponsive")]),
)
ROLLOUT_STATUSES = st.sampled_from(
    ["queuing", "preparing", "running", "succeeded", "failed", "requeuing", "cancelled"]
)
ATTEMPT_STATUSES = st.sampled_from(["running", "succeeded", "failed", "timeout", "unresponsive"])
COUNTS = st.integers(0, 3)


class Operation:
    """Something that can be done to a backend; `number` is its place in the history."""

    async def run(self, backend: Persistence, number: int) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Insert(Operation):
    records: Sequence[RolloutRecord]
    started: bool

    async def run(self, backend: Persistence, number: int) -> Any:
        records = self.records
        if self.started:
            records = [
                lifecycle.begin_attempt(record, f"at-{number}-{index}", "w1", None, record.start_time)
                for index, record in enumerate(records)
            ]
        return await backend.insert_rollouts(records, partial(lifecycle.settle, now=1.0))


@dataclass(frozen=True)
class Claim(Operation):
    limit: int
    fail_at: int | None
    now: float

    async def run(self, backend: Persistence, number: int) -> Any:
        def begin(record: RolloutRecord, taken: int) -> RolloutRecord:
            if taken == self.fail_at:
                raise ValueError(f"refused {record.rollout_id} as number {taken}")
            return lifecycle.begin_attempt(record, f"at-{number}-{taken}", "w1", "i1", self.now)

        return await backend.claim_rollouts(self.limit, begin, partial(lifecycle.settle, now=self.now))


@dataclass(frozen=True)
class Begin(Operation):
    rollout_id: str
    now: float

    async def run(self, backend: Persistence, number: int) -> Any:
        return await backend.change_rollout(
            self.rollout_id,
            lambda record: lifecycle.begin_attempt(record, f"at-{number}-0", None, None, self.now),
        )


@dataclass(frozen=True)
class Update(Operation):
    rollout_id: str
    changes: dict[str, Any]
    now: float

    async def run(self, backend: Persistence, number: int) -> Any:
        return await backend.change_rollout(
            self.rollout_id,
            lambda record: mark_applied(
                lifecycle.update_rollout(record, self.changes, self.now), f"{number:x}", number
            ),
        )


@dataclass(frozen=True)
class UpdateAttempt(Operation):
    rollout_id: str
    changes: dict[str, Any]
    now: float

    async def run(self, backend: Persistence, number: int) -> Any:
        return await backend.change_rollout(
            self.rollout_id,
            lambda record: lifecycle.update_attempt(record, "latest", self.changes, self.now),
            partial(lifecycle.settle, now=self.now),
        )


@dataclass(frozen=True)
class Allocate(Operation):
    rollout_id: str
    count: int

    async def run(self, backend: Persistence, number: int) -> Any:
        return await backend.change_rollout(
            self.rollout_id,
            lambda record: lifecycle.allocate_span_sequence_ids(record, "latest", self.count),
        )


@dataclass(frozen=True)
class LeaveAlone(Operation):
    rollout_id: str

    async def run(self, backend: Persistence, number: int) -> Any:
        return await backend.change_rollout(self.rollout_id, lambda record: record)


@dataclass(frozen=True)
class Expire(Operation):
    now: float
    limit: int

    async def run(self, backend: Persistence, number: int) -> Any:
        everything, due = await backend.due_rollouts(self.now, 1000), []
        for rollout_id in await backend.due_rollouts(self.now, self.limit):
            record = await backend.get_rollout(rollout_id)
            assert record is not None
            due.append(lifecycle.next_deadline(record))  # whose turn it is, of two at a time, is not agreed
        for rollout_id in sorted(everything):
            await backend.change_rollout(
                rollout_id,
                lambda record: lifecycle.expire(record, self.now),
                partial(lifecycle.settle, now=self.now),
            )
        return sorted(everything), due


@dataclass(frozen=True)
class Append(Operation):
    rollout_id: str
    spans: Sequence[tuple[str, int, bytes]]
    earlier: bool
    fail: bool
    now: float

    async def run(self, backend: Persistence, number: int) -> Any:
        record = await backend.get_rollout(self.rollout_id)
        attempts = () if record is None else record.attempts
        attempt_id = attempts[0 if self.earlier else -1].attempt_id if attempts else "at-none"

        def receive(record: RolloutRecord, fresh: Sequence[SpanRecord]) -> tuple[RolloutRecord, list[int]]:
            if self.fail:
                raise ValueError(f"refused {fresh}")
            return lifecycle.receive_spans(record, attempt_id, fresh, self.now)

        ids = encode_span_ids(self.rollout_id, attempt_id)  # with which every span's encoding begins
        spans = [
            SpanRecord(attempt_id, span_id, number, ids + payload) for span_id, number, payload in self.spans
        ]
        return await backend.append_spans(
            self.rollout_id, attempt_id, spans, receive, partial(lifecycle.settle, now=self.now)
        )


@dataclass(frozen=True)
class Publish(Operation):
    record: ResourcesRecord

    async def run(self, backend: Persistence, number: int) -> Any:
        return await backend.insert_resources(self.record)


@dataclass(frozen=True)
class ChangeWorker(Operation):
    worker_id: str
    changes: dict[str, Any]
    fail: bool

    async def run(self, backend: Persistence, number: int) -> Any:
        def change(worker: WorkerRecord) -> WorkerRecord:
            if self.fail:
                raise ValueError(f"refused {worker}")
            return worker._replace(**self.changes) if self.changes else worker

        return await backend.change_worker(self.worker_id, change)


@dataclass(frozen=True)
class LookUp(Operation):
    rollout_id: str
    resources_id: str
    version: int | None
    worker_id: str

    async def run(self, backend: Persistence, number: int) -> Any:
        record = await backend.get_rollout(self.rollout_id)
        attempt_ids = [attempt.attempt_id for attempt in record.attempts] if record else ["at-none", "\ud800"]
        return [
            record,
            await backend.get_rollouts([self.rollout_id, "none", "ro-1", "ro-1"]),
            [await backend.get_rollout_of_attempt(attempt_id) for attempt_id in attempt_ids],
            await backend.find_spans(self.rollout_id, attempt_ids[::-1]),
            await backend.get_resources(self.resources_id, self.version),
            await backend.get_worker(self.worker_id),
        ]


@dataclass(frozen=True)
class Find(Operation):
    query: RolloutQuery

    async def run(self, backend: Persistence, number: int) -> Any:
        return await backend.find_rollouts(self.query)


ANY_ID = ROLLOUT_IDS | UNKNOWN_IDS
RECORDS = st.builds(
    RolloutRecord,
    rollout_id=ROLLOUT_IDS,
    input=PAYLOADS,
    status=st.just("queuing"),
    start_time=TIMES,
    config=CONFIGS,
    mode=st.sampled_from([None, "train", "val"]),
    resources_id=TEXTS,
    metadata=METADATA,
    end_time=st.none(),  # what is left out of a tuple, hypothesis makes up
    attempts=st.just(()),
    applied=st.just(()),
    revision=st.just(0),
)
QUERIES = st.builds(
    RolloutQuery,
    status_in=st.none() | st.frozensets(ROLLOUT_STATUSES, max_size=3),
    rollout_id_in=st.none() | st.lists(ANY_ID, max_size=4).map(tuple),
    rollout_id_contains=st.none()
    | st.sampled_from(["", "1", "RO", "%", "_", "\0", "é", "\ud800", "nothing"]),
    any_suffices=st.booleans(),
    page=st.builds(
        Page,
        sort_by=st.none() | st.sampled_from(ROLLOUT_SORT_FIELDS),
        descending=st.booleans(),
        limit=st.sampled_from([-1, 0, 1, 2, 2**40]),
        offset=st.sampled_from([0, 1, 3, 2**40]),
    ),
)
OPERATIONS = st.one_of(
    st.builds(Insert, st.lists(RECORDS, max_size=4), st.booleans()),
    st.builds(Claim, COUNTS | st.just(2**40), st.none() | st.none() | COUNTS, TIMES),
    st.builds(Begin, ANY_ID, TIMES),
    st.builds(
        Update,
        ANY_ID,
        st.fixed_dictionaries(
            {},
            optional={
                "status": ROLLOUT_STATUSES,
                "input": PAYLOADS,
                "metadata": METADATA,
                "mode": st.sampled_from([None, "test"]),
                "resources_id": TEXTS,
                "config": CONFIGS,
            },
        ),
        TIMES,
    ),
    st.builds(
        UpdateAttempt,
        ROLLOUT_IDS,
        st.fixed_dictionaries(
            {},
            optional={
                "status": ATTEMPT_STATUSES,
                "worker_id": st.none() | WORKER_IDS,
                "last_heartbeat_time": st.none() | TIMES,
                "metadata": METADATA,
            },
        ),
        TIMES,
    ),
    st.builds(Allocate, ROLLOUT_IDS, st.integers(1, 5)),
    st.builds(LeaveAlone, ANY_ID),
    st.builds(Expire, TIMES, st.integers(1, 3)),
    st.builds(
        Append,
        ANY_ID,
        st.lists(st.tuples(SPAN_IDS, st.sampled_from([0, 0, 1, 7, 2**40]), PAYLOADS), max_size=6),
        st.booleans(),
        st.sampled_from([False, False, False, True]),
        TIMES,
    ),
    st.builds(
        Publish,
        st.builds(
            ResourcesRecord,
            resources_id=RESOURCES_IDS,
            version=st.integers(1, 3),
            create_time=TIMES,
            update_time=TIMES,
            resources=st.lists(st.tuples(st.sampled_from(["a", "é\0", ""]), PAYLOADS), max_size=3).map(tuple),
            request_digest=TEXTS,
        ),
    ),
    st.builds(
        ChangeWorker,
        WORKER_IDS,
        st.fixed_dictionaries(
            {},
            optional={
                "heartbeat_stats": METADATA,
                "last_heartbeat_time": st.none() | TIMES,
                "last_idle_time": st.none() | TIMES,
                "silent_after_seconds": st.none() | TIMES,
                "leases": st.lists(
                    st.builds(Lease, ANY_TEXT := st.sampled_from(["", "é\0"]), ANY_TEXT, TEXTS)
                ).map(tuple),
            },
        ),
        st.sampled_from([False, False, False, True]),
    ),
    st.builds(LookUp, ANY_ID, RESOURCES_IDS, st.sampled_from([None, 0, 1, 2, 9, 2**70]), WORKER_IDS),
    st.builds(Find, QUERIES),
)
FIRST = Insert(
    [
        RolloutRecord(f"ro-{index}", b"1", "queuing", 0.0, ConfigRecord(1.0, 1.0, 2, ("failed",)))
        for index in (1, 2)
    ],
    started=False,
)
HISTORIES = st.lists(OPERATIONS, max_size=40).map(lambda operations: [FIRST, *operations])


async def everything(backend: Persistence) -> dict[str, Any]:
    """All that a backend can tell."""
    everyone = RolloutQuery(None, None, None, False, Page(None, False, -1, 0))
    records, total = await backend.find_rollouts(everyone)
    totals = await backend.totals()
    queue: list[str] = []

    def note(record: RolloutRecord, taken: int) -> RolloutRecord:
        if taken == 0:
            queue.clear()  # a transition may be called more than once
        queue.append(record.rollout_id)
        return record

    await backend.claim_rollouts(1000, note)
    return {
        "rollouts": records,
        "total": total,
        "queue": queue,
        "spans": [
            await backend.find_spans(record.rollout_id, [attempt.attempt_id for attempt in record.attempts])
            for record in records
        ],
        "resources": await backend.find_resources(),
        "latest": await backend.get_latest_resources(),
        "workers": await backend.find_workers(),
        "totals": replace(totals, span_bytes=0, limits={}),
    }


async def outcome(operation: Operation, backend: Persistence, number: int) -> Any:
    try:
        return await operation.run(backend, number)
    except ValueError as error:
        return repr(error)


def plain(value: Any) -> Any:
    """`value` less the revisions in it, which are a backend's own."""
    if isinstance(value, RolloutRecord):
        return value._replace(revision=0)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


async def compare(history: Sequence[Operation], backend: Persistence) -> dict[str, Any]:
    """Do the same to both, and compare; returns what there is in the end."""
    model = MemoryPersistence(
        eviction_threshold_bytes=2**40, safe_threshold_bytes=2**40, capacity_bytes=2**40
    )
    for number, operation in enumerate(history):
        expected = await outcome(operation, model, number)
        assert plain(await outcome(operation, backend, number)) == plain(expected), operation
    expected = await everything(model)
    assert plain(await everything(backend)) == plain(expected)
    await check_deadline(backend, expected["rollouts"])
    return expected


async def check_deadline(backend: Persistence, records: Sequence[RolloutRecord]) -> None:
    """That of memory may be earlier than need be; this one need not."""
    deadlines = [deadline for record in records if (deadline := lifecycle.next_deadline(record)) is not None]
    assert await backend.first_deadline() == min(deadlines, default=None)
