"""The verbs of the contract, written once, over any `Persistence`.

A verb checks its arguments, asks the lifecycle what should happen, has the persistence make it true, and tells
whoever waits. It keeps no state of its own beside the watchdog's next deadline.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.store import lifecycle
from lightning.store.broker import BrokerClosed, EventBroker
from lightning.store.clock import Clock, SystemClock
from lightning.store.contract import FilterLogic, LightningStore, SortOrder
from lightning.store.mailbox import WorkerMailboxes
from lightning.store.persistence.abc import Persistence, RolloutChange
from lightning.store.queries import (
    ATTEMPT_SORT_FIELDS,
    RESOURCES_SORT_FIELDS,
    ROLLOUT_SORT_FIELDS,
    SPAN_SORT_FIELDS,
    WORKER_SORT_FIELDS,
    Filters,
    Page,
    RolloutQuery,
    check_members,
    check_wait,
    field_conditions,
)
from lightning.store.records import (
    ConfigRecord,
    ResourcesRecord,
    RolloutRecord,
    SpanRecord,
    WorkerRecord,
    encode_metadata,
    encode_resources,
)
from lightning.store.watchdog import Watchdog
from lightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    CancelAttempt,
    EnqueueRolloutRequest,
    HeartbeatReply,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    NamedResources,
    PaginatedResult,
    ResourcesChanged,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    Unset,
    Worker,
    WorkerCommand,
    WorkerHeartbeat,
    WorkerStatus,
    encode_payload,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T = TypeVar("T")

ROLLOUT_STATUSES = ("queuing", "preparing", "running", "succeeded", "failed", "requeuing", "cancelled")
ATTEMPT_STATUSES = ("preparing", "running", "succeeded", "failed", "timeout", "unresponsive", "cancelled")
MODES = ("train", "val", "test")
WORKER_STATUSES = ("idle", "busy", "unknown")

_QUEUE = "queue"
_EXPIRE_BATCH = 256


class StoreEngine(LightningStore):
    """A store over a backend.

    Args:
        persistence: Where records rest.
        clock: Tells the time; tests pass one that they move by hand.
        validate_resources: Whether an explicit `resources_id` must exist when a rollout is created. False is for code
            that relies on being able to name resources before they are published.
    """

    def __init__(
        self, persistence: Persistence, *, clock: Clock | None = None, validate_resources: bool = True
    ) -> None:
        self._persistence = persistence
        self._clock = clock or SystemClock()
        self._broker = EventBroker(self._clock)
        self._commands = WorkerMailboxes(self._broker)
        self._watchdog = Watchdog(self._broker, self._expire)
        self._validate_resources = validate_resources
        self._opened_at = time.monotonic()
        self._opened = False

    @property
    def _mailboxes(self) -> WorkerMailboxes:
        return self._commands

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return LightningStoreCapabilities(
            thread_safe=True, async_safe=True, zero_copy=False, otlp_traces=False
        )

    async def statistics(self) -> LightningStoreStatistics:
        await self._enter()
        totals = await self._persistence.totals()
        statistics = LightningStoreStatistics(
            name=type(self).__name__,
            total_rollouts=sum(totals.rollouts_by_status.values()),
            total_attempts=totals.attempts,
            total_spans=totals.spans,
            total_resources=totals.resources,
            total_workers=totals.workers,
            rollouts_by_status=totals.rollouts_by_status,
            uptime=time.monotonic() - self._opened_at,
            total_span_bytes=totals.span_bytes,
            evicted_spans=totals.evicted_spans,
        )
        statistics.update(totals.limits)  # type: ignore[typeddict-item]  # the backend speaks of the same keys
        return statistics

    async def close(self) -> None:
        if self._broker.closed:
            return
        self._broker.close()
        await self._watchdog.close()
        if self._opened:
            await self._persistence.close()

    # --- Handing out work --------------------------------------------------------------------------------------

    async def start_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> AttemptedRollout:
        now = await self._enter()
        _check_worker_id(worker_id)
        request = EnqueueRolloutRequest.model_construct(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata
        )
        (record,) = await self._new_rollouts([request], now)
        record = lifecycle.begin_attempt(record, new_id("at"), worker_id, None, now)
        (record,) = await self._persistence.insert_rollouts([record])
        await self._tell_all([(None, record)], now)
        return record.to_attempted_rollout()

    async def enqueue_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        request = EnqueueRolloutRequest.model_construct(
            input=input, mode=mode, resources_id=resources_id, config=config, metadata=metadata
        )
        return (await self.enqueue_many_rollouts([request]))[0]

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        now = await self._enter()
        records = await self._persistence.insert_rollouts(await self._new_rollouts(rollouts, now))
        await self._tell_all([(None, record) for record in records], now)
        return [record.to_rollout() for record in records]

    async def dequeue_rollout(self, worker_id: str | None = None) -> AttemptedRollout | None:
        claimed = await self.dequeue_many_rollouts(limit=1, worker_id=worker_id)
        return claimed[0] if claimed else None

    async def dequeue_many_rollouts(
        self, *, limit: int = 1, worker_id: str | None = None
    ) -> Sequence[AttemptedRollout]:
        _check_count(limit, "limit", least=0)
        return await self._claim(limit, worker_id, None)

    async def claim_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        instance_id: str | None = None,
        timeout: float | None = None,
    ) -> Sequence[AttemptedRollout]:
        _check_count(limit, "limit", least=1)
        wait = check_wait(timeout)
        until = None if wait is None else self._clock.now() + wait
        with self._broker.subscribe([_QUEUE]) as subscription:
            while True:
                claimed = await self._claim(limit, worker_id, instance_id)
                if claimed or wait == 0:
                    return claimed
                if not await subscription.wait(until):
                    wait = 0  # the time is up: one last look

    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        now = await self._enter()
        _check_worker_id(worker_id)
        attempt_id = new_id("at")
        change = await self._change(
            rollout_id, lambda record: lifecycle.begin_attempt(record, attempt_id, worker_id, None, now), now
        )
        return change.after.to_attempted_rollout()

    async def _claim(
        self, limit: int, worker_id: str | None, instance_id: str | None
    ) -> Sequence[AttemptedRollout]:
        now = await self._enter()
        _check_worker_id(worker_id)

        def begin(record: RolloutRecord) -> RolloutRecord:
            return lifecycle.begin_attempt(record, new_id("at"), worker_id, instance_id, now)

        changes = await self._persistence.claim_rollouts(limit, begin)
        if worker_id is not None:
            await self._persistence.change_worker(
                worker_id, lambda worker: replace(worker, last_dequeue_time=now)
            )
        await self._tell_all([(change.before, change.after) for change in changes], now)
        return [change.after.to_attempted_rollout() for change in changes]

    async def _new_rollouts(
        self, requests: Sequence[EnqueueRolloutRequest], now: float
    ) -> list[RolloutRecord]:
        """Check the requests; the records to insert, in `queuing`."""
        bound: dict[str | None, str | None] = {}
        records = []
        for request in requests:
            resources_id = request.resources_id
            if resources_id not in bound:
                bound[resources_id] = await self._bind_resources(resources_id)
            records.append(
                RolloutRecord(
                    rollout_id=new_id("ro"),
                    input=encode_payload(request.input, "input"),
                    status="queuing",
                    start_time=now,
                    config=_config_record(request.config),
                    mode=_check_choice(request.mode, MODES, "mode"),
                    resources_id=bound[resources_id],
                    metadata=encode_metadata(request.metadata),
                )
            )
        return records

    async def _bind_resources(self, resources_id: str | None) -> str | None:
        if resources_id is None:
            latest = await self._persistence.get_latest_resources()
            return None if latest is None else latest.resources_id
        await self._check_resources_exist(resources_id)
        return resources_id

    async def _check_resources_exist(self, resources_id: str) -> None:
        if not isinstance(resources_id, str):
            raise TypeError(f"resources_id must be a string, not {type(resources_id).__name__}")
        if self._validate_resources and await self._persistence.get_resources(resources_id, None) is None:
            raise ValueError(f"unknown resources {quote(resources_id)}")

    # --- Recording what happened -------------------------------------------------------------------------------

    async def add_span(self, span: Span) -> Span | None:
        stored = await self.add_many_spans([span])
        return stored[0] if stored else None

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        now = await self._enter()
        encoded = [SpanRecord.of(span) for span in spans]
        groups: dict[tuple[str, str], list[int]] = {}
        for index, span in enumerate(spans):
            groups.setdefault((span.rollout_id, span.attempt_id), []).append(index)
        await self._check_attempts_exist(groups)
        stored: dict[int, Span] = {}
        for (rollout_id, attempt_id), indexes in groups.items():
            receipts = await self._append_spans(rollout_id, attempt_id, [encoded[i] for i in indexes], now)
            for index, receipt in zip(indexes, receipts):
                if receipt.stored:
                    # from the bytes that were stored: a copy, and what any later query will return
                    stored[index] = replace(encoded[index], sequence_id=receipt.sequence_id).to_span()
        return [stored[index] for index in sorted(stored)]

    async def _append_spans(
        self, rollout_id: str, attempt_id: str, spans: Sequence[SpanRecord], now: float
    ) -> list[Any]:
        result = await self._persistence.append_spans(
            rollout_id,
            attempt_id,
            spans,
            lambda record, fresh: lifecycle.receive_spans(record, attempt_id, fresh, now),
        )
        if result is None:
            raise _unknown_rollout(rollout_id)
        change, receipts = result
        await self._tell(change.before, change.after, now)
        return receipts

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: ReadableSpan, sequence_id: int | None = None
    ) -> Span | None:
        return await self.add_span(
            Span.from_opentelemetry(readable_span, rollout_id, attempt_id, sequence_id or 0)
        )

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        return (await self.get_many_span_sequence_ids([(rollout_id, attempt_id)]))[0]

    async def get_many_span_sequence_ids(
        self, rollout_attempt_ids: Sequence[tuple[str, str]]
    ) -> Sequence[int]:
        now = await self._enter()
        groups: dict[tuple[str, str], list[int]] = {}
        for index, (rollout_id, attempt_id) in enumerate(rollout_attempt_ids):
            groups.setdefault((rollout_id, attempt_id), []).append(index)
        await self._check_attempts_exist(groups)
        allocated = [0] * len(rollout_attempt_ids)
        for (rollout_id, attempt_id), indexes in groups.items():
            change = await self._change(
                rollout_id,
                lambda record, attempt_id=attempt_id, count=len(indexes): (
                    lifecycle.allocate_span_sequence_ids(  # type: ignore[misc]
                        record, attempt_id, count
                    )
                ),
                now,
            )
            attempt = change.after.find_attempt(attempt_id)
            assert attempt is not None
            first = attempt.last_span_sequence_id - len(indexes) + 1
            for offset, index in enumerate(indexes):
                allocated[index] = first + offset
        return allocated

    async def _check_attempts_exist(self, keys: Iterable[tuple[str, str]]) -> None:
        for rollout_id, attempt_id in keys:
            record = await self._require_rollout(rollout_id)
            if not any(attempt.attempt_id == attempt_id for attempt in record.attempts):
                raise _unknown_attempt(rollout_id, attempt_id)

    # --- Looking things up -------------------------------------------------------------------------------------

    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus] | None = None,
        rollout_ids: Sequence[str] | None = None,
    ) -> PaginatedResult[Rollout]:
        page = Page.of(sort_by, sort_order, limit, offset, ROLLOUT_SORT_FIELDS)
        ids = rollout_ids if rollout_id_in is None else rollout_id_in
        if isinstance(ids, str):
            raise ValueError(f"rollout_id_in must be a list, not the string {quote(ids)}")
        query = RolloutQuery(
            status_in=check_members(
                status if status_in is None else status_in, ROLLOUT_STATUSES, "status_in"
            ),
            rollout_id_in=None if ids is None else tuple(ids),
            rollout_id_contains=rollout_id_contains,
            any_suffices=Filters.of((), filter_logic).any_suffices,
            page=page,
        )
        await self._enter()
        records, total = await self._persistence.find_rollouts(query)
        return page.paginated([record.to_rollout() for record in records], total)

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        page = Page.of(sort_by, sort_order, limit, offset, ATTEMPT_SORT_FIELDS)
        await self._enter()
        record = await self._require_rollout(rollout_id)
        return page.result(attempt.to_attempt(rollout_id) for attempt in record.attempts)

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
    ) -> PaginatedResult[Span]:
        page = Page.of(sort_by, sort_order, limit, offset, SPAN_SORT_FIELDS)
        filters: Filters[Span] = Filters.of(
            field_conditions(
                {"trace_id": trace_id, "span_id": span_id, "parent_id": parent_id, "name": name},
                {
                    "trace_id": trace_id_contains,
                    "span_id": span_id_contains,
                    "parent_id": parent_id_contains,
                    "name": name_contains,
                },
            ),
            filter_logic,
        )
        await self._enter()
        record = await self._require_rollout(rollout_id)
        attempts = record.attempts
        if attempt_id is not None:
            attempt = record.find_attempt(attempt_id)
            if attempt is None and attempt_id != "latest":
                raise _unknown_attempt(rollout_id, attempt_id)
            attempts = () if attempt is None else (attempt,)
        found = await self._persistence.find_spans(rollout_id, [attempt.attempt_id for attempt in attempts])
        order = {attempt.attempt_id: attempt.sequence_id for attempt in attempts}
        spans = [span.to_span() for span in found]
        spans.sort(key=lambda s: (order[s.attempt_id], s.sequence_id, s.start_time or 0.0, s.end_time or 0.0))
        matches = [span for span in spans if filters.match(span)]
        if page.sort_by == "sequence_id" and not page.descending:
            return page.paginated(page.cut(matches), len(matches))  # attempt by attempt, as they are
        return page.result(matches)

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        page = Page.of(sort_by, sort_order, limit, offset, RESOURCES_SORT_FIELDS)
        filters: Filters[ResourcesRecord] = Filters.of(
            field_conditions({"resources_id": resources_id}, {"resources_id": resources_id_contains}), "and"
        )
        await self._enter()
        records = page.result(filter(filters.match, await self._persistence.find_resources()))
        return page.paginated([record.to_update() for record in records], records.total)

    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: FilterLogic = "and",
        sort_by: str | None = None,
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        page = Page.of(sort_by, sort_order, limit, offset, WORKER_SORT_FIELDS)
        conditions = field_conditions({}, {"worker_id": worker_id_contains})
        statuses = check_members(status_in, WORKER_STATUSES, "status_in")
        if statuses is not None:
            conditions.append(lambda worker: worker.status in statuses)
        filters: Filters[Worker] = Filters.of(conditions, filter_logic)
        now = await self._enter()
        workers = [_worker(record, now) for record in await self._persistence.find_workers()]
        return page.result(filter(filters.match, workers))

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        await self._enter()
        record = await self._persistence.get_rollout(rollout_id)
        return None if record is None else record.to_rollout()

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        await self._enter()
        latest = (await self._require_rollout(rollout_id)).latest_attempt
        return None if latest is None else latest.to_attempt(rollout_id)

    async def get_resources_by_id(
        self, resources_id: str, version: int | None = None
    ) -> ResourcesUpdate | None:
        await self._enter()
        record = await self._persistence.get_resources(resources_id, version)
        return None if record is None else record.to_update()

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        await self._enter()
        record = await self._persistence.get_latest_resources()
        return None if record is None else record.to_update()

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        now = await self._enter()
        record = await self._persistence.get_worker(worker_id)
        return None if record is None else _worker(record, now)

    async def wait_for_rollouts(
        self, *, rollout_ids: Sequence[str], timeout: float | None = None
    ) -> list[Rollout]:
        wait = check_wait(timeout)
        now = await self._enter()
        until = None if wait is None else now + wait
        wanted = list(dict.fromkeys(rollout_ids))
        finished: dict[str, RolloutRecord] = {}
        with self._broker.subscribe([("finished", rollout_id) for rollout_id in wanted]) as subscription:
            look_at: Sequence[str] = wanted
            known: dict[str, RolloutRecord] | None = None
            while True:
                records = await self._persistence.get_rollouts(look_at)
                if known is None:
                    known = records
                    for rollout_id in wanted:
                        if rollout_id not in known:
                            raise _unknown_rollout(rollout_id)
                for rollout_id, record in records.items():
                    if lifecycle.is_finished(record):
                        finished[rollout_id] = record
                if len(finished) == len(wanted) or wait == 0:
                    return [
                        finished[rollout_id].to_rollout() for rollout_id in wanted if rollout_id in finished
                    ]
                fired = await subscription.wait(until)
                if fired:
                    look_at = [topic[1] for topic in fired]  # type: ignore[index]  # the topics subscribed to above
                else:
                    wait = 0  # the time is up: one last look at all that is missing
                    look_at = [rollout_id for rollout_id in wanted if rollout_id not in finished]

    # --- Resources ---------------------------------------------------------------------------------------------

    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        now = await self._enter()
        record = ResourcesRecord(new_id("rs"), 1, now, now, encode_resources(resources))
        if not await self._persistence.insert_resources(record):
            raise RuntimeError(
                f"resources {record.resources_id!r} exist already"
            )  # ids are random: cannot happen
        return self._published(record)

    async def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        now = await self._enter()
        encoded = encode_resources(resources)
        while True:
            newest = await self._persistence.get_resources(resources_id, None)
            if newest is None:
                raise ValueError(f"unknown resources {quote(resources_id)}")
            record = ResourcesRecord(resources_id, newest.version + 1, newest.create_time, now, encoded)
            if await self._persistence.insert_resources(record):
                return self._published(record)

    def _published(self, record: ResourcesRecord) -> ResourcesUpdate:
        self._commands.send(ResourcesChanged(resources_id=record.resources_id, version=record.version), None)
        return record.to_update()

    # --- Changing records --------------------------------------------------------------------------------------

    async def update_rollout(
        self,
        rollout_id: str,
        input: Any | Unset = UNSET,
        mode: RolloutMode | None | Unset = UNSET,
        resources_id: str | None | Unset = UNSET,
        status: RolloutStatus | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Rollout:
        now = await self._enter()
        changes: dict[str, Any] = {}
        if input is not UNSET:
            changes["input"] = encode_payload(input, "input")
        if mode is not UNSET:
            changes["mode"] = _check_choice(mode, MODES, "mode")
        if resources_id is not UNSET:
            if resources_id is not None:
                await self._check_resources_exist(resources_id)
            changes["resources_id"] = resources_id
        if status is not UNSET:
            changes["status"] = _require_choice(status, ROLLOUT_STATUSES, "status")
        if config is not UNSET:
            changes["config"] = _config_record(config)
        if metadata is not UNSET:
            changes["metadata"] = encode_metadata(metadata)
        change = await self._change(
            rollout_id, lambda record: lifecycle.update_rollout(record, changes, now), now, interrupt=True
        )
        return change.after.to_rollout()

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | None | Unset = UNSET,
        last_heartbeat_time: float | None | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Attempt:
        now = await self._enter()
        changes: dict[str, Any] = {}
        if status is not UNSET:
            changes["status"] = _require_choice(status, ATTEMPT_STATUSES, "status")
        if worker_id is not UNSET:
            changes["worker_id"] = _check_worker_id(worker_id)
        if last_heartbeat_time is not UNSET:
            changes["last_heartbeat_time"] = _check_time(last_heartbeat_time, "last_heartbeat_time")
        if metadata is not UNSET:
            changes["metadata"] = encode_metadata(metadata)
        change = await self._change(
            rollout_id, lambda record: lifecycle.update_attempt(record, attempt_id, changes, now), now
        )
        # "latest" is resolved on the record before: the change does not add attempts
        attempt = change.after.find_attempt(attempt_id)
        assert attempt is not None
        return attempt.to_attempt(rollout_id)

    async def update_worker(
        self, worker_id: str, heartbeat_stats: dict[str, Any] | None | Unset = UNSET
    ) -> Worker:
        now = await self._enter()
        _check_worker_id(worker_id, required=True)
        changes: dict[str, Any] = {"last_heartbeat_time": now}
        if heartbeat_stats is not UNSET:
            changes["heartbeat_stats"] = encode_metadata(heartbeat_stats, "heartbeat_stats")
        record = await self._persistence.change_worker(worker_id, lambda worker: replace(worker, **changes))
        for lease in record.leases:
            if lease.instance_id is None:
                await self._refresh(lease.rollout_id, lease.attempt_id, now)
        return _worker(record, now)

    async def send_heartbeat(self, heartbeat: WorkerHeartbeat) -> HeartbeatReply:
        now = await self._enter()
        worker_id = heartbeat.worker_id
        _check_worker_id(worker_id, required=True)
        changes: dict[str, Any] = {
            "last_heartbeat_time": now,
            "silent_after_seconds": heartbeat.silent_after_seconds,
        }
        if heartbeat.heartbeat_stats is not None:
            changes["heartbeat_stats"] = encode_metadata(heartbeat.heartbeat_stats, "heartbeat_stats")
        record = await self._persistence.change_worker(worker_id, lambda worker: replace(worker, **changes))
        commands: list[WorkerCommand] = []
        for ref in heartbeat.attempts:
            rollout = await self._persistence.get_rollout(ref.rollout_id)
            if lifecycle.holds_attempt(rollout, ref.attempt_id, worker_id, heartbeat.instance_id):
                await self._refresh(ref.rollout_id, ref.attempt_id, now)
                continue
            attempt = None if rollout is None else rollout.find_attempt(ref.attempt_id)
            closed = attempt is not None and not lifecycle.is_open(attempt)
            status: AttemptStatus = attempt.status if attempt is not None and closed else "cancelled"
            commands.append(
                CancelAttempt(rollout_id=ref.rollout_id, attempt_id=ref.attempt_id, status=status)
            )
        return HeartbeatReply(worker=_worker(record, now), commands=commands)

    async def _refresh(self, rollout_id: str, attempt_id: str, now: float) -> None:
        await self._persistence.change_rollout(
            rollout_id, lambda record: lifecycle.refresh_attempt(record, attempt_id, now)
        )

    # --- What all verbs share ----------------------------------------------------------------------------------

    async def _enter(self) -> float:
        """Begin a verb: the store must be open, and what is overdue must have happened. Returns the time."""
        if self._broker.closed:
            raise BrokerClosed("the store was closed")
        if not self._opened:
            await self._persistence.open()
            self._opened = True
            self._watchdog.watch(await self._persistence.first_deadline())
        now = self._clock.now()
        deadline = self._watchdog.next_deadline
        if deadline is not None and deadline < now:
            self._watchdog.watch(await self._expire())
        return now

    async def _expire(self) -> float | None:
        """Close every attempt whose time is up; returns the next deadline."""
        while True:
            now = self._clock.now()
            due = await self._persistence.due_rollouts(now, _EXPIRE_BATCH)
            for rollout_id in due:
                change = await self._persistence.change_rollout(
                    rollout_id,
                    lambda record, now=now: lifecycle.expire(record, now),  # type: ignore[misc]
                )
                if change is not None:
                    await self._tell(change.before, change.after, now, interrupt=True)
            if len(due) < _EXPIRE_BATCH:
                return await self._persistence.first_deadline()

    async def _require_rollout(self, rollout_id: str) -> RolloutRecord:
        record = await self._persistence.get_rollout(rollout_id)
        if record is None:
            raise _unknown_rollout(rollout_id)
        return record

    async def _change(
        self,
        rollout_id: str,
        transition: Callable[[RolloutRecord], RolloutRecord],
        now: float,
        *,
        interrupt: bool = False,
    ) -> RolloutChange:
        change = await self._persistence.change_rollout(rollout_id, transition)
        if change is None:
            raise _unknown_rollout(rollout_id)
        await self._tell(change.before, change.after, now, interrupt=interrupt)
        return change

    async def _tell_all(
        self, pairs: Iterable[tuple[RolloutRecord | None, RolloutRecord]], now: float
    ) -> None:
        for before, after in pairs:
            await self._tell(before, after, now)

    async def _tell(
        self, before: RolloutRecord | None, after: RolloutRecord, now: float, *, interrupt: bool = False
    ) -> None:
        """Let everybody know what a change means to them.

        Args:
            before: The rollout's record before the change; None if it is new.
            after: The record since.
            now: The time.
            interrupt: Whether a worker that lost an attempt by this change does not know it yet.
        """
        effects = lifecycle.effects(before, after)
        for hold in effects.released:
            await self._persistence.change_worker(
                hold.worker_id,
                lambda worker, hold=hold: lifecycle.release(worker, hold, now),  # type: ignore[misc]
            )
            if interrupt and hold.status != "unresponsive":  # that one may yet be revived
                ref = {"rollout_id": hold.lease.rollout_id, "attempt_id": hold.lease.attempt_id}
                self._commands.send(CancelAttempt(**ref, status=hold.status), hold.worker_id)
        for hold in effects.acquired:
            await self._persistence.change_worker(
                hold.worker_id,
                lambda worker, hold=hold: lifecycle.acquire(worker, hold.lease, now),  # type: ignore[misc]
            )
        self._watchdog.watch(lifecycle.next_deadline(after))
        if effects.entered_queue:
            self._broker.publish(_QUEUE, at_most=1)
        if effects.finished:
            self._broker.publish(("finished", after.rollout_id))


def new_id(prefix: str) -> str:
    """A fresh identifier: `ro-…`, `at-…`, `rs-…`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def quote(text: str) -> str:
    """An identifier as it appears in an error message, shortened if it is absurdly long."""
    return repr(text if len(text) <= 200 else text[:200] + "…") if isinstance(text, str) else repr(text)


