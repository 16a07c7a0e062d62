"""Spans from clients that encode them by themselves: refused by name if no honest client would send them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from lightningpb.v1 import span_pb2
from lightningpb.v1 import store_service_pb2 as pb
from lightningpb.v1.store_service_pb2_grpc import LightningStoreServiceStub

from lightning import codec
from lightning.rpc import LightningStoreServer
from lightning.store import InMemoryLightningStore, LightningStoreThreaded
from lightning.testing import make_span

pytestmark = pytest.mark.anyio


def nest(span: span_pb2.Span, levels: int, *, by_map: bool) -> None:
    value = span.attributes.add(key="deep").value
    for _ in range(levels):
        if by_map:
            value = value.kvlist_value.attributes.add(key="k").value
        else:
            value = value.array_value.values.add()
    value.int_value = 1


BAD: dict[str, tuple[Callable[[span_pb2.Span], Any], str]] = {
    "a negative number": (lambda span: setattr(span, "sequence_id", -1), "sequence_id is negative"),
    "no status code": (lambda span: setattr(span.status, "code", 0), "status.code is not set"),
    "an unknown status code": (lambda span: setattr(span.status, "code", 99), "unknown enum number 99"),
    "extra that is no JSON": (lambda span: setattr(span, "extra_json", b"{"), "not valid JSON"),
    "extra that is no object": (lambda span: setattr(span, "extra_json", b"[]"), "JSON object"),
    "extra that is a field": (lambda span: setattr(span, "extra_json", b'{"name":1}'), "name"),
    "arrays too deep": (lambda span: nest(span, codec.MAX_ATTRIBUTE_DEPTH + 1, by_map=False), "deeper than"),
    "maps too deep": (lambda span: nest(span, codec.MAX_ATTRIBUTE_DEPTH + 1, by_map=True), "deeper than"),
    "an unknown attempt": (lambda span: setattr(span, "attempt_id", "at-nobody"), "at-nobody"),
    "an unknown rollout": (lambda span: setattr(span, "rollout_id", "ro-nobody"), "ro-nobody"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("wrap", [lambda store: store, LightningStoreThreaded], ids=["memory", "threaded"])
async def test_a_bad_span_is_refused_with_its_whole_request(kind: str, wrap: Any, serve: Any) -> None:
    server: LightningStoreServer = await serve(wrap(InMemoryLightningStore()))
    rollout = await server.start_rollout("task")
    good, bad = (codec.span_to_proto(make_span(rollout)) for _ in range(2))
    spoil, mentions = BAD[kind]
    spoil(bad)
    with grpc.insecure_channel(server.endpoint) as channel:
        stub = LightningStoreServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(stub.AddSpans, pb.AddSpansRequest(spans=[good, bad]), timeout=10)
        assert caught.value.code().name in ("INVALID_ARGUMENT", "NOT_FOUND")
        assert mentions in caught.value.details()
    assert (await server.query_spans(rollout.rollout_id)).total == 0


@pytest.mark.parametrize("by_map", [True, False])
async def test_what_is_as_deep_as_allowed_can_be_read_again(
    by_map: bool, server: LightningStoreServer, client: Any
) -> None:
    rollout = await server.start_rollout("task")
    span = codec.span_to_proto(make_span(rollout))
    nest(span, codec.MAX_ATTRIBUTE_DEPTH, by_map=by_map)
    with grpc.insecure_channel(server.endpoint) as channel:
        stub = LightningStoreServiceStub(channel)
        await asyncio.to_thread(stub.AddSpans, pb.AddSpansRequest(spans=[span]), timeout=10)
    (found,) = await client.query_spans(rollout.rollout_id)
    assert found.attributes["deep"]


@pytest.mark.parametrize("wrap", [lambda store: store, LightningStoreThreaded], ids=["memory", "threaded"])
async def test_receipts_come_in_the_order_of_the_request(wrap: Any, serve: Any) -> None:
    server: LightningStoreServer = await serve(wrap(InMemoryLightningStore()))
    rollouts = [await server.start_rollout(number) for number in range(2)]
    first, second, third = (make_span(rollouts[0]), make_span(rollouts[1]), make_span(rollouts[0]))
    with grpc.insecure_channel(server.endpoint) as channel:
        stub = LightningStoreServiceStub(channel)
        spans = [codec.span_to_proto(span) for span in (first, second, first, third)]
        answer = await asyncio.to_thread(stub.AddSpans, pb.AddSpansRequest(spans=spans), timeout=10)
    assert [receipt.stored for receipt in answer.receipts] == [True, True, False, True]
    assert [answer.receipts[index].sequence_id for index in (0, 1, 3)] == [1, 1, 2]


@pytest.fixture(params=[True, False], ids=["as they came", "decoded"])
async def server(request: Any, serve: Any, store: Any) -> LightningStoreServer:
    """Stores in memory keep spans as they came, stores of other kinds are given them decoded."""
    return await serve(InMemoryLightningStore() if request.param else store)  # type: ignore[no-any-return]


UNKNOWN_GROUP = b"\xfb\x07", b"\xfc\x07"
"""What begins and ends a group with a number that no field of a span has."""


async def add_encoded(endpoint: str, spans: Sequence[bytes]) -> pb.AddSpansResponse:
    (request,) = codec.chunked(b"", pb.AddSpansRequest.SPANS_FIELD_NUMBER, spans, 2**20)
    with grpc.insecure_channel(endpoint) as channel:
        call = channel.unary_unary(
            "/lightningpb.v1.LightningStoreService/AddSpans",
            response_deserializer=pb.AddSpansResponse.FromString,
        )
        return await asyncio.to_thread(call, request, timeout=10)  # type: ignore[no-any-return]


async def test_a_span_means_what_it_says_however_it_is_encoded(
    server: LightningStoreServer, client: Any
) -> None:
    rollout = await server.start_rollout("task")
    span = codec.span_to_proto(make_span(rollout, attributes={"a": 1}))
    late_ids = span_pb2.Span(rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id)
    early = span_pb2.Span(rollout_id="ro-another", attempt_id="at-another", name="not this one")
    encoded = early.SerializeToString() + span.SerializeToString() + late_ids.SerializeToString()
    answer = await add_encoded(server.endpoint, [encoded])
    assert [receipt.stored for receipt in answer.receipts] == [True]
    (found,) = await client.query_spans(rollout.rollout_id)
    span.sequence_id = 1
    assert codec.span_to_proto(found) == span


def within(tag: bytes, content: bytes) -> bytes:
    """A message within a message, which has less than 16 KiB."""
    size = len(content)
    return tag + (bytes([size]) if size < 128 else bytes([size & 0x7F | 0x80, size >> 7])) + content


@pytest.mark.parametrize("by_map", [True, False])
@pytest.mark.parametrize("long_tags", [True, False])
@pytest.mark.parametrize("too_many", [0, 1])
async def test_how_tags_are_written_does_not_hide_how_deep_a_span_is(
    by_map: bool, long_tags: bool, too_many: int, server: LightningStoreServer, client: Any
) -> None:
    """A number may take more bytes than it needs: 0x2a is 0xaa 0x00, too."""
    array, kvlist = (b"\xaa\x00", b"\xba\x00") if long_tags else (b"\x2a", b"\x3a")
    rollout = await server.start_rollout("task")
    value = span_pb2.AttributeValue(int_value=1).SerializeToString()
    for _ in range(codec.MAX_ATTRIBUTE_DEPTH + too_many):
        if by_map:
            value = within(kvlist, within(b"\x0a", within(b"\x0a", b"k") + within(b"\x12", value)))
        else:
            value = within(array, within(b"\x0a", value))
    attribute = within(b"\x4a", within(b"\x0a", b"deep") + within(b"\x12", value))
    encoded = codec.span_to_proto(make_span(rollout, attributes={})).SerializeToString() + attribute
    if too_many:
        with pytest.raises(grpc.RpcError, match="deeper than"):
            await add_encoded(server.endpoint, [encoded])
    else:
        await add_encoded(server.endpoint, [encoded])
        (found,) = await client.query_spans(rollout.rollout_id)
        assert found.attributes["deep"]


@pytest.mark.parametrize(("levels", "taken"), [(99, True), (100, False)])
async def test_what_is_unknown_may_be_as_deep_as_can_be_read_again(
    levels: int, taken: bool, server: LightningStoreServer, client: Any
) -> None:
    rollout = await server.start_rollout("task")
    begins, ends = UNKNOWN_GROUP
    encoded = codec.span_to_proto(make_span(rollout)).SerializeToString() + begins * levels + ends * levels
    if taken:
        await add_encoded(server.endpoint, [encoded])
    else:
        with pytest.raises(grpc.RpcError, match="not a lightningpb.v1.AddSpansRequest"):
            await add_encoded(server.endpoint, [encoded])
    assert len(await client.query_spans(rollout.rollout_id)) == taken
