"""Batches of spans put together from spans that are encoded already: what a client keeps and sends is bytes."""

from __future__ import annotations

from collections.abc import Iterable

from lightningpb.v1 import store_service_pb2 as pb

_LENGTH_DELIMITED = 2
_REQUEST_FIELD = pb.StreamSpansRequest.BATCH_FIELD_NUMBER
_SPANS_FIELD = pb.StreamSpansRequest.Batch.SPANS_FIELD_NUMBER


def batch_request(batch_sequence: int, spans: Iterable[bytes]) -> bytes:
    """A serialised `StreamSpansRequest` with a batch. Copies each span once, and parses none."""
    parts = [pb.StreamSpansRequest.Batch(batch_sequence=batch_sequence).SerializeToString()]
    for span in spans:
        parts.append(_header(_SPANS_FIELD, len(span)))
        parts.append(span)
    return _header(_REQUEST_FIELD, sum(map(len, parts))) + b"".join(parts)


def _header(field: int, length: int) -> bytes:
    """What stands before a message within a message: the field, and how many bytes follow."""
    header = bytearray([field << 3 | _LENGTH_DELIMITED])
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return bytes(header)
