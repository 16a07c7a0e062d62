"""Messages put together from parts that are encoded already, and taken apart: each is copied once, and none parsed.

On the wire a message within a message is its field, its length and its bytes, and a repeated field is one such after
the other: https://protobuf.dev/programming-guides/encoding/#repeated
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from lightningpb.v1 import store_service_pb2 as pb

_LENGTH_DELIMITED = 2
_REQUEST_FIELD = pb.StreamSpansRequest.BATCH_FIELD_NUMBER
_SPANS_FIELD = pb.StreamSpansRequest.Batch.SPANS_FIELD_NUMBER


def batch_request(batch_sequence: int, spans: Iterable[bytes]) -> bytes:
    """A serialised `StreamSpansRequest` with a batch of serialised spans."""
    parts = [pb.StreamSpansRequest.Batch(batch_sequence=batch_sequence).SerializeToString()]
    for span in spans:
        parts += (_header(_SPANS_FIELD, len(span)), span)
    return _header(_REQUEST_FIELD, sum(map(len, parts))) + b"".join(parts)


def chunked(start: bytes, field: int, items: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    """Serialised messages that hold `items`, serialised too, in a repeated field.

    Args:
        start: What else the first of the messages holds, serialised.
        field: The number of the field.
        items: What to put there.
        limit_bytes: A message gets items of at most so many bytes, unless a single one is larger.

    Yields:
        At least one message.
    """
    parts: list[bytes] = []
    size_bytes = 0
    for item in items:
        if parts and size_bytes + len(item) > limit_bytes:
            yield b"".join((start, *parts))
            start, parts, size_bytes = b"", [], 0
        parts += (_header(field, len(item)), item)
        size_bytes += len(item)
    yield b"".join((start, *parts))


def items_in(data: bytes, field: int) -> list[bytes]:
    """The messages in a field of a serialised message, each of them serialised as it is there: what `chunked` puts in.

    Args:
        data: The serialised message, of any kind that protobuf has parsed.
        field: The number of a field of messages, repeated or not. Of one that is not, and there more than once all the
            same, protobuf merges the messages, which comes to the same as parsing them joined.
    """
    return list(_only(field).FromString(data).items)


@cache
def _only(field: int) -> Any:
    """A class of messages that have this field alone, and know no more of what is in it than its bytes."""
    name = f"Only{field}"
    file = FileDescriptorProto(name=f"lightning/only_{field}.proto", package="lightning", syntax="proto3")
    file.message_type.add(name=name).field.add(
        name="items",
        number=field,
        type=FieldDescriptorProto.TYPE_BYTES,
        label=FieldDescriptorProto.LABEL_REPEATED,
    )
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(f"lightning.{name}"))


@lru_cache(maxsize=4096)
def _header(field: int, length: int) -> bytes:
    """What stands before a message within a message: the field, and how many bytes follow."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
