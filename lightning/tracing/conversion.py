"""Spans of the OpenTelemetry SDK to the store's spans and back, without loss.

What the store's span has no field for is kept among its further fields: `kind`, `instrumentation_scope`, what was
dropped, the exact nanoseconds (today's time in seconds, as a float, is exact to about 240 of them only), trace flags
other than "sampled", and every public field that a subclass of `ReadableSpan` adds, if JSON can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as OtelEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link as OtelLink
from opentelemetry.trace import SpanContext as OtelSpanContext
from opentelemetry.trace import SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from lightning.codec.building import construct
from lightning.codec.opentelemetry import SAMPLED, exact_fields, scope_fields, to_nanoseconds, to_seconds
from lightning.types import (
    Attributes,
    Event,
    Link,
    OtelResource,
    Span,
    SpanContext,
    TraceStatus,
    to_json_value,
)

_EXACT = (
    "start_time_ns",
    "end_time_ns",
    "event_times_ns",
    "trace_flags",
    "parent_trace_flags",
    "link_trace_flags",
    "dropped_attributes",
    "dropped_events",
    "dropped_links",
    "event_dropped_attributes",
    "link_dropped_attributes",
)
"""Further fields of a span that only the way back needs; absent where they would say nothing."""
_KEPT = frozenset({*_EXACT, "kind", "instrumentation_scope"})


def span_from_opentelemetry(source: ReadableSpan, rollout_id: str, attempt_id: str, sequence_id: int) -> Span:
    """Convert a span of the SDK. See `Span.from_opentelemetry`."""
    context = source.context
    if context is None:
        raise ValueError(f"the span {source.name!r} has no context, hence no ids")
    parent = source.parent
    extra: dict[str, Any] = {"kind": source.kind.name}
    scope = source.instrumentation_scope
    if scope is not None:
        extra["instrumentation_scope"] = scope_fields(
            scope.name, scope.version, scope.schema_url, _attributes(scope.attributes)
        )
    extra.update(_exact(source))
    _keep_public_fields(extra, source)
    fields = {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence_id": sequence_id,
        "trace_id": _trace_id(context),
        "span_id": _span_id(context),
        "parent_id": None if parent is None else _span_id(parent),
        "name": source.name,
        "status": _status(source.status),
        "attributes": _attributes(source.attributes),
        "events": [_event(event) for event in source.events],
        "links": [_link(link) for link in source.links],
        "start_time": to_seconds(source.start_time),
        "end_time": to_seconds(source.end_time),
        "context": _context(context),
        "parent": None if parent is None else _context(parent),
        "resource": _resource(source.resource),
    }
    return construct(Span, fields, extra)


def span_to_opentelemetry(span: Span) -> ReadableSpan:
    """Convert a span of the store. See `Span.to_opentelemetry`."""
    extra: Mapping[str, Any] = span.model_extra or {}
    own = SpanContext(trace_id=span.trace_id, span_id=span.span_id) if span.context is None else span.context
    parent = span.parent
    if parent is None and span.parent_id is not None:
        parent = SpanContext(trace_id=span.trace_id, span_id=span.parent_id)
    result = ReadableSpan(
        name=span.name,
        context=_otel_context(own, extra.get("trace_flags", SAMPLED)),
        parent=None if parent is None else _otel_context(parent, extra.get("parent_trace_flags", SAMPLED)),
        resource=Resource(_otel_attributes(span.resource.attributes), span.resource.schema_url),
        attributes=_bounded(span.attributes, extra.get("dropped_attributes", 0)),
        events=_bounded_list(_otel_events(span.events, extra), extra.get("dropped_events", 0)),
        links=_bounded_list(_otel_links(span.links, extra), extra.get("dropped_links", 0)),
        kind=SpanKind.__members__.get(extra.get("kind", ""), SpanKind.INTERNAL),
        status=_otel_status(span.status),
        start_time=_nanoseconds(span.start_time, extra.get("start_time_ns")),
        end_time=_nanoseconds(span.end_time, extra.get("end_time_ns")),
        instrumentation_scope=_otel_scope(extra.get("instrumentation_scope")),
    )
    for name, value in extra.items():
        if name not in _KEPT:
            setattr(result, name, value)
    return result


# --- From OpenTelemetry ----------------------------------------------------------------------------------------


def _trace_id(context: OtelSpanContext) -> str:
    return format(context.trace_id, "032x")


def _span_id(context: OtelSpanContext) -> str:
    return format(context.span_id, "016x")


def _context(context: OtelSpanContext) -> SpanContext:
    fields = {
        "trace_id": _trace_id(context),
        "span_id": _span_id(context),
        "is_remote": context.is_remote,
        "trace_state": dict(context.trace_state),
    }
    return construct(SpanContext, fields)


def _event(event: OtelEvent) -> Event:
    fields = {
        "name": event.name,
        "attributes": _attributes(event.attributes),
        "timestamp": to_seconds(event.timestamp),
    }
    return construct(Event, fields)


def _link(link: OtelLink) -> Link:
    attributes = None if link.attributes is None else _attributes(link.attributes)
    return construct(Link, {"context": _context(link.context), "attributes": attributes})


def _resource(resource: Resource) -> OtelResource:
    fields = {"attributes": _attributes(resource.attributes), "schema_url": resource.schema_url}
    return construct(OtelResource, fields)


def _status(status: Status) -> TraceStatus:
    fields = {"status_code": status.status_code.name, "description": status.description}
    return construct(TraceStatus, fields)


def _attributes(attributes: Mapping[str, Any] | None) -> Attributes:
    """A copy in which sequences are lists, as they are in the store."""
    return {} if not attributes else {key: _with_lists(value) for key, value in attributes.items()}


def _with_lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_with_lists(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _with_lists(item) for key, item in value.items()}
    return value


def _exact(source: ReadableSpan) -> dict[str, Any]:
    """What the span's own fields would lose."""
    context, parent, events, links = source.context, source.parent, source.events, source.links
    assert context is not None
    return exact_fields(
        times_ns=(source.start_time, source.end_time),
        event_times_ns=[event.timestamp for event in events],
        dropped={
            "attributes": source.dropped_attributes,
            "events": source.dropped_events,
            "links": source.dropped_links,
        },
        event_dropped_attributes=[event.dropped_attributes for event in events],
        link_dropped_attributes=[link.dropped_attributes for link in links],
        trace_flags=int(context.trace_flags),
        parent_trace_flags=SAMPLED if parent is None else int(parent.trace_flags),
        link_trace_flags=[int(link.context.trace_flags) for link in links],
    )


