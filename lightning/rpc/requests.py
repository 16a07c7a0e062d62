"""Requests as the server reads them: the message, and of its spans also the bytes that they came as.

A store that keeps spans encoded would otherwise encode again what was parsed a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from lightningpb.v1 import span_pb2
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec

_ADDED_FIELD = pb.AddSpansRequest.SPANS_FIELD_NUMBER
_BATCH_FIELD = pb.StreamSpansRequest.BATCH_FIELD_NUMBER
_BATCHED_FIELD = pb.StreamSpansRequest.Batch.SPANS_FIELD_NUMBER


class ReceivedSpans(NamedTuple):
    """Spans of a request, each of them twice."""

    messages: Sequence[span_pb2.Span]
    encoded: Sequence[bytes]
    """What each message was parsed from."""


class AddedSpans(NamedTuple):
    """An `AddSpansRequest`."""

    request_id: str
    spans: ReceivedSpans


class SpanBatch(NamedTuple):
    """A `StreamSpansRequest.Batch`."""

    batch_sequence: int
    spans: ReceivedSpans
    size_bytes: int
    """How much came on the wire."""


def reader(of: ServiceDescriptor, method: str) -> Callable[[bytes], Any]:
    """What reads the serialised requests of a method: messages, but for those above. It raises `ValueError` for what is
    no such request."""
    request_class = GetMessageClass(of.methods_by_name[method].input_type)
    return _READERS.get(request_class) or (lambda data: _parse(request_class, data))


def _read_added(data: bytes) -> AddedSpans:
    request = _parse(pb.AddSpansRequest, data)
    return AddedSpans(request.request_id, _received(request.spans, codec.items_in(data, _ADDED_FIELD)))


def _read_streamed(data: bytes) -> SpanBatch | pb.StreamSpansRequest.Open | None:
    request = _parse(pb.StreamSpansRequest, data)
    if request.HasField("open"):
        return request.open  # type: ignore[no-any-return]
    if not request.HasField("batch"):
        return None
    batch = b"".join(codec.items_in(data, _BATCH_FIELD))
    spans = _received(request.batch.spans, codec.items_in(batch, _BATCHED_FIELD))
    return SpanBatch(request.batch.batch_sequence, spans, len(data))


def _received(messages: Sequence[span_pb2.Span], encoded: Sequence[bytes]) -> ReceivedSpans:
    # of a member of a oneof, nothing counts that stands before another member
    if len(messages) != len(encoded):
        raise ValueError("the request holds another message before its batch")
    return ReceivedSpans(messages[:], encoded)


_READERS: dict[type[Message], Callable[[bytes], Any]] = {
    pb.AddSpansRequest: _read_added,
    pb.StreamSpansRequest: _read_streamed,
}


def _parse(request_class: type[Message], data: bytes) -> Any:
    try:
        return request_class.FromString(data)
    except DecodeError:
        raise ValueError(f"the request is not a {request_class.DESCRIPTOR.full_name}") from None
