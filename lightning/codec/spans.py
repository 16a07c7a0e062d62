"""Spans to messages and back. The hot path: an LLM agent makes thousands of these."""

from __future__ import annotations

from typing import Any

from lightningpb.v1 import span_pb2

from lightning.codec.attributes import check_attributes, may_be_too_deep, read_attributes, write_attributes
from lightning.codec.building import build, construct, decode_object, encode_object
from lightning.codec.enums import SPAN_STATUS_CODE
from lightning.types import Event, Link, OtelResource, Span, SpanContext, TraceStatus

_OWN_FIELDS = (
    "rollout_id",
    "attempt_id",
    "sequence_id",
    "trace_id",
    "span_id",
    "parent_id",
    "name",
    "start_time",
    "end_time",
)


def span_to_proto(span: Span) -> span_pb2.Span:
    """Encode a span.

    Raises:
        TypeError: An attribute of a type that OpenTelemetry does not have, or a further field of one that JSON does not
            have; the message names the path, as `attributes["a"][3]`.
        ValueError: A value of a type that fits but that cannot be stored, such as an integer of more than 64 bits.
    """
    message = span_pb2.Span()
    _write_own_fields(message, span)
    status = span.status
    message.status.code = SPAN_STATUS_CODE.to_number(status.status_code, "status.status_code")
    if status.description is not None:
        message.status.MergeFrom(build(span_pb2.SpanStatus, description=status.description))
    write_attributes(message.attributes, span.attributes, "attributes")
    if span.events:
        message.events.extend(
            [_event_to_proto(event, f"events[{index}]") for index, event in enumerate(span.events)]
        )
    if span.links:
        message.links.extend(
            [_link_to_proto(link, f"links[{index}]") for index, link in enumerate(span.links)]
        )
    if span.context is not None:
        _write_context(message.context, span.context)
    if span.parent is not None:
        _write_context(message.parent, span.parent)
    resource = span.resource
    if resource.attributes:
        write_attributes(message.resource.attributes, resource.attributes, "resource.attributes")
    if resource.schema_url:
        message.resource.MergeFrom(build(span_pb2.OtelResource, schema_url=resource.schema_url))
    return message


def _write_own_fields(message: span_pb2.Span, span: Span) -> None:
    """What a span has besides its parts: each field set by itself, which is the fastest way."""
    try:
        message.rollout_id = span.rollout_id
        message.attempt_id = span.attempt_id
        message.sequence_id = span.sequence_id
        message.trace_id = span.trace_id
        message.span_id = span.span_id
        message.name = span.name
        if span.parent_id is not None:
            message.parent_id = span.parent_id
        if span.start_time is not None:
            message.start_time = span.start_time
        if span.end_time is not None:
            message.end_time = span.end_time
    except (TypeError, ValueError):  # build says which of them it was
        message.MergeFrom(build(span_pb2.Span, **{name: getattr(span, name) for name in _OWN_FIELDS}))
    extra = encode_object(span.model_extra or None, "span")
    if extra is not None:
        message.extra_json = extra
    _check_sequence_id(message.sequence_id)


def span_from_proto(message: span_pb2.Span) -> Span:
    """Decode a span.

    Raises:
        ValueError: A field holds what no span may have, such as a negative `sequence_id` or an unknown status code.
    """
    has = message.HasField
    _check_sequence_id(message.sequence_id)
    return construct(
        Span,
        {
            "rollout_id": message.rollout_id,
            "attempt_id": message.attempt_id,
            "sequence_id": message.sequence_id,
            "trace_id": message.trace_id,
            "span_id": message.span_id,
            "parent_id": message.parent_id if has("parent_id") else None,
            "name": message.name,
            "status": _read_status(message.status) if has("status") else TraceStatus(),
            "attributes": read_attributes(message.attributes),
            # most have none, and to loop over none costs more than to look
            "events": [_read_event(event) for event in events] if (events := message.events) else [],
            "links": [_read_link(link) for link in links] if (links := message.links) else [],
            "start_time": message.start_time if has("start_time") else None,
            "end_time": message.end_time if has("end_time") else None,
            "context": _read_context(message.context) if has("context") else None,
            "parent": _read_context(message.parent) if has("parent") else None,
            "resource": _read_resource(message.resource)
            if has("resource")
            else construct(OtelResource, {"attributes": {}, "schema_url": ""}),
        },
        extra=_read_extra(message.extra_json) if has("extra_json") else {},
    )


