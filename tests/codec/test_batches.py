"""What is put together from encoded parts is what protobuf reads as a whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightningpb.v1 import span_pb2
from lightningpb.v1 import store_service_pb2 as pb

from lightning.codec import batch_request, chunked, items_in, span_from_proto
from lightning.codec.spans import parse_span, renumber_span

_SPANS = pb.QuerySpansResponse.DESCRIPTOR.fields_by_name["spans"].number
_SIZES = st.sampled_from([0, 1, 100, 127, 128, 129, 16_383, 16_384]) | st.integers(0, 40_000)


def spans_of(sizes: list[int]) -> list[span_pb2.Span]:
    return [span_pb2.Span(name="x" * size, sequence_id=number) for number, size in enumerate(sizes)]


@given(st.lists(_SIZES, max_size=5), st.integers(1, 50_000))
def test_items_arrive_in_messages_of_at_most_so_many_bytes(sizes: list[int], limit_bytes: int) -> None:
    spans = spans_of(sizes)
    start = pb.QuerySpansResponse(page_info=pb.PageInfo(total=7)).SerializeToString()
    encoded = chunked(start, _SPANS, [span.SerializeToString() for span in spans], limit_bytes)
    first, *others = [pb.QuerySpansResponse.FromString(data) for data in encoded]
    assert first.page_info.total == 7
    assert not any(message.HasField("page_info") for message in others)
    assert [span for message in (first, *others) for span in message.spans] == spans
    for message in (first, *others):
        assert len(message.spans) == 1 or sum(span.ByteSize() for span in message.spans) <= limit_bytes
        assert message.spans or not spans


@given(st.lists(_SIZES, max_size=5), st.integers(1, 50_000))
def test_items_are_taken_out_as_they_were_put_in(sizes: list[int], limit_bytes: int) -> None:
    encoded = [span.SerializeToString() for span in spans_of(sizes)]
    start = pb.QuerySpansResponse(page_info=pb.PageInfo(total=7)).SerializeToString()
    messages = chunked(start, _SPANS, encoded, limit_bytes)
    assert [item for data in messages for item in items_in(data, _SPANS)] == encoded


def test_items_are_left_as_they_are_whatever_is_in_them() -> None:
    items = [b"", b"\xff no message \xff", b"\x00"]
    (data,) = chunked(b"", _SPANS, items, 1000)
    assert items_in(data, _SPANS) == items
    assert items_in(data, _SPANS + 1) == []


def test_no_items_are_one_message() -> None:
    assert list(chunked(b"start", _SPANS, [], 1)) == [b"start"]


@given(st.lists(_SIZES, max_size=5), st.integers(0, 2**40))
def test_a_batch_is_read_as_it_was_meant(sizes: list[int], number: int) -> None:
    spans = spans_of(sizes)
    request = pb.StreamSpansRequest.FromString(
        batch_request(number, [span.SerializeToString() for span in spans])
    )
    assert request.batch == pb.StreamSpansRequest.Batch(batch_sequence=number, spans=spans)


@pytest.mark.parametrize("number", [1, 127, 128, 2**63 - 1])
def test_an_encoded_span_can_be_given_another_number(number: int) -> None:
    data = span_pb2.Span(sequence_id=5, name="n").SerializeToString()
    again = span_pb2.Span.FromString(renumber_span(data, number))
    assert again == parse_span(data, number)
    assert span_from_proto(again).sequence_id == number