def _unknown_rollout(rollout_id: str) -> ValueError:
    return ValueError(f"unknown rollout {quote(rollout_id)}")


def _unknown_attempt(rollout_id: str, attempt_id: str) -> ValueError:
    return ValueError(f"unknown attempt {quote(attempt_id)} of rollout {quote(rollout_id)}")


def _worker(record: WorkerRecord, now: float) -> Worker:
    return record.to_worker(lifecycle.worker_status(record, now))


def _config_record(config: RolloutConfig | None) -> ConfigRecord:
    if config is not None and not isinstance(config, RolloutConfig):
        raise TypeError(f"config must be a RolloutConfig, not {type(config).__name__}")
    return ConfigRecord.of(config)


def _require_choice(value: Any, choices: Sequence[str], name: str) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _check_choice(value: Any, choices: Sequence[str], name: str) -> Any:
    return None if value is None else _require_choice(value, choices, name)


def _check_count(value: int, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _check_time(value: float | None, name: str) -> float | None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, (int, float)) or value != value
    ):
        raise ValueError(f"{name} must be seconds since the epoch or None, not {value!r}")
    return value


def _check_worker_id(worker_id: Any, required: bool = False) -> Any:
    if worker_id is None and not required:
        return None
    if not isinstance(worker_id, str) or not worker_id:
        raise ValueError(f"worker_id must be a non-empty string, not {worker_id!r}")
    return worker_id
