"""The stream of spans as any client may use it, message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from lightningpb.v1 import errors_pb2
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.rpc import (
    LightningStoreClient,
    LightningStoreServer,
    LimitExceededError,
    loop,
    span_sender,
    span_sessions,
)
from lightning.rpc.span_sessions import CREDITS
from lightning.store import InMemoryLightningStore, LightningStoreThreaded, SQLiteLightningStore
from lightning.store.threaded import LoopThread
from lightning.testing import make_span
from lightning.testing.unreliable import UnreliableStore
from lightning.types import Span

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 20
METHOD = "/lightningpb.v1.LightningStoreService/StreamSpans"


class Stream:
    """One call, on the event loop of its thread: grpc.aio wants one loop per process, and the server has it."""

    def __init__(self, thread: LoopThread, call: Any) -> None:
        self._thread = thread
        self._call = call

    async def send(self, **message: Any) -> None:
        await self.send_raw(pb.StreamSpansRequest(**message).SerializeToString())

    async def send_raw(self, data: bytes) -> None:
        await self._thread.run(self._call.write(data))

    async def open(self, session_id: str = "s", resume_from: int = 0) -> pb.StreamSpansResponse.Opened:
        await self.send(open=pb.StreamSpansRequest.Open(session_id=session_id, resume_from=resume_from))
        return (await self.answer()).opened

    async def batch(self, number: int, *spans: Span) -> None:
        messages = [codec.span_to_proto(span) for span in spans]
        await self.send(batch=pb.StreamSpansRequest.Batch(batch_sequence=number, spans=messages))

    async def answer(self) -> Any:
        """The next message; None at the end of the stream."""
        answer = await asyncio.wait_for(self._thread.run(self._call.read()), DEADLINE_SECONDS)
        return None if answer is grpc.aio.EOF else answer

    async def fails(self) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._read_to_the_end()
        return caught.value

    async def _read_to_the_end(self) -> None:
        while await self.answer() is not None:
            pass

    async def finish(self) -> None:
        await self._thread.run(self._call.done_writing())


@asynccontextmanager
async def streams(server: LightningStoreServer) -> AsyncIterator[Any]:
    """Makes streams to a server."""
    thread = loop.acquire()

    async def channel_to(address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address)

    channel = await thread.run(channel_to(server.endpoint))

    async def call() -> Any:
        return channel.stream_stream(METHOD, response_deserializer=pb.StreamSpansResponse.FromString)(
            timeout=60
        )

    async def make() -> Stream:
        return Stream(thread, await thread.run(call()))

    try:
        yield make
    finally:
        await thread.run(channel.close())
        loop.release()


@pytest.fixture
async def connect_stream(server: LightningStoreServer) -> AsyncIterator[Any]:
    async with streams(server) as make:
        yield make


async def names(store: Any, rollout_id: str) -> list[str]:
    return [span.name for span in await store.query_spans(rollout_id)]


async def test_batches_are_stored_and_acknowledged_in_order(server: Any, connect_stream: Any) -> None:
    first, second = [await server.start_rollout(number) for number in range(2)]
    stream = await connect_stream()
    opened = await stream.open()
    assert (opened.acknowledged_batch_sequence, opened.credits) == (0, CREDITS)
    assert opened.max_batch_bytes > 1024 * 1024
    await stream.batch(1, make_span(first, name="a"), make_span(second, name="b"), make_span(first, name="c"))
    repeated = make_span(first, name="d")
    await stream.batch(2, repeated, repeated)
    ack = (await stream.answer()).ack
    assert (ack.batch_sequence, ack.credits) == (1, 1)
    assert [(r.sequence_id, r.stored) for r in ack.receipts] == [(1, True), (1, True), (2, True)]
    ack = (await stream.answer()).ack
    assert ack.batch_sequence == 2
    assert [receipt.stored for receipt in ack.receipts] == [True, False]
    await stream.finish()
    assert await stream.answer() is None
    assert await names(server, first.rollout_id) == ["a", "c", "d"]


async def test_a_bad_batch_is_rejected_and_the_stream_goes_on(server: Any, connect_stream: Any) -> None:
    rollout = await server.start_rollout("task")
    stranger = make_span(rollout).model_copy(update={"attempt_id": "at-nobody"})
    stream = await connect_stream()
    await stream.open()
    await stream.batch(1, make_span(rollout, name="not alone"), stranger)
    await stream.batch(2, make_span(rollout, name="good"))
    rejected = (await stream.answer()).rejected
    assert (rejected.batch_sequence, rejected.credits) == (1, 1)
    assert rejected.error.reason == errors_pb2.ERROR_REASON_UNKNOWN_ID
    assert "at-nobody" in rejected.error.message
    assert (await stream.answer()).ack.batch_sequence == 2
    assert await names(server, rollout.rollout_id) == ["good"]


BAD_BEGINNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "must be an Open"),
    "a batch": ({"batch": pb.StreamSpansRequest.Batch(batch_sequence=1)}, "must be an Open"),
    "no name": ({"open": pb.StreamSpansRequest.Open()}, "session_id"),
    "a long name": ({"open": pb.StreamSpansRequest.Open(session_id="x" * 257)}, "session_id"),
    "a negative": ({"open": pb.StreamSpansRequest.Open(session_id="s", resume_from=-1)}, "negative"),
}


@pytest.mark.parametrize("kind", BAD_BEGINNINGS)
async def test_who_does_not_open_is_refused(kind: str, connect_stream: Any) -> None:
    message, mentions = BAD_BEGINNINGS[kind]
    stream = await connect_stream()
    await stream.send(**message)
    error = await stream.fails()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert mentions in error.details()


async def test_what_is_no_message_is_refused(connect_stream: Any) -> None:
    stream = await connect_stream()
    await stream.open()
    await stream.send_raw(b"\xff\xff\xff")
    error = await stream.fails()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "StreamSpansRequest" in error.details()


def encoded_batch(number: int, *spans: Span) -> bytes:
    messages = [codec.span_to_proto(span) for span in spans]
    batch = pb.StreamSpansRequest.Batch(batch_sequence=number, spans=messages)
    return pb.StreamSpansRequest(batch=batch).SerializeToString()


AS_THEY_CAME_OR_DECODED = pytest.mark.parametrize(
    "wrap", [lambda store: store, UnreliableStore], ids=["as they came", "decoded"]
)
"""Stores in memory keep spans as they came, stores of other kinds are given them decoded."""


@AS_THEY_CAME_OR_DECODED
async def test_a_batch_in_pieces_is_one(wrap: Any, serve: Any) -> None:
    server = await serve(wrap(InMemoryLightningStore()))
    rollout = await server.start_rollout("task")
    first, second, third = (make_span(rollout, name=name) for name in ("first", "second", "third"))
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        await stream.send_raw(encoded_batch(1, first, second) + encoded_batch(1, third))
        assert [receipt.stored for receipt in (await stream.answer()).ack.receipts] == [True] * 3
    assert await names(server, rollout.rollout_id) == ["first", "second", "third"]


@AS_THEY_CAME_OR_DECODED
async def test_a_batch_that_is_taken_back_is_refused(wrap: Any, serve: Any) -> None:
    """Protobuf reads the last member of a oneof only; which of the spans were meant is anybody's guess."""
    server = await serve(wrap(InMemoryLightningStore()))
    rollout = await server.start_rollout("task")
    another = pb.StreamSpansRequest(open=pb.StreamSpansRequest.Open(session_id="s")).SerializeToString()
    batch = encoded_batch(1, make_span(rollout))
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        await stream.send_raw(batch + another + encoded_batch(1, make_span(rollout)))
        error = await stream.fails()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "another message before its batch" in error.details()
    assert (await server.query_spans(rollout.rollout_id)).total == 0


