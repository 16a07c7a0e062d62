"""Records in the memory of this process: the fastest backend, gone with the process.

Everything is reached through dictionaries and ordered indexes, so that a call costs the same with a million rollouts
stored as with a thousand. One lock, held for the moment of each primitive, makes it safe for many threads.
"""

from __future__ import annotations

import heapq
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice

from sortedcontainers import SortedDict

from lightning.codec.spans import encode_span_ids
from lightning.store import lifecycle
from lightning.store.persistence.abc import (
    ClaimTransition,
    Persistence,
    RolloutChange,
    RolloutTransition,
    Settlement,
    SpansEvictedError,
    SpanTransition,
    Totals,
    WorkerTransition,
)
from lightning.store.queries import RolloutQuery
from lightning.store.records import ResourcesRecord, RolloutRecord, SpanReceipt, SpanRecord, WorkerRecord

_SPAN_OVERHEAD_BYTES = 120
"""What a span occupies beyond its payload: its id, its place in the index and the like, as measured on CPython."""
_SEQUENCE_BYTES = 8


class _Entry:
    """A rollout and what the indexes need to know of it."""

    __slots__ = ("ordinal", "record", "scheduled", "spans")

    def __init__(self, record: RolloutRecord, ordinal: int) -> None:
        self.record = record
        self.ordinal = ordinal
        self.scheduled: float | None = None
        """The deadline under which it stands in the heap; its real one is never earlier."""
        self.spans: _Spans | None = None


class _Spans:
    """The spans of a rollout, by attempt and span id.

    A span rests as one object: its payload without the ids that all of its attempt begin with, and its sequence id
    behind it. As records they would take a fifth more, and the garbage collector would look at each of them.
    """

    __slots__ = ("by_attempt", "evicted", "rollout_id", "size_bytes")

    def __init__(self, rollout_id: str) -> None:
        self.rollout_id = rollout_id
        self.by_attempt: dict[str, dict[str, bytes]] = {}
        self.size_bytes = 0
        self.evicted: dict[str, int] = {}
        """How many spans of which attempts were dropped."""

    def put(self, attempt_id: str, spans: Iterable[SpanRecord]) -> None:
        """Keep spans, each in place of the one with its id if there is one."""
        start = encode_span_ids(self.rollout_id, attempt_id)
        kept = self.by_attempt.setdefault(attempt_id, {})
        for span in spans:
            number = span.sequence_id.to_bytes(_SEQUENCE_BYTES, "little")
            kept[span.span_id] = span.payload.removeprefix(start) + number

    def of(self, attempt_id: str) -> list[SpanRecord]:
        """Those of an attempt, in order of arrival."""
        # whoever encoded a span with its ids elsewhere has them twice now, which means the same
        start = encode_span_ids(self.rollout_id, attempt_id)
        return [
            SpanRecord(
                attempt_id,
                span_id,
                int.from_bytes(packed[-_SEQUENCE_BYTES:], "little"),
                start + packed[:-_SEQUENCE_BYTES],
            )
            for span_id, packed in self.by_attempt.get(attempt_id, {}).items()
        ]