def _keep_public_fields(extra: dict[str, Any], source: ReadableSpan) -> None:
    for name, value in vars(source).items():
        if name.startswith("_") or name in Span.model_fields or name in _KEPT:
            continue
        try:
            extra[name] = to_json_value(value, name)
        except (TypeError, ValueError):
            continue  # only what JSON can hold is promised to survive


# --- To OpenTelemetry ------------------------------------------------------------------------------------------


def _otel_context(context: SpanContext, flags: int) -> OtelSpanContext:
    return OtelSpanContext(
        trace_id=int(context.trace_id, 16),
        span_id=int(context.span_id, 16),
        is_remote=context.is_remote,
        trace_flags=TraceFlags(flags),
        trace_state=TraceState(list(context.trace_state.items())),
    )


def _otel_status(status: TraceStatus) -> Status:
    # a description belongs to an error; the SDK warns of any other
    return Status(
        StatusCode[status.status_code], status.description if status.status_code == "ERROR" else None
    )


def _nanoseconds(seconds: float | None, exact: int | None) -> int | None:
    """`exact` if that is what `seconds` was made from and stands for still, else what `seconds` says."""
    if seconds is None or (exact is not None and to_seconds(exact) == seconds):
        return None if seconds is None else exact
    return to_nanoseconds(seconds)


def _otel_attributes(attributes: Attributes) -> dict[str, Any]:
    return {key: _with_tuples(value) for key, value in attributes.items()}


def _with_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return value


def _bounded(attributes: Attributes, dropped: int) -> Mapping[str, Any]:
    values = _otel_attributes(attributes)
    if not dropped:
        return values  # as they are: older releases of the SDK's own container refuse nested ones
    result = BoundedAttributes(attributes=values)
    result.dropped += dropped
    return result


def _bounded_list(items: list[Any], dropped: int) -> Sequence[Any]:
    result = BoundedList.from_seq(None, items)
    result.dropped = dropped
    return result


def _otel_events(events: Sequence[Event], extra: Mapping[str, Any]) -> list[OtelEvent]:
    times = _aligned(extra, "event_times_ns", len(events), None)
    dropped = _aligned(extra, "event_dropped_attributes", len(events), 0)
    return [
        OtelEvent(event.name, _bounded(event.attributes, lost), _nanoseconds(event.timestamp, time) or 0)
        for event, time, lost in zip(events, times, dropped, strict=True)
    ]


def _otel_links(links: Sequence[Link], extra: Mapping[str, Any]) -> list[OtelLink]:
    flags = _aligned(extra, "link_trace_flags", len(links), SAMPLED)
    dropped = _aligned(extra, "link_dropped_attributes", len(links), 0)
    return [
        OtelLink(
            _otel_context(link.context, flag),
            None if link.attributes is None else _bounded(link.attributes, lost),
        )
        for link, flag, lost in zip(links, flags, dropped, strict=True)
    ]


def _aligned(extra: Mapping[str, Any], name: str, length: int, default: Any) -> list[Any]:
    """The values kept for each event or link; defaults if they were changed since and no longer fit."""
    values = extra.get(name)
    return values if isinstance(values, list) and len(values) == length else [default] * length


def _otel_scope(fields: Mapping[str, Any] | None) -> InstrumentationScope | None:
    if fields is None:
        return None
    return InstrumentationScope(
        fields["name"],
        fields.get("version", ""),
        fields.get("schema_url", ""),
        _otel_attributes(fields["attributes"]) if "attributes" in fields else None,
    )
