"""Spans to messages and back. The hot path: an LLM agent makes thousands of these."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, Protocol

from lightningpb.v1 import span_pb2

from lightning.codec.attributes import check_attributes, read_attributes, write_attributes
from lightning.codec.building import ModelT, build, construct, decode_object, encode_object
from lightning.codec.enums import SPAN_STATUS_CODE
from lightning.types import Event, Link, OtelResource, Span, SpanContext, TraceStatus

_TEXT = frozenset({str})
_OPTIONAL_TEXT = frozenset({str, NoneType})
_OPTIONAL_TIME = frozenset({float, NoneType})
_SCALARS = frozenset({str, bool, int, float, bytes, NoneType})


def span_to_proto(span: Span) -> span_pb2.Span:
    """Encode a span.

    Raises:
        TypeError: An attribute of a type that OpenTelemetry does not have, or a further field of one that JSON does not
            have; the message names the path, as `attributes["a"][3]`.
        ValueError: A value of a type that fits but that cannot be stored, such as an integer of more than 64 bits.
    """
    message = build(
        span_pb2.Span,
        rollout_id=span.rollout_id,
        attempt_id=span.attempt_id,
        sequence_id=span.sequence_id,
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_id=span.parent_id,
        name=span.name,
        start_time=span.start_time,
        end_time=span.end_time,
        extra_json=encode_object(span.model_extra or None, "span"),
    )
    _check_sequence_id(message.sequence_id)
    message.status.code = SPAN_STATUS_CODE.to_number(span.status.status_code, "status.status_code")
    if span.status.description is not None:
        message.status.MergeFrom(build(span_pb2.SpanStatus, description=span.status.description))
    write_attributes(message.attributes, span.attributes, "attributes")
    for index, event in enumerate(span.events):
        message.events.append(_event_to_proto(event, f"events[{index}]"))
    for index, link in enumerate(span.links):
        message.links.append(_link_to_proto(link, f"links[{index}]"))
    if span.context is not None:
        message.context.MergeFrom(_context_to_proto(span.context))
    if span.parent is not None:
        message.parent.MergeFrom(_context_to_proto(span.parent))
    write_attributes(message.resource.attributes, span.resource.attributes, "resource.attributes")
    if span.resource.schema_url:
        message.resource.MergeFrom(build(span_pb2.OtelResource, schema_url=span.resource.schema_url))
    return message


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
            "status": _read_status(message),
            "attributes": read_attributes(message.attributes),
            "events": [_read_event(event) for event in message.events],
            "links": [_read_link(link) for link in message.links],
            "start_time": message.start_time if has("start_time") else None,
            "end_time": message.end_time if has("end_time") else None,
            "context": _read_context(message.context) if has("context") else None,
            "parent": _read_context(message.parent) if has("parent") else None,
            "resource": construct(
                OtelResource,
                {
                    "attributes": read_attributes(message.resource.attributes),
                    "schema_url": message.resource.schema_url,
                },
            ),
        },
        extra=_read_extra(message.extra_json) if has("extra_json") else {},
    )


def check_span(message: span_pb2.Span) -> None:
    """Check that `span_from_proto` will take a message, and `span_to_proto` what it makes of it, without making it.

    Raises:
        ValueError: It would not; the message says why.
    """
    has = message.HasField
    _check_sequence_id(message.sequence_id)
    if has("status"):
        SPAN_STATUS_CODE.to_word(message.status.code, "Span.status.code")
    if has("extra_json"):
        encode_object(_read_extra(message.extra_json), "span")
    check_attributes(message.attributes, "attributes")
    for event in message.events:
        check_attributes(event.attributes, "events.attributes")
    for link in message.links:
        check_attributes(link.attributes.attributes, "links.attributes")
    if has("resource"):
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


def decode_span(data: bytes, sequence_id: int) -> Span:
    """The span of `parse_span`. Raises as `span_from_proto`."""
    return span_from_proto(parse_span(data, sequence_id))


def copy_span(span: Span) -> Span | None:
    """What `decode_span` makes of what `encode_span` makes of a span, several times as fast; None if the span is not as
    plain as most are, and only they can tell. To be asked of spans that can be encoded."""
    status, context, resource = span.status, span.context, span.resource
    if (
        type(span) is not Span
        or span.__pydantic_extra__
        or span.events
        or span.links
        or span.parent is not None
        or (context is not None and (context.trace_state or type(context.is_remote) is not bool))
    ):
        return None
    texts = [span.rollout_id, span.attempt_id, span.trace_id, span.span_id, span.name, status.status_code]
    texts += (resource.schema_url, *span.attributes, *resource.attributes)
    if context is not None:
        texts += (context.trace_id, context.span_id)
    if (
        not _TEXT.issuperset(map(type, texts))
        or not _OPTIONAL_TEXT.issuperset((type(span.parent_id), type(status.description)))
        or not _OPTIONAL_TIME.issuperset((type(span.start_time), type(span.end_time)))
        or not _SCALARS.issuperset(map(type, span.attributes.values()))
        or not _SCALARS.issuperset(map(type, resource.attributes.values()))
    ):
        return None
    fields = span.__dict__.copy()
    fields["status"] = _copy(TraceStatus, status)
    fields["attributes"] = dict(span.attributes)
    fields["events"] = []
    fields["links"] = []
    if context is not None:
        fields["context"] = _copy(SpanContext, context, trace_state={})
    fields["resource"] = _copy(OtelResource, resource, attributes=dict(resource.attributes))
    return construct(Span, fields, extra={})


def _copy(model: type[ModelT], record: ModelT, **changed: Any) -> ModelT:
    return construct(model, {**record.__dict__, **changed})


class Receipt(Protocol):
    """What became of a span that was handed in, in whatever form."""

    @property
    def sequence_id(self) -> int:
        """Its number."""

    @property
    def stored(self) -> bool:
        """False: there was one with its id."""


def numbered(spans: Sequence[Span], receipts: Sequence[Receipt]) -> list[Span]:
    """Those of `spans` that were stored, under their numbers."""
    stored = []
    for span, receipt in zip(spans, receipts, strict=True):
        if receipt.stored:
            span.sequence_id = receipt.sequence_id
            stored.append(span)
    return stored


def _check_sequence_id(sequence_id: int) -> None:
    if sequence_id < 0:
        raise ValueError(f"Span.sequence_id is negative: {sequence_id}")


def _read_extra(data: bytes) -> dict[str, Any]:
    extra = decode_object(data, "Span.extra_json")
    taken = extra.keys() & Span.model_fields.keys()
    if taken:
        raise ValueError(f"Span.extra_json holds {', '.join(sorted(taken))}, which the span has fields for")
    return extra


def _read_status(message: span_pb2.Span) -> TraceStatus:
    if not message.HasField("status"):
        return TraceStatus()
    status = message.status
    return construct(
        TraceStatus,
        {
            "status_code": SPAN_STATUS_CODE.to_word(status.code, "Span.status.code"),
            "description": status.description if status.HasField("description") else None,
        },
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
    message = span_pb2.SpanLink(context=_context_to_proto(link.context))
    if link.attributes is not None:
        message.attributes.SetInParent()
        write_attributes(message.attributes.attributes, link.attributes, f"{path}.attributes")
    return message


def _read_link(source: span_pb2.SpanLink) -> Link:
    attributes = read_attributes(source.attributes.attributes) if source.HasField("attributes") else None
    return construct(Link, {"context": _read_context(source.context), "attributes": attributes})


def _context_to_proto(context: SpanContext) -> span_pb2.SpanContext:
    return build(
        span_pb2.SpanContext,
        trace_id=context.trace_id,
        span_id=context.span_id,
        is_remote=context.is_remote,
        trace_state=[
            build(span_pb2.TraceStateEntry, key=key, value=value)
            for key, value in context.trace_state.items()
        ],
    )


def _read_context(source: span_pb2.SpanContext) -> SpanContext:
    return construct(
        SpanContext,
        {
            "trace_id": source.trace_id,
            "span_id": source.span_id,
            "is_remote": source.is_remote,
            "trace_state": {entry.key: entry.value for entry in source.trace_state},
        },
    )
