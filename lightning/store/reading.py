"""The verbs that only look."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from lightning.codec.building import decode_many
from lightning.store import lifecycle
from lightning.store.arguments import (
    ROLLOUT_STATUSES,
    WORKER_STATUSES,
    unknown_attempt,
)
from lightning.store.contract import FilterLogic, SortOrder
from lightning.store.core import ANY_CHANGE, EngineCore
from lightning.store.numbers import check_revision, check_version
from lightning.store.queries import (
    ATTEMPT_SORT_FIELDS,
    RESOURCES_SORT_FIELDS,
    ROLLOUT_SORT_FIELDS,
    WORKER_SORT_FIELDS,
    Filters,
    Page,
    RolloutQuery,
    SpanQuery,
    any_suffices,
    check_members,
    check_texts,
    check_wait,
    field_conditions,
)
from lightning.store.records import (
    ResourcesRecord,
    SpanRecord,
    WorkerRecord,
)
from lightning.store.texts import check_ids, check_text
from lightning.store.watching import RolloutWatch
from lightning.types import (
    Attempt,
    LightningStoreStatistics,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutEvent,
    RolloutStatus,
    Span,
    Worker,
    WorkerStatus,
)


class ReadingVerbs(EngineCore):
    """Statistics, queries, look-ups and waiting."""

    async def statistics(self) -> LightningStoreStatistics:
        now = await self._enter()
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
            dropped_rollouts=totals.dropped_rollouts,
        )
        if self._expired_attempts:
            statistics["expired_attempts"] = dict(self._expired_attempts)
        if totals.attempts_by_status:
            statistics["attempts_by_status"] = totals.attempts_by_status
        if totals.queued_since is not None:
            statistics["oldest_queued_age"] = max(0.0, now - totals.queued_since)
        statistics.update(totals.limits)  # type: ignore[typeddict-item]  # the backend speaks of the same keys
        return statistics

    async def check_writable(self) -> None:
        await self._enter()
        await self._persistence.check_writable()

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
        check_texts(rollout_id_contains=rollout_id_contains)
        query = RolloutQuery(
            status_in=check_members(
                status if status_in is None else status_in, ROLLOUT_STATUSES, "status_in"
            ),
            rollout_id_in=None if ids is None else tuple(check_ids(ids, "rollout_id_in")),
            rollout_id_contains=rollout_id_contains,
            any_suffices=any_suffices(filter_logic),
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
        query = SpanQuery.of(
            trace_id=trace_id,
            trace_id_contains=trace_id_contains,
            span_id=span_id,
            span_id_contains=span_id_contains,
            parent_id=parent_id,
            parent_id_contains=parent_id_contains,
            name=name,
            name_contains=name_contains,
            filter_logic=filter_logic,
            limit=limit,
            offset=offset,
            sort_by=sort_by,
            sort_order=sort_order,
        )
        found = await self.find_span_records(rollout_id, attempt_id, query)
        return query.page.paginated(decode_many(SpanRecord.to_span, found), found.total)

    async def find_span_records(
        self, rollout_id: str, attempt_id: str | None, query: SpanQuery
    ) -> PaginatedResult[SpanRecord]:
        """`query_spans`, for who wants them encoded."""
        await self._enter()
        record = await self._require_rollout(rollout_id)
        attempts = record.attempts
        if attempt_id is not None:
            check_text(attempt_id, "attempt_id")
            attempt = record.find_attempt(attempt_id)
            if attempt is None and attempt_id != "latest":
                raise unknown_attempt(rollout_id, attempt_id)
            attempts = () if attempt is None else (attempt,)
        found = await self._persistence.find_spans(rollout_id, [attempt.attempt_id for attempt in attempts])
        return query.select(found, {attempt.attempt_id: attempt.sequence_id for attempt in attempts})

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
        workers = [as_worker(record, now) for record in await self._persistence.find_workers()]
        return page.result(filter(filters.match, workers))

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        check_text(rollout_id, "rollout_id")
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
        check_text(resources_id, "resources_id")
        check_version(version)
        await self._enter()
        record = await self._persistence.get_resources(resources_id, version)
        return None if record is None else record.to_update()

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        await self._enter()
        record = await self._persistence.get_latest_resources()
        return None if record is None else record.to_update()

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        check_text(worker_id, "worker_id")
        now = await self._enter()
        record = await self._persistence.get_worker(worker_id)
        return None if record is None else as_worker(record, now)

    async def wait_for_rollouts(
        self, *, rollout_ids: Sequence[str], timeout: float | None = None
    ) -> list[Rollout]:
        wait = check_wait(timeout)
        wanted = list(dict.fromkeys(check_ids(rollout_ids, "rollout_ids")))
        now = await self._enter()
        until = None if wait is None else now + wait
        time_is_up = wait == 0
        with self._broker.subscribe([("finished", rollout_id) for rollout_id in wanted]) as subscription:
            while True:
                # all of them every time: one that had ended may have been queued again
                records = await self._persistence.get_rollouts(wanted)
                for rollout_id in wanted:
                    if rollout_id not in records:
                        raise await self._unknown(rollout_id)
                pending = {
                    rollout_id for rollout_id in wanted if not lifecycle.is_finished(records[rollout_id])
                }
                if time_is_up or not pending:
                    return [
                        records[rollout_id].to_rollout() for rollout_id in wanted if rollout_id not in pending
                    ]
                while pending and not time_is_up:
                    fired = await subscription.wait(until)
                    pending.difference_update(topic[1] for topic in fired)  # type: ignore[index]  # as subscribed to
                    time_is_up = not fired

    async def watch_rollouts(
        self, *, rollout_ids: Sequence[str], after_revision: int | None = None
    ) -> AsyncGenerator[RolloutEvent, None]:
        check_revision(after_revision)
        wanted = list(dict.fromkeys(check_ids(rollout_ids, "rollout_ids")))
        await self._enter()
        watch = RolloutWatch(self._persistence, self._unknown, after_revision)
        topics = [ANY_CHANGE, *(("changed", rollout_id) for rollout_id in wanted)]
        with self._broker.subscribe(topics) as subscription:
            changed = wanted
            while True:
                async with aclosing(watch.look(changed)) as events:
                    async for event in events:
                        yield event
                if not watch.pending:
                    return
                fired = await subscription.wait()
                changed = wanted if ANY_CHANGE in fired else [topic[1] for topic in fired]  # type: ignore[index]


def as_worker(record: WorkerRecord, now: float) -> Worker:
    return record.to_worker(lifecycle.worker_status(record, now))
