"""Spans as OTLP carries them to the store's spans, without loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from lightning.codec.building import construct
from lightning.codec.opentelemetry import SAMPLED, exact_fields, scope_fields, to_seconds
from lightning.types import Attributes, Event, Link, OtelResource, Span, SpanContext, TraceStatus

_TRACE_ID_BYTES = 16
_SPAN_ID_BYTES = 8

_TRACE_FLAGS = trace_pb2.SPAN_FLAGS_TRACE_FLAGS_MASK
_KNOWS_REMOTE = trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_IS_REMOTE = trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK

_KINDS = ("INTERNAL", "INTERNAL", "SERVER", "CLIENT", "PRODUCER", "CONSUMER")
"""By number; a kind that nobody stated is read as INTERNAL, as the protocol says."""
_STATUS_CODES = ("UNSET", "OK", "ERROR")


def resource_from_otlp(source: trace_pb2.ResourceSpans) -> OtelResource:
    """Decode what produced the spans."""
    attributes = read_any_attributes(source.resource.attributes)
    return construct(OtelResource, {"attributes": attributes, "schema_url": source.schema_url})


def scope_from_otlp(source: trace_pb2.ScopeSpans) -> dict[str, Any]:
    """Decode what is common to the spans of one tracer: further fields of each.

    Raises:
        TypeError: An attribute of the tracer that JSON does not have.
        ValueError: One that JSON cannot hold.
    """
    if not source.HasField("scope"):
        return {}
    scope = source.scope
    attributes = read_any_attributes(scope.attributes)
    return {"instrumentation_scope": scope_fields(scope.name, scope.version, source.schema_url, attributes)}


def span_from_otlp(
    source: trace_pb2.Span,
    *,
    rollout_id: str,
    attempt_id: str,
    sequence_id: int,
    resource: OtelResource,
    scope: dict[str, Any],
) -> Span:
    """Decode a span.

    Args:
        source: The span.
        rollout_id: Where it belongs, and
        attempt_id: to which attempt.
        sequence_id: Its place there; 0 has the store number it.
        resource: What produced it.
        scope: As `scope_from_otlp` gives it.

    Raises:
        ValueError: An id, the kind, the status or a trace state is not what the protocol allows.
    """
    trace_id = _hex_id(source.trace_id, _TRACE_ID_BYTES, "trace_id")
    span_id = _hex_id(source.span_id, _SPAN_ID_BYTES, "span_id")
    parent_id = (
        _hex_id(source.parent_span_id, _SPAN_ID_BYTES, "parent_span_id") if source.parent_span_id else None
    )
    fields = {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "sequence_id": sequence_id,
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": parent_id,
        "name": source.name,
        "status": _status(source.status),
        "attributes": read_any_attributes(source.attributes),
        "events": [_event(event) for event in source.events],
        "links": [_link(link) for link in source.links],
        "start_time": to_seconds(source.start_time_unix_nano or None),
        "end_time": to_seconds(source.end_time_unix_nano or None),
        "context": _context(trace_id, span_id, False, source.trace_state),
        "parent": _parent(trace_id, parent_id, source.flags),
        "resource": resource,
    }
    extra = {"kind": _word(_KINDS, source.kind, "kind"), **scope, **_exact(source)}
    return construct(Span, fields, extra)


def read_any_attributes(source: Iterable[common_pb2.KeyValue]) -> Attributes:
    """Decode attributes; of two with one key, the later counts."""
    return {attribute.key: _read_any(attribute.value) for attribute in source}


def _read_any(value: common_pb2.AnyValue) -> Any:
    member = value.WhichOneof("value")
    if member is None:
        return None
    if member == "array_value":
        return [_read_any(item) for item in value.array_value.values]
    if member == "kvlist_value":
        return read_any_attributes(value.kvlist_value.values)
    return getattr(value, member)


def _hex_id(value: bytes, length: int, name: str) -> str:
    if len(value) != length:
        raise ValueError(f"the {name} has {len(value)} bytes, not {length}")
    if not any(value):
        raise ValueError(f"the {name} is all zeros, which is no id")
    return value.hex()


def _word(words: tuple[str, ...], number: int, name: str) -> str:
    if not 0 <= number < len(words):
        raise ValueError(f"the {name} is {number}, which the protocol does not have")
    return words[number]


def _status(source: trace_pb2.Status) -> TraceStatus:
    word = _word(_STATUS_CODES, source.code, "status code")
    return construct(TraceStatus, {"status_code": word, "description": source.message or None})


def _event(source: trace_pb2.Span.Event) -> Event:
    fields = {
        "name": source.name,
        "attributes": read_any_attributes(source.attributes),
        "timestamp": to_seconds(source.time_unix_nano or None),
    }
    return construct(Event, fields)


def _link(source: trace_pb2.Span.Link) -> Link:
    context = _context(
        _hex_id(source.trace_id, _TRACE_ID_BYTES, "trace_id of a link"),
        _hex_id(source.span_id, _SPAN_ID_BYTES, "span_id of a link"),
        bool(source.flags & _IS_REMOTE),
        source.trace_state,
    )
    return construct(Link, {"context": context, "attributes": read_any_attributes(source.attributes)})


def _parent(trace_id: str, parent_id: str | None, flags: int) -> SpanContext | None:
    """The parent's context, where more of it is known than its id."""
    if parent_id is None or not flags & _KNOWS_REMOTE:
        return None
    return _context(trace_id, parent_id, bool(flags & _IS_REMOTE), "")


def _context(trace_id: str, span_id: str, is_remote: bool, trace_state: str) -> SpanContext:
    fields = {
        "trace_id": trace_id,
        "span_id": span_id,
        "is_remote": is_remote,
        "trace_state": _read_trace_state(trace_state),
    }
    return construct(SpanContext, fields)


def _read_trace_state(text: str) -> dict[str, str]:
    entries = [entry.strip(" \t") for entry in text.split(",") if entry.strip(" \t")]
    state = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    if len(state) != len(entries):
        raise ValueError(f"the trace state {text!r} is not a list of different keys with values")
    return state


def _exact(source: trace_pb2.Span) -> dict[str, Any]:
    return exact_fields(
        times_ns=(source.start_time_unix_nano, source.end_time_unix_nano),
        event_times_ns=[event.time_unix_nano for event in source.events],
        dropped={
            "attributes": source.dropped_attributes_count,
            "events": source.dropped_events_count,
            "links": source.dropped_links_count,
        },
        event_dropped_attributes=[event.dropped_attributes_count for event in source.events],
        link_dropped_attributes=[link.dropped_attributes_count for link in source.links],
        trace_flags=_trace_flags(source.flags),
        parent_trace_flags=SAMPLED,
        link_trace_flags=[_trace_flags(link.flags) for link in source.links],
    )


def _trace_flags(flags: int) -> int:
    """Many exporters leave these out. Only what is sampled is exported, so none at all means just that."""
    return flags & _TRACE_FLAGS or SAMPLED
