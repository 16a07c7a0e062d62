"""A store of one's own, written from the contract alone: records in dictionaries, every query a look at all of them.

It is as slow as it is short, and correct: `test_plain_store.py` beside it runs the contract suite on it. Start here if
you write a store for a database of your own; if your database can swap one record for another atomically, implement
`lightning.store.persistence.abc.Persistence` instead, and get all rules for free.

It belongs to one event loop. `LightningStoreThreaded(PlainStore())` is for many threads, `LightningStoreServer` for
many machines.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from plain_values import (
    check,
    check_request,
    checked_config,
    checked_list,
    contains,
    copied_page,
    copied_resource,
    copied_span,
    equals,
    filtered,
    json_object,
    page_of,
    request_of,
)

from lightning.store.clock import Clock, SystemClock
from lightning.store.contract import (
    TERMINAL_ATTEMPT_STATUSES,
    TERMINAL_ROLLOUT_STATUSES,
    FilterLogic,
    LightningStore,
    SortOrder,
)
from lightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EnqueueRolloutRequest,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    Unset,
    Worker,
    WorkerStatus,
    to_json_value,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T = TypeVar("T")

QUEUED = ("queuing", "requeuing")
ROLLOUT_STATUSES = (*QUEUED, "preparing", "running", *TERMINAL_ROLLOUT_STATUSES)
ATTEMPT_STATUSES = ("preparing", "running", *TERMINAL_ATTEMPT_STATUSES)
SILENT_AFTER_SECONDS = 11.5


class PlainStore(LightningStore):
    """Everything in memory, nothing clever.

    Args:
        clock: Tells the time; tests pass one that they move.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._opened_at = self._clock.now()
        self._rollouts: dict[str, Rollout] = {}
        self._attempts: dict[str, list[Attempt]] = {}
        self._queue: list[str] = []
        self._spans: dict[str, list[Span]] = {}
        self._last_sequence_ids: dict[str, int] = {}
        self._resources: list[ResourcesUpdate] = []
        self._workers: dict[str, Worker] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._cancel_alarm: Callable[[], None] | None = None

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return {"thread_safe": False, "async_safe": True, "zero_copy": False, "otlp_traces": False}

    async def statistics(self) -> LightningStoreStatistics:
        return {
            "name": "PlainStore",
            "total_rollouts": len(self._rollouts),
            "total_attempts": sum(map(len, self._attempts.values())),
            "total_spans": sum(map(len, self._spans.values())),
            "total_resources": len(self._resources),
            "total_workers": len(self._workers),
            "uptime": self._clock.now() - self._opened_at,
        }

    async def close(self) -> None:
        if self._cancel_alarm is not None:
            self._cancel_alarm()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(RuntimeError("the store was closed"))

    # --- Handing out work ---

    async def start_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
    ) -> AttemptedRollout:
        request = request_of(input, mode, resources_id, config, metadata)
        (rollout,) = self._create([request])
        return self._begin(rollout, worker_id)

    async def enqueue_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        return (await self.enqueue_many_rollouts([request_of(input, mode, resources_id, config, metadata)]))[
            0
        ]

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        created = self._create(rollouts)
        self._queue.extend(rollout.rollout_id for rollout in created)
        self._changed()
        return [self._copy(rollout) for rollout in created]

    async def dequeue_rollout(self, worker_id: str | None = None) -> AttemptedRollout | None:
        claimed = await self.dequeue_many_rollouts(limit=1, worker_id=worker_id)
        return claimed[0] if claimed else None

    async def dequeue_many_rollouts(
        self, *, limit: int = 1, worker_id: str | None = None
    ) -> Sequence[AttemptedRollout]:
        check(limit >= 0, f"limit must be at least 0, not {limit}")
        self._expire()
        claimed = [self._begin(self._rollouts[rollout_id], worker_id) for rollout_id in self._queue[:limit]]
        if worker_id is not None:
            self._worker(worker_id).last_dequeue_time = self._clock.now()
        return claimed

    async def start_attempt(self, rollout_id: str, worker_id: str | None = None) -> AttemptedRollout:
        rollout = self._rollout(rollout_id)
        check(rollout.status != "cancelled", f"rollout {rollout_id!r} is cancelled")
        return self._begin(rollout, worker_id)

    def _create(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        created = []
        latest = self._resources[-1].resources_id if self._resources else None
        for index, request in enumerate(requests):
            check_request(index, request)
            resources_id = latest if request.resources_id is None else request.resources_id
            self._check_rollout_fields({"mode": request.mode, "resources_id": resources_id})
            rollout = Rollout(
                rollout_id=f"ro-{uuid.uuid4().hex}",
                input=to_json_value(request.input, "input"),
                start_time=self._clock.now(),
                mode=request.mode,
                resources_id=resources_id,
                config=checked_config(request.config),
                metadata=json_object(request.metadata, "metadata"),
            )
            created.append(rollout)
        for rollout in created:
            self._rollouts[rollout.rollout_id] = rollout
            self._attempts[rollout.rollout_id] = []
        return created

    def _begin(self, rollout: Rollout, worker_id: str | None) -> AttemptedRollout:
        attempts = self._attempts[rollout.rollout_id]
        attempt = Attempt(
            rollout_id=rollout.rollout_id,
            attempt_id=f"at-{uuid.uuid4().hex}",
            sequence_id=len(attempts) + 1,
            start_time=self._clock.now(),
            worker_id=worker_id,
        )
        attempts.append(attempt)
        self._spans[attempt.attempt_id] = []
        self._last_sequence_ids[attempt.attempt_id] = 0
        self._set_rollout_status(rollout, "preparing")
        if worker_id is not None:
            self._worker(worker_id).last_busy_time = attempt.start_time
        self._changed()
        copied = self._copy(rollout)
        assert isinstance(copied, AttemptedRollout)
        return copied

    # --- Recording what happened ---

    async def add_span(self, span: Span) -> Span | None:
        stored = await self.add_many_spans([span])
        return stored[0] if stored else None

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        self._expire()
        # the product's own encoding: checks what may stand in a span, and makes copies
        copies = [copied_span(span) for span in spans]
        attempts = [self._attempt(span.rollout_id, span.attempt_id) for span in spans]
        stored = []
        for span, attempt in zip(copies, attempts, strict=True):
            self._hear_of(attempt)
            known = self._spans[attempt.attempt_id]
            if any(span.span_id == other.span_id for other in known):
                continue
            span.sequence_id = span.sequence_id or self._last_sequence_ids[attempt.attempt_id] + 1
            self._last_sequence_ids[attempt.attempt_id] = max(
                self._last_sequence_ids[attempt.attempt_id], span.sequence_id
            )
            known.append(span)
            stored.append(span)
        self._changed()
        return [span.model_copy(deep=True) for span in stored]

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
        attempts = [self._attempt(*ids) for ids in rollout_attempt_ids]
        numbers = []
        for attempt in attempts:
            self._last_sequence_ids[attempt.attempt_id] += 1
            numbers.append(self._last_sequence_ids[attempt.attempt_id])
        return numbers

    def _hear_of(self, attempt: Attempt) -> None:
        attempt.last_heartbeat_time = self._clock.now()
        is_latest = attempt is self._attempts[attempt.rollout_id][-1]
        if attempt.status == "preparing" or (attempt.status == "unresponsive" and is_latest):
            self._set_attempt_status(attempt, "running")

    # --- Looking things up ---

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
        self._expire()
        wanted_statuses = checked_list(status if status_in is None else status_in, ROLLOUT_STATUSES)
        wanted_ids = checked_list(rollout_ids if rollout_id_in is None else rollout_id_in, None)
        matching = filtered(
            self._rollouts.values(),
            filter_logic,
            None if wanted_statuses is None else lambda rollout: rollout.status in wanted_statuses,
            None if wanted_ids is None else lambda rollout: rollout.rollout_id in wanted_ids,
            contains("rollout_id", rollout_id_contains),
        )
        page = page_of(matching, sort_by, sort_order, limit, offset)
        return page.model_copy(update={"items": [self._copy(rollout) for rollout in page.items]})

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: SortOrder = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        self._rollout(rollout_id)
        return copied_page(page_of(self._attempts[rollout_id], sort_by, sort_order, limit, offset))

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
        self._rollout(rollout_id)
        attempts = self._attempts[rollout_id]
        if attempt_id == "latest":
            attempts = attempts[-1:]
        elif attempt_id is not None:
            attempts = [self._attempt(rollout_id, attempt_id)]
        spans = [
            span
            for attempt in attempts
            for span in sorted(
                self._spans[attempt.attempt_id],
                key=lambda span: (span.sequence_id, span.start_time or 0.0, span.end_time or 0.0),
            )
        ]
        matching = filtered(
            spans,
            filter_logic,
            equals("trace_id", trace_id),
            equals("span_id", span_id),
            equals("parent_id", parent_id),
            equals("name", name),
            contains("trace_id", trace_id_contains),
            contains("span_id", span_id_contains),
            contains("parent_id", parent_id_contains),
            contains("name", name_contains),
        )
        by = None if sort_by == "sequence_id" else sort_by  # they are in that order already
        return copied_page(page_of(matching, by, sort_order, limit, offset))

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
        matching = filtered(
            self._resources,
            "and",
            equals("resources_id", resources_id),
            contains("resources_id", resources_id_contains),
        )
        return copied_page(page_of(matching, sort_by, sort_order, limit, offset))

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
        self._expire()
        wanted_statuses = checked_list(status_in, ("idle", "busy", "unknown"))
        matching = filtered(
            [self._derived(worker) for worker in self._workers.values()],
            filter_logic,
            None if wanted_statuses is None else lambda worker: worker.status in wanted_statuses,
            contains("worker_id", worker_id_contains),
        )
        return page_of(matching, sort_by, sort_order, limit, offset)

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        self._expire()
        rollout = self._rollouts.get(rollout_id)
        return None if rollout is None else self._copy(rollout)

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        self._rollout(rollout_id)
        attempts = self._attempts[rollout_id]
        return attempts[-1].model_copy(deep=True) if attempts else None

    async def get_resources_by_id(
        self, resources_id: str, version: int | None = None
    ) -> ResourcesUpdate | None:
        for update in reversed(self._resources):
            if update.resources_id == resources_id and version in (None, update.version):
                return update.model_copy(deep=True)
        return None

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        return self._resources[-1].model_copy(deep=True) if self._resources else None

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        self._expire()
        worker = self._workers.get(worker_id)
        return None if worker is None else self._derived(worker)

    async def wait_for_rollouts(
        self, *, rollout_ids: Sequence[str], timeout: float | None = None
    ) -> list[Rollout]:
        check(timeout is None or timeout >= 0, f"timeout must be 0 or more, not {timeout}")
        wanted = [self._rollout(rollout_id) for rollout_id in dict.fromkeys(rollout_ids)]
        until = math.inf if timeout is None else self._clock.now() + timeout
        while True:
            finished = [self._copy(r) for r in wanted if r.status in TERMINAL_ROLLOUT_STATUSES]
            if len(finished) == len(wanted) or self._clock.now() >= until:
                return finished
            await self._until_something_changes(until)

    # --- Resources ---

    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        now = self._clock.now()
        return self._publish(f"rs-{uuid.uuid4().hex}", 1, now, resources)

    async def update_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        newest = await self.get_resources_by_id(resources_id)
        if newest is None:
            raise ValueError(f"unknown resources {resources_id!r}")
        return self._publish(resources_id, newest.version + 1, newest.create_time, resources)

    def _publish(
        self, resources_id: str, version: int, create_time: float, resources: NamedResources
    ) -> ResourcesUpdate:
        update = ResourcesUpdate.model_construct(
            resources_id=resources_id,
            version=version,
            create_time=create_time,
            update_time=self._clock.now(),
            resources={name: copied_resource(name, resource) for name, resource in resources.items()},
        )
        self._resources.append(update)
        return update.model_copy(deep=True)

    # --- Changing records ---

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
        rollout = self._rollout(rollout_id)
        changes: dict[str, Any] = {"input": input, "mode": mode, "resources_id": resources_id}
        changes = {name: value for name, value in changes.items() if value is not UNSET}
        self._check_rollout_fields(changes)
        if "input" in changes:
            changes["input"] = to_json_value(input, "input")
        if config is not UNSET:
            changes["config"] = checked_config(config)
        if metadata is not UNSET:
            changes["metadata"] = json_object(metadata, "metadata")
        if status is not UNSET:
            check(status in ROLLOUT_STATUSES, f"status must not be {status!r}")
            check(
                rollout.status != "cancelled" or status == "cancelled", f"rollout {rollout_id!r} is cancelled"
            )
        for name, value in changes.items():
            setattr(rollout, name, value)
        if status is not UNSET and status != rollout.status:
            if status in ("succeeded", "failed", "cancelled"):
                attempts = self._attempts[rollout_id]
                for attempt in attempts:
                    silent = attempt is attempts[-1] and attempt.status == "unresponsive"
                    if silent or self._is_open(attempt):
                        self._set_attempt_status(attempt, status, propagate=False)
            self._set_rollout_status(rollout, status)
        self._changed()
        return self._copy(rollout)

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | None | Unset = UNSET,
        last_heartbeat_time: float | None | Unset = UNSET,
        metadata: dict[str, Any] | None | Unset = UNSET,
    ) -> Attempt:
        attempt = self._attempt(rollout_id, attempt_id, or_latest=True)
        new_metadata = attempt.metadata if metadata is UNSET else json_object(metadata, "metadata")
        if status is not UNSET:
            check(status in ATTEMPT_STATUSES, f"status must not be {status!r}")
            check(status != "cancelled", "an attempt is cancelled by cancelling its rollout")
        attempt.metadata = new_metadata
        if last_heartbeat_time is not UNSET:
            attempt.last_heartbeat_time = last_heartbeat_time
        if worker_id is not UNSET and worker_id != attempt.worker_id:
            former, attempt.worker_id = attempt.worker_id, worker_id
            if self._is_open(attempt):
                self._release(former, attempt.status)
            if self._is_open(attempt) and worker_id is not None:
                self._worker(worker_id).last_busy_time = self._clock.now()
        if status is not UNSET and status != attempt.status:
            is_latest = attempt is self._attempts[rollout_id][-1]
            may_be_revived = attempt.status == "unresponsive" and is_latest
            may_end = attempt.status == "unresponsive" and status in TERMINAL_ATTEMPT_STATUSES
            if status != "preparing" and (self._is_open(attempt) or may_be_revived or may_end):
                self._set_attempt_status(attempt, status)
        self._changed()
        return attempt.model_copy(deep=True)

    async def update_worker(
        self, worker_id: str, heartbeat_stats: dict[str, Any] | None | Unset = UNSET
    ) -> Worker:
        self._expire()
        if heartbeat_stats is not UNSET:
            stats = json_object(heartbeat_stats, "heartbeat_stats")
            self._worker(worker_id).heartbeat_stats = stats
        self._worker(worker_id).last_heartbeat_time = self._clock.now()
        for attempt in self._held_by(worker_id):
            attempt.last_heartbeat_time = self._clock.now()
        self._changed()
        return self._derived(self._worker(worker_id))

    # --- The rules ---

    def _set_attempt_status(self, attempt: Attempt, status: AttemptStatus, *, propagate: bool = True) -> None:
        was_open = self._is_open(attempt)
        attempt.status = status
        attempt.end_time = self._clock.now() if status in TERMINAL_ATTEMPT_STATUSES else None
        if was_open and attempt.end_time is not None:
            self._release(attempt.worker_id, status)
        elif not was_open and attempt.end_time is None and attempt.worker_id is not None:
            self._worker(attempt.worker_id).last_busy_time = self._clock.now()
        rollout = self._rollouts[attempt.rollout_id]
        if not propagate or attempt is not self._attempts[rollout.rollout_id][-1]:
            return
        if rollout.status != "cancelled":
            self._set_rollout_status(rollout, self._status_after(rollout, attempt))

    def _status_after(self, rollout: Rollout, attempt: Attempt) -> RolloutStatus:
        if attempt.status in ("preparing", "running", "succeeded"):
            return attempt.status
        may_retry = attempt.sequence_id < rollout.config.max_attempts
        return "requeuing" if may_retry and attempt.status in rollout.config.retry_condition else "failed"

    def _set_rollout_status(self, rollout: Rollout, status: RolloutStatus) -> None:
        rollout.status = status
        if status in QUEUED and rollout.rollout_id not in self._queue:
            self._queue.append(rollout.rollout_id)
        elif status not in QUEUED and rollout.rollout_id in self._queue:
            self._queue.remove(rollout.rollout_id)
        if status not in TERMINAL_ROLLOUT_STATUSES:
            rollout.end_time = None
        elif rollout.end_time is None:
            rollout.end_time = self._clock.now()

    def _release(self, worker_id: str | None, status: AttemptStatus) -> None:
        if worker_id is not None and status != "unresponsive" and not self._held_by(worker_id):
            self._worker(worker_id).last_idle_time = self._clock.now()

    def _deadlines(self) -> list[tuple[float, AttemptStatus, Attempt]]:
        """When which open attempt becomes what, the earliest first."""
        deadlines: list[tuple[float, AttemptStatus, Attempt]] = []
        for rollout_id, attempts in self._attempts.items():
            config = self._rollouts[rollout_id].config
            for attempt in attempts:
                if attempt.status in TERMINAL_ATTEMPT_STATUSES:
                    continue
                if config.timeout_seconds is not None:
                    deadlines.append((attempt.start_time + config.timeout_seconds, "timeout", attempt))
                if config.unresponsive_seconds is not None:
                    heard = attempt.last_heartbeat_time
                    since = attempt.start_time if heard is None else heard
                    deadlines.append((since + config.unresponsive_seconds, "unresponsive", attempt))
        return sorted(deadlines, key=lambda deadline: deadline[0])

    def _expire(self) -> None:
        now = self._clock.now()
        due = [(status, attempt) for deadline, status, attempt in self._deadlines() if deadline < now]
        overdue = {attempt.attempt_id for status, attempt in due if status == "timeout"}
        for status, attempt in due:
            if self._is_open(attempt):
                self._set_attempt_status(attempt, "timeout" if attempt.attempt_id in overdue else status)

    def _watch(self) -> None:
        """The alarm went off: somebody's time is up."""
        self._cancel_alarm = None
        self._expire()
        self._changed()

    def _changed(self) -> None:
        """Wake everybody who waits, and see when the watchdog has to act next."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._cancel_alarm is not None:
            self._cancel_alarm()
        first = next(iter(self._deadlines()), None)
        self._cancel_alarm = (
            None if first is None else self._clock.call_at(math.nextafter(first[0], math.inf), self._watch)
        )

    async def _until_something_changes(self, until: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        wake = lambda: None if waiter.done() else waiter.set_result(None)  # noqa: E731
        cancel = None if math.isinf(until) else self._clock.call_at(until, wake)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if cancel is not None:
                cancel()

    # --- Small things ---

    def _rollout(self, rollout_id: str) -> Rollout:
        self._expire()
        rollout = self._rollouts.get(rollout_id)
        if rollout is None:
            raise ValueError(f"unknown rollout {rollout_id!r}")
        return rollout

    def _attempt(self, rollout_id: str, attempt_id: str, or_latest: bool = False) -> Attempt:
        self._rollout(rollout_id)
        attempts = self._attempts[rollout_id]
        if attempt_id == "latest" and or_latest:
            check(bool(attempts), f"rollout {rollout_id!r} has no attempts")
            return attempts[-1]
        for attempt in attempts:
            if attempt.attempt_id == attempt_id:
                return attempt
        raise ValueError(f"unknown attempt {attempt_id!r} of rollout {rollout_id!r}")

    def _is_open(self, attempt: Attempt) -> bool:
        return attempt.status not in TERMINAL_ATTEMPT_STATUSES

    def _worker(self, worker_id: str) -> Worker:
        return self._workers.setdefault(worker_id, Worker(worker_id=worker_id))

    def _held_by(self, worker_id: str) -> list[Attempt]:
        held = [
            attempt
            for attempts in self._attempts.values()
            for attempt in attempts
            if attempt.worker_id == worker_id and self._is_open(attempt)
        ]
        return sorted(held, key=lambda attempt: attempt.start_time)

    def _derived(self, worker: Worker) -> Worker:
        """A copy, with what it does and whether it is alive as of now."""
        held = self._held_by(worker.worker_id)
        copied = worker.model_copy(deep=True)
        if held:
            copied.current_rollout_id, copied.current_attempt_id = held[-1].rollout_id, held[-1].attempt_id
        times = (
            worker.last_heartbeat_time,
            worker.last_dequeue_time,
            worker.last_busy_time,
            worker.last_idle_time,
        )
        heard = max((time for time in times if time is not None), default=-math.inf)
        if self._clock.now() - heard > SILENT_AFTER_SECONDS:
            copied.status = "unknown"
        elif held:
            copied.status = "busy"
        else:
            copied.status = "unknown" if worker.last_idle_time is None else "idle"
        return copied

    def _copy(self, rollout: Rollout) -> Rollout:
        attempts = self._attempts[rollout.rollout_id]
        copied = rollout.model_copy(deep=True)
        if not attempts:
            return copied
        return AttemptedRollout.model_construct(**vars(copied), attempt=attempts[-1].model_copy(deep=True))

    def _check_rollout_fields(self, fields: dict[str, Any]) -> None:
        mode, resources_id = fields.get("mode"), fields.get("resources_id")
        check(mode in (None, "train", "val", "test"), f"mode must not be {mode!r}")
        known = {update.resources_id for update in self._resources}
        check(resources_id is None or resources_id in known, f"unknown resources {resources_id!r}")