class MemoryPersistence(Persistence):
    """Keeps records in dictionaries.

    Args:
        eviction_threshold_bytes: Above this much span memory, spans of finished rollouts are dropped, those that
            finished first going first.
        safe_threshold_bytes: How far down an eviction goes.
        capacity_bytes: The memory of which the thresholds are parts, for `totals`.
        span_bytes: What a span counts as; None: what it occupies.
    """

    name = "memory"
    durable = False
    instant = True

    def __init__(
        self,
        *,
        eviction_threshold_bytes: int,
        safe_threshold_bytes: int,
        capacity_bytes: int,
        span_bytes: Callable[[SpanRecord], int] | None = None,
    ) -> None:
        self._limits = {
            "eviction_threshold_bytes": eviction_threshold_bytes,
            "safe_threshold_bytes": safe_threshold_bytes,
            "memory_capacity_bytes": capacity_bytes,
        }
        self._eviction_threshold_bytes = eviction_threshold_bytes
        self._safe_threshold_bytes = safe_threshold_bytes
        self._bytes_of = _occupied_bytes if span_bytes is None else span_bytes
        self._lock = threading.RLock()
        self._revision = 0
        self._rollouts: dict[str, _Entry] = {}
        self._by_attempt: dict[str, _Entry] = {}
        self._by_status: dict[str, SortedDict[int, _Entry]] = {}
        self._attempts_by_status: Counter[str] = Counter()
        self._queue: OrderedDict[str, _Entry] = OrderedDict()
        self._deadlines: list[tuple[float, int, _Entry]] = []
        self._tie_breaker = count()
        self._evictable: OrderedDict[str, _Entry] = OrderedDict()
        """Finished rollouts with spans, in the order in which they finished."""
        self._span_count = 0
        self._span_bytes = 0
        self._evicted_count = 0
        self._resources: dict[str, list[ResourcesRecord]] = {}
        self._resources_log: list[ResourcesRecord] = []
        self._workers: dict[str, WorkerRecord] = {}

    # --- rollouts ---

    async def insert_rollouts(
        self, records: Sequence[RolloutRecord], settle: Settlement | None = None
    ) -> list[RolloutRecord]:
        with self._lock:
            return [self._insert(record, settle) for record in records]

    def _insert(self, record: RolloutRecord, settle: Settlement | None) -> RolloutRecord:
        known = self._rollouts.get(record.rollout_id)
        if known is not None:
            return known.record
        self._revision += 1
        record = record._replace(revision=self._revision)
        entry = _Entry(record, len(self._rollouts))
        self._rollouts[record.rollout_id] = entry
        self._index(entry, None)
        self._settle(settle, None, record)
        return record

    async def get_rollout(self, rollout_id: str) -> RolloutRecord | None:
        with self._lock:
            entry = self._rollouts.get(rollout_id)
            return None if entry is None else entry.record

    async def get_rollouts(self, rollout_ids: Sequence[str]) -> dict[str, RolloutRecord]:
        with self._lock:
            entries = ((rollout_id, self._rollouts.get(rollout_id)) for rollout_id in rollout_ids)
            return {rollout_id: entry.record for rollout_id, entry in entries if entry is not None}

    async def settled_revision(self) -> int:
        with self._lock:
            return self._revision

    async def get_rollout_of_attempt(self, attempt_id: str) -> RolloutRecord | None:
        with self._lock:
            entry = self._by_attempt.get(attempt_id)
            return None if entry is None else entry.record

    async def change_rollout(
        self, rollout_id: str, transition: RolloutTransition, settle: Settlement | None = None
    ) -> RolloutChange | None:
        with self._lock:
            entry = self._rollouts.get(rollout_id)
            return None if entry is None else self._replace(entry, transition(entry.record), settle)

    async def claim_rollouts(
        self, limit: int, transition: ClaimTransition, settle: Settlement | None = None
    ) -> list[RolloutChange]:
        with self._lock:
            heads = list(islice(self._queue.values(), limit))
            claimed = [transition(entry.record, taken) for taken, entry in enumerate(heads)]
            return [self._replace(entry, after, settle) for entry, after in zip(heads, claimed, strict=True)]

    async def find_rollouts(self, query: RolloutQuery) -> tuple[list[RolloutRecord], int]:
        page = query.page
        with self._lock:
            by_status_only = query.rollout_id_in is None and query.rollout_id_contains is None
            if page.sort_by is None and by_status_only:
                return self._page_by_status(query)
            matches = (entry for entry in self._candidates(query) if query.match(entry.record))
            if page.sort_by is None:
                entries = sorted(matches, key=lambda entry: entry.ordinal, reverse=page.descending)
                records = [entry.record for entry in entries]
            else:
                ordered = sorted(matches, key=lambda entry: entry.ordinal)
                records = page.order(entry.record for entry in ordered)
            return page.cut(records), len(records)

    def _page_by_status(self, query: RolloutQuery) -> tuple[list[RolloutRecord], int]:
        """The common query, at a cost that depends on the page alone."""
        page = query.page
        entries: Iterable[_Entry]
        if query.status_in is None:
            total = len(self._rollouts)
            entries = reversed(self._rollouts.values()) if page.descending else self._rollouts.values()
        else:
            indexes = [self._by_status[status] for status in query.status_in if self._by_status.get(status)]
            total = sum(map(len, indexes))
            ordinals = heapq.merge(
                *((reversed(index) if page.descending else iter(index)) for index in indexes),
                reverse=page.descending,
            )
            # every ordinal is in exactly one of the indexes
            entries = (next(index[o] for index in indexes if o in index) for o in ordinals)
        stop = None if page.limit < 0 else min(page.offset + page.limit, sys.maxsize)
        return [entry.record for entry in islice(entries, page.offset, stop)], total

    def _candidates(self, query: RolloutQuery) -> Iterator[_Entry]:
        """A superset of the matches, as small as the indexes allow."""
        if query.rollout_id_in is not None and not query.any_suffices:
            found = (self._rollouts.get(rollout_id) for rollout_id in dict.fromkeys(query.rollout_id_in))
            return (entry for entry in found if entry is not None)
        if query.status_in is not None and not query.any_suffices:
            return (entry for status in query.status_in for entry in self._by_status.get(status, {}).values())
        return iter(self._rollouts.values())

    async def queue_order(self) -> list[str]:
        with self._lock:
            return list(self._queue)

    async def due_rollouts(self, now: float, limit: int) -> list[str]:
        due: list[_Entry] = []
        with self._lock:
            while self._deadlines and self._deadlines[0][0] < now and len(due) < limit:
                scheduled, _, entry = heapq.heappop(self._deadlines)
                if entry.scheduled != scheduled:
                    continue  # it was scheduled anew for an earlier time, and has been seen to since
                entry.scheduled = None
                deadline = lifecycle.next_deadline(entry.record)
                if deadline == scheduled:
                    due.append(entry)
                else:
                    self._schedule(entry, deadline)  # if that is due as well, its turn comes
            for entry in due:  # still due until somebody has changed them
                self._schedule(entry, lifecycle.next_deadline(entry.record))
            return [entry.record.rollout_id for entry in due]

    async def first_deadline(self) -> float | None:
        with self._lock:
            return self._deadlines[0][0] if self._deadlines else None

    def _schedule(self, entry: _Entry, deadline: float | None) -> None:
        """Heartbeats move deadlines back all the time; the heap learns of that only when the old one has come."""
        if deadline is not None and (entry.scheduled is None or deadline < entry.scheduled):
            entry.scheduled = deadline
            heapq.heappush(self._deadlines, (deadline, next(self._tie_breaker), entry))

    def _replace(self, entry: _Entry, after: RolloutRecord, settle: Settlement | None) -> RolloutChange:
        before = entry.record
        if after is not before:
            self._revision += 1
            entry.record = after = after._replace(revision=self._revision)
            self._index(entry, before)
            self._settle(settle, before, after)
        return RolloutChange(before, after)

    def _settle(self, settle: Settlement | None, before: RolloutRecord | None, after: RolloutRecord) -> None:
        for worker_id, transition in () if settle is None else settle(before, after):
            self._change_worker(worker_id, transition)

    def _index(self, entry: _Entry, before: RolloutRecord | None) -> None:
        after = entry.record
        if before is None or before.status != after.status:
            if before is not None:
                del self._by_status[before.status][entry.ordinal]
            self._by_status.setdefault(after.status, SortedDict())[entry.ordinal] = entry
            queued = lifecycle.is_queued(after)
            if queued and after.rollout_id not in self._queue:
                self._queue[after.rollout_id] = entry
            elif not queued:
                self._queue.pop(after.rollout_id, None)
            self._note_evictable(entry)
        for attempt in after.attempts[len(before.attempts) if before else 0 :]:
            self._by_attempt[attempt.attempt_id] = entry
            self._attempts_by_status[attempt.status] += 1
        for old, new in zip(before.attempts if before else (), after.attempts, strict=False):
            if old.status != new.status:
                self._attempts_by_status[old.status] -= 1
                self._attempts_by_status[new.status] += 1
        self._schedule(entry, lifecycle.next_deadline(after))

    # --- spans ---

    async def append_spans(
        self,
        rollout_id: str,
        attempt_id: str,
        spans: Sequence[SpanRecord],
        transition: SpanTransition,
        settle: Settlement | None = None,
    ) -> tuple[RolloutChange, list[SpanReceipt]] | None:
        with self._lock:
            entry = self._rollouts.get(rollout_id)
            if entry is None:
                return None
            known = {} if entry.spans is None else entry.spans.by_attempt.get(attempt_id, {})
            fresh: dict[str, SpanRecord] = {}
            for span in spans:
                if span.span_id not in known and span.span_id not in fresh:
                    fresh[span.span_id] = span
            after, sequence_ids = transition(entry.record, list(fresh.values()))
            for span, sequence_id in zip(list(fresh.values()), sequence_ids, strict=True):
                numbered = span if span.sequence_id == sequence_id else span._replace(sequence_id=sequence_id)
                fresh[span.span_id] = numbered
            self._keep(entry, attempt_id, fresh)
            change = self._replace(entry, after, settle)
            receipts = []
            for span in spans:
                stored = fresh.pop(span.span_id, None)
                receipts.append(SpanReceipt(stored.sequence_id if stored else 0, stored is not None))
            self._evict()
            return change, receipts

    def _keep(self, entry: _Entry, attempt_id: str, spans: dict[str, SpanRecord]) -> None:
        if not spans:
            return
        size = sum(map(self._bytes_of, spans.values()))  # first, since it may be the user's code, and fail
        if entry.spans is None:
            entry.spans = _Spans(entry.record.rollout_id)
        entry.spans.put(attempt_id, spans.values())
        entry.spans.size_bytes += size
        self._span_bytes += size
        self._span_count += len(spans)
        self._note_evictable(entry)

    async def find_spans(self, rollout_id: str, attempt_ids: Sequence[str]) -> list[SpanRecord]:
        with self._lock:
            entry = self._rollouts.get(rollout_id)
            spans = None if entry is None else entry.spans
            if spans is None:
                return []
            evicted = sum(spans.evicted.get(attempt_id, 0) for attempt_id in attempt_ids)
            if evicted:
                raise SpansEvictedError(
                    f"{evicted} spans of rollout {rollout_id!r} were evicted to keep span memory under "
                    f"{self._eviction_threshold_bytes} bytes; to keep more, raise "
                    "eviction_memory_threshold, read spans soon after a rollout ends, or use a durable backend"
                )
            found: list[SpanRecord] = []
            for attempt_id in attempt_ids:
                found.extend(sorted(spans.of(attempt_id), key=lambda span: span.sequence_id))
            return found

    def _note_evictable(self, entry: _Entry) -> None:
        rollout_id = entry.record.rollout_id
        if entry.spans is not None and entry.spans.by_attempt and lifecycle.is_finished(entry.record):
            self._evictable.setdefault(rollout_id, entry)
        else:
            self._evictable.pop(rollout_id, None)

    def _evict(self) -> None:
        if self._span_bytes <= self._eviction_threshold_bytes:
            return
        while self._evictable and self._span_bytes > self._safe_threshold_bytes:
            _, entry = self._evictable.popitem(last=False)
            spans = entry.spans
            if spans is None:
                continue
            for attempt_id, dropped in spans.by_attempt.items():
                spans.evicted[attempt_id] = spans.evicted.get(attempt_id, 0) + len(dropped)
                self._evicted_count += len(dropped)
                self._span_count -= len(dropped)
            self._span_bytes -= spans.size_bytes
            spans.by_attempt.clear()
            spans.size_bytes = 0

    # --- resources ---

    async def insert_resources(self, record: ResourcesRecord) -> bool:
        with self._lock:
            versions = self._resources.setdefault(record.resources_id, [])
            if record.version != len(versions) + 1:
                return False
            versions.append(record)
            self._resources_log.append(record)
            return True

    async def get_resources(self, resources_id: str, version: int | None) -> ResourcesRecord | None:
        with self._lock:
            versions = self._resources.get(resources_id)
            if not versions:
                return None
            if version is None:
                return versions[-1]
            return versions[version - 1] if 1 <= version <= len(versions) else None

    async def get_latest_resources(self) -> ResourcesRecord | None:
        with self._lock:
            return self._resources_log[-1] if self._resources_log else None

    async def find_resources(self) -> list[ResourcesRecord]:
        with self._lock:
            return list(self._resources_log)

    # --- workers ---

    async def change_worker(self, worker_id: str, transition: WorkerTransition) -> WorkerRecord:
        with self._lock:
            return self._change_worker(worker_id, transition)

    def _change_worker(self, worker_id: str, transition: WorkerTransition) -> WorkerRecord:
        before = self._workers.get(worker_id) or WorkerRecord(worker_id)
        self._workers[worker_id] = after = transition(before)
        return after

    async def get_worker(self, worker_id: str) -> WorkerRecord | None:
        with self._lock:
            return self._workers.get(worker_id)

    async def find_workers(self) -> list[WorkerRecord]:
        with self._lock:
            return list(self._workers.values())

    # --- about itself ---

    async def totals(self) -> Totals:
        with self._lock:
            head = next(iter(self._queue.values()), None)
            return Totals(
                rollouts_by_status={status: len(index) for status, index in self._by_status.items() if index},
                attempts=len(self._by_attempt),
                spans=self._span_count,
                resources=len(self._resources_log),
                workers=len(self._workers),
                span_bytes=self._span_bytes,
                evicted_spans=self._evicted_count,
                attempts_by_status={name: n for name, n in self._attempts_by_status.items() if n},
                queued_since=None if head is None else lifecycle.queued_since(head.record),
                limits=dict(self._limits),
            )


def _occupied_bytes(span: SpanRecord) -> int:
    return len(span.payload) + _SPAN_OVERHEAD_BYTES
