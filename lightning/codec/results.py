"""What surrounds the records: pages of results, statistics, capabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from google.protobuf.message import Message
from lightningpb.v1 import store_service_pb2 as service_pb2

from lightning.codec.building import build, construct, decode_object, encode_object
from lightning.codec.enums import SORT_ORDER
from lightning.codec.rollouts import rollout_from_proto, rollout_to_proto
from lightning.types import (
    LightningStoreCapabilities,
    LightningStoreStatistics,
    PaginatedResult,
    RolloutEvent,
)

if TYPE_CHECKING:
    from lightning.store.contract import SortOrder

T = TypeVar("T")

NO_LIMIT = -1
"""A query's `limit` when all matches are wanted."""

# By the key of the statistics: the field on the wire. Keys that are not here travel as JSON.
_STATISTICS_FIELDS = {
    "name": "name",
    "total_rollouts": "total_rollouts",
    "total_attempts": "total_attempts",
    "total_spans": "total_spans",
    "total_resources": "total_resources",
    "total_workers": "total_workers",
    "rollouts_by_status": "rollouts_by_status",
    "uptime": "uptime_seconds",
    "total_span_bytes": "total_span_bytes",
    "evicted_spans": "evicted_spans",
    "dropped_rollouts": "dropped_rollouts",
    "eviction_threshold_bytes": "eviction_threshold_bytes",
    "safe_threshold_bytes": "safe_threshold_bytes",
    "memory_capacity_bytes": "memory_capacity_bytes",
    "attempts_by_status": "attempts_by_status",
    "oldest_queued_age": "oldest_queued_age_seconds",
    "expired_attempts": "expired_attempts",
}
_COUNTS_BY_STATUS = ("rollouts_by_status", "attempts_by_status", "expired_attempts")


def page_to_proto(
    *, limit: int = NO_LIMIT, offset: int = 0, sort_by: str | None = None, sort_order: SortOrder = "asc"
) -> service_pb2.Page:
    """Encode which part of a result is wanted, in which order. Raises `TypeError` or `ValueError` for a bad value."""
    order = SORT_ORDER.to_number(sort_order, "sort_order")
    return build(service_pb2.Page, limit=limit, offset=offset, sort_by=sort_by, sort_order=order)


def page_from_proto(page: service_pb2.Page) -> dict[str, Any]:
    """The keyword arguments `limit`, `offset`, `sort_by` and `sort_order` for the store's queries.

    Raises:
        ValueError: An unknown order.
    """
    ordered = page.sort_order != service_pb2.SORT_ORDER_UNSPECIFIED
    return {
        "limit": page.limit if page.HasField("limit") else NO_LIMIT,
        "offset": page.offset,
        "sort_by": page.sort_by if page.HasField("sort_by") else None,
        "sort_order": SORT_ORDER.to_word(page.sort_order, "Page.sort_order") if ordered else "asc",
    }


def page_info_to_proto(result: PaginatedResult[Any]) -> service_pb2.PageInfo:
    """Encode what a result says about itself."""
    return build(service_pb2.PageInfo, total=result.total, limit=result.limit, offset=result.offset)


def result_from_proto(info: service_pb2.PageInfo, items: list[T]) -> PaginatedResult[T]:
    """Put the items and what is said about them back together."""
    fields = {"items": items, "limit": info.limit, "offset": info.offset, "total": info.total}
    return construct(PaginatedResult, fields)


def capabilities_to_proto(capabilities: LightningStoreCapabilities) -> service_pb2.Capabilities:
    """Encode a store's capabilities. One that the store does not mention is false."""
    return build(service_pb2.Capabilities, **{key: value for key, value in capabilities.items() if value})


def capabilities_from_proto(message: service_pb2.Capabilities) -> LightningStoreCapabilities:
    """Decode a store's capabilities."""
    return LightningStoreCapabilities(
        thread_safe=message.thread_safe,
        async_safe=message.async_safe,
        zero_copy=message.zero_copy,
        otlp_traces=message.otlp_traces,
    )


def statistics_to_proto(statistics: LightningStoreStatistics) -> service_pb2.GetStatisticsResponse:
    """Encode a store's statistics; keys that the message has no field for go along as JSON.

    Raises:
        TypeError, ValueError: A value cannot be encoded; the message names it.
    """
    values: dict[str, Any] = dict(statistics)
    known = {field: values.pop(key) for key, field in _STATISTICS_FIELDS.items() if key in values}
    return build(
        service_pb2.GetStatisticsResponse, **known, extra_json=encode_object(values or None, "statistics")
    )


def statistics_from_proto(message: service_pb2.GetStatisticsResponse) -> LightningStoreStatistics:
    """Decode a store's statistics. Raises `ValueError` if the further ones are no JSON object."""
    fields: Message = message
    statistics: dict[str, Any] = {}
    if message.HasField("extra_json"):
        statistics.update(decode_object(message.extra_json, "GetStatisticsResponse.extra_json"))
    for key, field in _STATISTICS_FIELDS.items():
        if field in _COUNTS_BY_STATUS:
            counts = dict(getattr(message, field))
            if counts or field == "rollouts_by_status":
                statistics[key] = counts
        elif field == "name" or fields.HasField(field):
            statistics[key] = getattr(message, field)
    return cast(LightningStoreStatistics, statistics)  # which may have keys of the store's own


def event_to_proto(event: RolloutEvent) -> service_pb2.WatchRolloutsResponse:
    """What one event of a watch becomes."""
    message = service_pb2.RolloutEvent(revision=event.revision, rollout=rollout_to_proto(event.rollout))
    return service_pb2.WatchRolloutsResponse(events=[message], progress_revision=event.progress_revision)


def events_from_proto(response: service_pb2.WatchRolloutsResponse, progress: int) -> list[RolloutEvent]:
    """The events of a message, of which the last one makes the message's progress, the others `progress`."""
    events = [
        RolloutEvent.model_construct(
            rollout=rollout_from_proto(message.rollout), revision=message.revision, progress_revision=progress
        )
        for message in response.events
    ]
    if events:
        events[-1].progress_revision = response.progress_revision
    return events