def check_span(message: span_pb2.Span, encoded: bytes) -> None:
    """Check that `span_from_proto` will take a message, and `span_to_proto` what it makes of it, without making it.

    Args:
        message: The message.
        encoded: The same, serialised.

    Raises:
        ValueError: It would not; the message says why.
    """
    has = message.HasField
    _check_sequence_id(message.sequence_id)
    if has("status"):
        SPAN_STATUS_CODE.to_word(message.status.code, "Span.status.code")
    if has("extra_json"):
        encode_object(_read_extra(message.extra_json), "span")
    if may_be_too_deep(encoded):
        _check_depths(message)


def _check_depths(message: span_pb2.Span) -> None:
    check_attributes(message.attributes, "attributes")
    for event in message.events:
        check_attributes(event.attributes, "events.attributes")
    for link in message.links:
        check_attributes(link.attributes.attributes, "links.attributes")
    check_attributes(message.resource.attributes, "resource.attributes")


def encode_span(span: Span) -> bytes:
    """A span as bytes, to keep. Raises as `span_to_proto`."""
    return span_to_proto(span).SerializeToString()


def encode_span_ids(rollout_id: str, attempt_id: str) -> bytes:
    """What the spans of an attempt begin with, as `encode_span` writes them."""
    return span_pb2.Span(rollout_id=rollout_id, attempt_id=attempt_id).SerializeToString()


def parse_span(data: bytes, sequence_id: int) -> span_pb2.Span:
    """The message of `encode_span`, under the number that the span was given when it was stored."""
    message = span_pb2.Span.FromString(data)
    message.sequence_id = sequence_id
    return message


def renumber_span(data: bytes, sequence_id: int) -> bytes:
    """What `parse_span` reads, still encoded: of a field that is there twice, the later counts."""
    return data + span_pb2.Span(sequence_id=sequence_id).SerializeToString()


def decode_span(data: bytes, sequence_id: int) -> Span:
    """The span of `parse_span`. Raises as `span_from_proto`."""
    return span_from_proto(parse_span(data, sequence_id))


def _check_sequence_id(sequence_id: int) -> None:
    if sequence_id < 0:
        raise ValueError(f"Span.sequence_id is negative: {sequence_id}")


def _read_extra(data: bytes) -> dict[str, Any]:
    extra = decode_object(data, "Span.extra_json")
    taken = extra.keys() & Span.model_fields.keys()
    if taken:
        raise ValueError(f"Span.extra_json holds {', '.join(sorted(taken))}, which the span has fields for")
    return extra


def _read_status(source: span_pb2.SpanStatus) -> TraceStatus:
    return construct(
        TraceStatus,
        {
            "status_code": SPAN_STATUS_CODE.to_word(source.code, "Span.status.code"),
            "description": source.description if source.HasField("description") else None,
        },
    )


def _read_resource(source: span_pb2.OtelResource) -> OtelResource:
    return construct(
        OtelResource,
        {"attributes": read_attributes(source.attributes), "schema_url": source.schema_url},
    )


def _event_to_proto(event: Event, path: str) -> span_pb2.SpanEvent:
    message = build(span_pb2.SpanEvent, name=event.name, timestamp=event.timestamp)
    write_attributes(message.attributes, event.attributes, f"{path}.attributes")
    return message


def _read_event(source: span_pb2.SpanEvent) -> Event:
    return construct(
        Event,
        {
            "name": source.name,
            "attributes": read_attributes(source.attributes),
            "timestamp": source.timestamp if source.HasField("timestamp") else None,
        },
    )


def _link_to_proto(link: Link, path: str) -> span_pb2.SpanLink:
    message = span_pb2.SpanLink()
    _write_context(message.context, link.context)
    if link.attributes is not None:
        message.attributes.SetInParent()
        write_attributes(message.attributes.attributes, link.attributes, f"{path}.attributes")
    return message


def _read_link(source: span_pb2.SpanLink) -> Link:
    attributes = read_attributes(source.attributes.attributes) if source.HasField("attributes") else None
    return construct(Link, {"context": _read_context(source.context), "attributes": attributes})


def _write_context(target: span_pb2.SpanContext, context: SpanContext) -> None:
    try:
        target.trace_id = context.trace_id
        target.span_id = context.span_id
        target.is_remote = context.is_remote
    except (TypeError, ValueError):  # as above
        names = ("trace_id", "span_id", "is_remote")
        target.MergeFrom(build(span_pb2.SpanContext, **{name: getattr(context, name) for name in names}))
    for key, value in context.trace_state.items():
        target.trace_state.append(build(span_pb2.TraceStateEntry, key=key, value=value))


def _read_context(source: span_pb2.SpanContext) -> SpanContext:
    return construct(
        SpanContext,
        {
            "trace_id": source.trace_id,
            "span_id": source.span_id,
            "is_remote": source.is_remote,
            "trace_state": {entry.key: entry.value for entry in entries}
            if (entries := source.trace_state)
            else {},
        },
    )