@pytest.mark.parametrize("number", [0, -1, 2, 2**62])
async def test_batches_count_up_by_one(number: int, server: Any, connect_stream: Any) -> None:
    rollout = await server.start_rollout("task")
    stream = await connect_stream()
    await stream.open()
    await stream.batch(number, make_span(rollout))
    error = await stream.fails()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"1 is next, not {number}" in error.details()
    assert await names(server, rollout.rollout_id) == []


async def test_an_open_in_the_middle_is_refused(connect_stream: Any) -> None:
    stream = await connect_stream()
    await stream.open()
    await stream.send(open=pb.StreamSpansRequest.Open(session_id="s"))
    assert (await stream.fails()).code() is grpc.StatusCode.INVALID_ARGUMENT


class HeldStore(UnreliableStore):
    """Stores no span before it is let."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.let = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        if verb == "add_many_spans":
            self._count(self.calls, verb)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.let.wait(), self.loop))
        return await super()._forward(verb, *args, **kwargs)


@pytest.fixture
async def held(serve: Any) -> AsyncIterator[tuple[HeldStore, LightningStoreServer]]:
    store = HeldStore(InMemoryLightningStore())
    yield store, await serve(store)
    store.let.set()


async def test_who_ignores_the_credits_is_cut_off(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, server = held

    class Noticed(span_sessions.LimitExceededError):
        """Ends the storing only now: before, there might be room again for what is one too many."""

        def __init__(self, message: str) -> None:
            super().__init__(message)
            store.loop.call_soon_threadsafe(store.let.set)

    monkeypatch.setattr(span_sessions, "LimitExceededError", Noticed)
    rollout = await server.start_rollout("task")
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        for number in range(1, CREDITS + 2):
            await stream.batch(number, make_span(rollout, name=f"s{number}"))
        error = await stream.fails()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "credits" in error.details()


async def test_a_resumed_session_hears_what_became_of_what_it_had_sent(
    server: Any, connect_stream: Any
) -> None:
    rollout = await server.start_rollout("task")
    stream = await connect_stream()
    await stream.open()
    stranger = make_span(rollout).model_copy(update={"rollout_id": "ro-nobody"})
    await stream.batch(1, make_span(rollout, name="a"))
    await stream.batch(2, stranger)
    await stream.batch(3, make_span(rollout, name="b"))
    answers = [await stream.answer() for _ in range(3)]

    resumed = await connect_stream()
    opened = await resumed.open(resume_from=1)
    assert opened.acknowledged_batch_sequence == 3
    assert [await resumed.answer() for _ in range(2)] == answers[1:]
    await resumed.batch(4, make_span(rollout, name="c"))
    assert (await resumed.answer()).ack.batch_sequence == 4
    assert (await stream.answer()).closing.reason == pb.CLOSE_REASON_SUPERSEDED
    assert await stream.answer() is None
    assert await names(server, rollout.rollout_id) == ["a", "b", "c"]


async def test_a_batch_is_stored_though_its_connection_breaks(held: Any) -> None:
    """The stream that resumes waits for what is being stored, and hears of it; nothing is stored twice."""
    store, server = held
    rollout = await server.start_rollout("task")
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        await stream.batch(1, make_span(rollout, name="a"))
        await stream.batch(2, make_span(rollout, name="b"))
        await store.wait_for_calls("add_many_spans")
    async with streams(server) as make:
        stream = await make()
        opening = asyncio.ensure_future(stream.open())
        await server.statistics()
        assert not opening.done()
        store.let.set()
        opened = await opening
        assert opened.acknowledged_batch_sequence == 1
        assert (await stream.answer()).ack.receipts[0].sequence_id == 1
        await stream.batch(2, make_span(rollout, name="b"))
        assert (await stream.answer()).ack.batch_sequence == 2
    assert await names(server, rollout.rollout_id) == ["a", "b"]


async def test_a_drain_acknowledges_what_is_stored_and_says_goodbye(held: Any) -> None:
    store, server = held
    rollout = await server.start_rollout("task")
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        await stream.batch(1, make_span(rollout, name="a"))
        await store.wait_for_calls("add_many_spans")
        stopping = asyncio.ensure_future(server.stop(reason="maintenance"))
        store.let.set()
        assert (await stream.answer()).ack.batch_sequence == 1
        closing = (await stream.answer()).closing
        assert (closing.reason, closing.message) == (pb.CLOSE_REASON_DRAINING, "maintenance")
        assert await stream.answer() is None
        await stopping


async def test_a_store_out_of_reach_ends_the_stream_and_answers_nothing(
    server: Any, store: UnreliableStore, connect_stream: Any
) -> None:
    rollout = await server.start_rollout("task")
    stream = await connect_stream()
    await stream.open()
    store.away = True
    await stream.batch(1, make_span(rollout, name="a"))
    assert (await stream.fails()).code() is grpc.StatusCode.UNAVAILABLE
    store.away = False
    stream = await connect_stream()
    assert (await stream.open()).acknowledged_batch_sequence == 0
    await stream.batch(1, make_span(rollout, name="a"))
    assert (await stream.answer()).ack.batch_sequence == 1


async def test_a_resumption_from_the_future_is_refused(server: Any, connect_stream: Any) -> None:
    rollout = await server.start_rollout("task")
    stream = await connect_stream()
    await stream.open()
    await stream.batch(1, make_span(rollout))
    await stream.answer()
    stream = await connect_stream()
    await stream.send(open=pb.StreamSpansRequest.Open(session_id="s", resume_from=5))
    assert (await stream.fails()).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_restarted_server_takes_the_clients_word(serve: Any, tmp_path: Any) -> None:
    """What it has no answer to is sent again, and the store knows the spans."""
    path = tmp_path / "store.db"
    server = await serve(SQLiteLightningStore(path))
    rollout = await server.start_rollout("task")
    spans = [make_span(rollout, name=name) for name in "abc"]
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        for number, span in enumerate(spans[:2], start=1):
            await stream.batch(number, span)
            await stream.answer()
    await server.close()
    server = await serve(SQLiteLightningStore(path))
    async with streams(server) as make:
        stream = await make()
        assert (await stream.open(resume_from=1)).acknowledged_batch_sequence == 1
        for number, span in enumerate(spans[1:], start=2):
            await stream.batch(number, span)
        assert [receipt.stored for receipt in (await stream.answer()).ack.receipts] == [False]
        assert [receipt.stored for receipt in (await stream.answer()).ack.receipts] == [True]
    assert await names(server, rollout.rollout_id) == ["a", "b", "c"]


async def test_sessions_left_are_forgotten_beyond_a_bound(serve: Any) -> None:
    server = await serve(remembered_bytes=0)
    rollout = await server.start_rollout("task")
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        await stream.batch(1, make_span(rollout))
        await stream.answer()
        await stream.finish()
        assert await stream.answer() is None
        assert (await (await make()).open()).acknowledged_batch_sequence == 0


async def test_a_client_that_reads_no_answers_holds_up_only_itself(server: Any, client: Any) -> None:
    rollout = await server.start_rollout("task")
    async with streams(server) as make:
        stream = await make()
        await stream.open()
        for number in range(1, 2000):
            try:
                await asyncio.wait_for(stream.batch(number, make_span(rollout, name="x" * 10_000)), 0.2)
            except (asyncio.TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                break
        assert await client.deliver_spans([make_span(rollout, name="beside")]) == 1


# --- Through the client ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda store: store, LightningStoreThreaded], ids=["memory", "threaded"])
async def test_spans_of_many_callers_share_a_stream(wrap: Any, serve: Any, connect: Any) -> None:
    server = await serve(wrap(InMemoryLightningStore()))
    client: LightningStoreClient = connect(server.endpoint)
    rollouts = [await client.start_rollout(number) for number in range(20)]

    async def deliver(rollout: Any) -> int:
        batches = [[make_span(rollout, name=f"{turn}-{n}") for n in range(5)] for turn in range(5)]
        return sum([await client.deliver_spans(batch) for batch in batches])

    assert await asyncio.gather(*map(deliver, rollouts)) == [25] * 20
    expected = [f"{turn}-{number}" for turn in range(5) for number in range(5)]
    for rollout in rollouts:
        assert await names(server, rollout.rollout_id) == expected


async def test_what_one_caller_sends_does_not_spoil_what_another_does(held: Any, connect: Any) -> None:
    """Their spans travel in one batch, which is refused: then each learns of its own."""
    store, server = held
    client: LightningStoreClient = connect(server.endpoint)
    rollout = await client.start_rollout("task")
    stranger = make_span(rollout).model_copy(update={"attempt_id": "at-nobody"})
    first = asyncio.ensure_future(client.deliver_spans([make_span(rollout, name="first")]))
    await store.wait_for_calls("add_many_spans")
    calls = [
        client.deliver_spans([make_span(rollout, name="good")]),
        client.deliver_spans([stranger]),
        client.deliver_spans([make_span(rollout, name="fine")]),
    ]
    results = asyncio.gather(*calls, return_exceptions=True)
    await client.statistics()
    store.let.set()
    good, bad, fine = await results
    assert (await first, good, fine) == (1, 1, 1)
    assert isinstance(bad, ValueError)
    assert "at-nobody" in str(bad)
    assert sorted(await names(server, rollout.rollout_id)) == ["fine", "first", "good"]


async def test_large_deliveries_are_cut_and_one_large_span_is_not(serve: Any, connect: Any) -> None:
    store = UnreliableStore(InMemoryLightningStore())
    client: LightningStoreClient = connect((await serve(store)).endpoint)
    rollout = await client.start_rollout("task")
    spans = [make_span(rollout, name=f"s{n}", attributes={"text": "x" * 100_000}) for n in range(50)]
    huge = make_span(rollout, name="huge", attributes={"text": "x" * 5_000_000})
    assert await client.deliver_spans([*spans, huge]) == 51
    assert max(map(len, store.span_batches)) == 10
    assert store.span_batches[-1] == ["huge"]
    assert await names(client, rollout.rollout_id) == [f"s{n}" for n in range(50)] + ["huge"]


async def test_a_span_that_no_message_holds_is_refused_alone(serve: Any, connect: Any) -> None:
    client: LightningStoreClient = connect((await serve(max_message_bytes=100_000)).endpoint)
    rollout = await client.start_rollout("task")
    huge = make_span(rollout, name="huge", attributes={"text": "x" * 100_000})
    small = [make_span(rollout, name=f"s{n}", attributes={"text": "x" * 900}) for n in range(300)]
    with pytest.raises(LimitExceededError, match="max_message_bytes of LightningStoreServer"):
        await client.deliver_spans([huge])
    assert await client.deliver_spans(small) == 300


async def test_what_is_no_span_is_refused_before_anything_is_sent(client: LightningStoreClient) -> None:
    rollout = await client.start_rollout("task")
    bad = make_span(rollout).model_copy(update={"attributes": {"a": object()}})
    with pytest.raises(TypeError, match='attributes\\["a"\\]'):
        await client.deliver_spans([make_span(rollout), bad])
    assert await client.deliver_spans([]) == 0
    assert (await client.query_spans(rollout.rollout_id)).total == 0


async def test_a_cancelled_delivery_leaves_room_for_others(
    held: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(span_sender, "_MAX_BUFFERED_BYTES", 1000)
    store, server = held
    client: LightningStoreClient = connect(server.endpoint)
    rollout = await client.start_rollout("task")
    span = lambda name: make_span(rollout, name=name, attributes={"text": "x" * 600})  # noqa: E731
    calls = [asyncio.ensure_future(client.deliver_spans([span(str(number))])) for number in range(4)]
    await store.wait_for_calls("add_many_spans")
    await client.statistics()
    calls[1].cancel()  # waits for room
    await asyncio.wait({calls[1]})
    store.let.set()
    await asyncio.gather(calls[0], calls[2], calls[3])
    assert await names(server, rollout.rollout_id) == ["0", "2", "3"]


async def test_a_client_that_is_closed_fails_its_deliveries(held: Any, connect: Any) -> None:
    store, server = held
    client: LightningStoreClient = connect(server.endpoint)
    rollout = await client.start_rollout("task")
    call = asyncio.ensure_future(client.deliver_spans([make_span(rollout)]))
    await store.wait_for_calls("add_many_spans")
    await client.close()
    with pytest.raises(RuntimeError, match="was closed"):
        await call


async def test_a_server_that_stays_away_is_unavailable(server: Any, connect: Any) -> None:
    client: LightningStoreClient = connect(server.endpoint)
    rollout = await client.start_rollout("task")
    await server.stop()
    with pytest.raises(ConnectionError, match="unavailable"):
        await client.deliver_spans([make_span(rollout)])
    await server.start()
    assert await client.deliver_spans([make_span(rollout)]) == 1


async def test_a_server_that_does_not_answer_is_given_up(held: Any, connect: Any) -> None:
    _, server = held
    client: LightningStoreClient = connect(server.endpoint, request_timeout=0.2, retry_delays=())
    rollout = await client.start_rollout("task")
    with pytest.raises(ConnectionError, match="no answer within"):
        await client.deliver_spans([make_span(rollout)])


async def test_an_idle_stream_is_closed_and_opened_again(
    client: LightningStoreClient, store: UnreliableStore, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(span_sender, "_IDLE_SECONDS", 0.01)
    rollout = await client.start_rollout("task")
    for number in range(3):
        assert await client.deliver_spans([make_span(rollout, name=str(number))]) == 1
        connection: Any = client._connect()
        task = connection._span_sender._task
        while task is not None and not task.done():
            await asyncio.wait_for(asyncio.wrap_future(connection._thread.submit(asyncio.wait({task}))), 10)
    assert await names(client, rollout.rollout_id) == ["0", "1", "2"]


def test_a_batch_of_bytes_is_the_message() -> None:
    for sizes in ([], [0], [1, 127, 128], [20_000, 3_000_000]):
        spans = [codec.span_to_proto(make_plain("x" * size)) for size in sizes]
        encoded = codec.batch_request(7, [span.SerializeToString() for span in spans])
        batch = pb.StreamSpansRequest.Batch(batch_sequence=7, spans=spans)
        assert pb.StreamSpansRequest.FromString(encoded) == pb.StreamSpansRequest(batch=batch)


def make_plain(name: str) -> Span:
    ids = {"rollout_id": "r", "attempt_id": "a", "trace_id": "1" * 32, "span_id": "2" * 16}
    return Span(sequence_id=0, name=name, **ids)
