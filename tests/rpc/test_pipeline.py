"""Many calls on one stream: from outside, by the protocol, and as the client makes them."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from lightningpb.v1 import errors_pb2
from lightningpb.v1 import store_service_pb2 as pb
from lightningpb.v1.store_service_pb2_grpc import LightningStoreServiceStub

from lightning.rpc import (
    LightningStoreClient,
    LightningStoreServer,
    LimitExceededError,
    PermissionDenied,
    StoreUnavailableError,
    Unauthenticated,
)
from lightning.rpc import (
    pipeline as pipeline_module,
)
from lightning.rpc import (
    pipeline_sessions as sessions_module,
)
from lightning.rpc import (
    server as server_module,
)
from lightning.rpc.admission import Admission
from lightning.rpc.handlers import UNARY_HANDLERS
from lightning.rpc.interception import Reception
from lightning.rpc.options import ServerLimits
from lightning.rpc.pipeline import Pipeline
from lightning.rpc.service import StoreService
from lightning.rpc.tokens import add_token
from lightning.store import InMemoryLightningStore
from lightning.store.threaded import LoopThread
from lightning.testing.unreliable import UnreliableStore
from lightning.types import PromptTemplate

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 20.0
PIPELINE = "/lightningpb.v1.LightningStoreService/Pipeline"


class Stream:
    """A pipeline as any client may use it."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._ids = count(1)
        self.outcomes: dict[int, pb.PipelineResponse.Outcome] = {}
        self.closing: pb.StreamClosing | None = None

    def request(self, method: str, request: Message | bytes) -> pb.PipelineRequest.Call:
        """A call with an id of its own."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return pb.PipelineRequest.Call(call_id=next(self._ids), method=method, request=data)

    async def send(self, *calls: pb.PipelineRequest.Call, cancelled: tuple[int, ...] = ()) -> None:
        """Send calls in one message."""
        await self.call.write(pb.PipelineRequest(calls=calls, cancelled_call_ids=cancelled))

    async def outcome(self, call: pb.PipelineRequest.Call) -> pb.PipelineResponse.Outcome:
        """Wait for what comes of a call."""
        while call.call_id not in self.outcomes:
            await self.read()
        return self.outcomes.pop(call.call_id)

    async def read(self) -> None:
        """Take one message."""
        message = await asyncio.wait_for(self.call.read(), DEADLINE_SECONDS)
        assert message is not grpc.aio.EOF
        if message.HasField("closing"):
            self.closing = message.closing
        for outcome in message.outcomes:
            assert self.outcomes.setdefault(outcome.call_id, outcome) is outcome


@pytest.fixture
async def stub(server: LightningStoreServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        yield LightningStoreServiceStub(channel)


@pytest.fixture
def stream(stub: Any) -> Stream:
    return Stream(stub.Pipeline(timeout=60))


def enqueue(request_id: str, task: bytes = b"1") -> pb.EnqueueRolloutsRequest:
    return pb.EnqueueRolloutsRequest(request_id=request_id, specs=[{"input_json": task}])


def claim(request_id: str, wait_seconds: float = 0.0) -> pb.DequeueRolloutsRequest:
    return pb.DequeueRolloutsRequest(request_id=request_id, limit=1, wait_seconds=wait_seconds)


def detail_of(outcome: pb.PipelineResponse.Outcome) -> tuple[int, int]:
    return outcome.failure.status_code, outcome.failure.detail.reason


@pytest.fixture
def streams_opened(caplog: Any) -> Any:
    """How many pipelines have ended, and how many calls of each method, by the access log."""
    caplog.set_level(logging.INFO, logger="lightning.access")
    return lambda method: sum(f"/{method} " in record.getMessage() for record in caplog.records)


# --- By the protocol --------------------------------------------------------------------------------------------


async def test_calls_in_one_message_are_all_answered(stream: Stream) -> None:
    calls = [stream.request("EnqueueRollouts", enqueue(f"r-{n}", b"%d" % n)) for n in range(50)]
    await stream.send(*calls)
    for number, call in enumerate(calls):
        response = pb.EnqueueRolloutsResponse.FromString((await stream.outcome(call)).response)
        assert [rollout.input_json for rollout in response.rollouts] == [b"%d" % number]


async def test_a_call_that_waits_holds_nobody_up(stream: Stream) -> None:
    waiting = stream.request("DequeueRollouts", claim("c-1", wait_seconds=50))
    others = [stream.request("GetStatistics", pb.GetStatisticsRequest()) for _ in range(3)]
    await stream.send(waiting, *others)
    for other in others:
        assert (await stream.outcome(other)).WhichOneof("outcome") == "response"
    await stream.send(stream.request("EnqueueRollouts", enqueue("r-1")))
    response = pb.DequeueRolloutsResponse.FromString((await stream.outcome(waiting)).response)
    assert len(response.rollouts) == 1


async def test_a_repeated_call_has_the_first_outcome(
    stream: Stream, stub: Any, store: UnreliableStore
) -> None:
    first, again = (stream.request("EnqueueRollouts", enqueue("the same")) for _ in range(2))
    await stream.send(first, again)
    assert (await stream.outcome(first)).response == (await stream.outcome(again)).response
    assert (await stub.EnqueueRollouts(enqueue("the same"), timeout=10)).rollouts
    assert (await store.statistics())["total_rollouts"] == 1


async def test_a_cancelled_call_ends_and_takes_no_work(
    stream: Stream, store: UnreliableStore, stub: Any
) -> None:
    waiting = stream.request("DequeueRollouts", claim("c-1", wait_seconds=50))
    await stream.send(waiting)
    await store.wait_for_calls("claim_rollouts")
    await stream.send(cancelled=(waiting.call_id, 999))
    probe = stream.request("GetStatistics", pb.GetStatisticsRequest())
    await stream.send(probe)
    await stream.outcome(probe)
    queued = stream.request("EnqueueRollouts", enqueue("r-1"))
    other = stream.request("DequeueRollouts", claim("c-2", wait_seconds=50))
    await stream.send(queued, other)
    response = pb.DequeueRolloutsResponse.FromString((await stream.outcome(other)).response)
    assert len(response.rollouts) == 1
    assert waiting.call_id not in stream.outcomes


@pytest.mark.parametrize(
    ("method", "request_bytes", "status", "reason"),
    [
        ("Nothing", b"", StatusCode.UNIMPLEMENTED, errors_pb2.ERROR_REASON_NOT_SUPPORTED),
        ("WatchRollouts", b"", StatusCode.UNIMPLEMENTED, errors_pb2.ERROR_REASON_NOT_SUPPORTED),
        ("QuerySpans", b"", StatusCode.NOT_FOUND, errors_pb2.ERROR_REASON_UNKNOWN_ID),
        ("Pipeline", b"", StatusCode.UNIMPLEMENTED, errors_pb2.ERROR_REASON_NOT_SUPPORTED),
        ("GetRollout", b"\xff", StatusCode.INVALID_ARGUMENT, errors_pb2.ERROR_REASON_INVALID_VALUE),
        ("DequeueRollouts", b"\xff", StatusCode.INVALID_ARGUMENT, errors_pb2.ERROR_REASON_INVALID_VALUE),
        (
            "UpdateRollout",
            pb.UpdateRolloutRequest(rollout_id="ro-1").SerializeToString(),
            StatusCode.NOT_FOUND,
            errors_pb2.ERROR_REASON_UNKNOWN_ID,
        ),
    ],
)
async def test_a_call_that_fails_says_why_and_the_others_go_on(
    stream: Stream, method: str, request_bytes: bytes, status: StatusCode, reason: int
) -> None:
    bad = stream.request(method, request_bytes)
    good = stream.request("GetStatistics", pb.GetStatisticsRequest())
    await stream.send(bad, good)
    assert detail_of(await stream.outcome(bad)) == (status.value[0], reason)
    assert (await stream.outcome(good)).WhichOneof("outcome") == "response"


async def test_made_up_names_are_neither_logged_nor_counted(serve: Any, streams_opened: Any) -> None:
    server = await serve(access_log=True)
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        stub: Any = LightningStoreServiceStub(channel)
        stream = Stream(stub.Pipeline(timeout=60))
        made_up = stream.request("GetStatistics \nfeigned", b"")
        known = stream.request("GetStatistics", pb.GetStatisticsRequest())
        await stream.send(made_up, known)
        assert (await stream.outcome(made_up)).failure.status_code == StatusCode.UNIMPLEMENTED.value[0]
        await stream.outcome(known)
    assert streams_opened("GetStatistics") == 1


async def test_a_call_id_in_use_ends_the_stream(stream: Stream) -> None:
    waiting = stream.request("DequeueRollouts", claim("c-1", wait_seconds=50))
    await stream.send(waiting, waiting)
    with pytest.raises(grpc.aio.AioRpcError, match="call_id 1 names a call that is under way") as caught:
        await stream.read()
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT


async def test_what_is_no_request_ends_the_stream(server: LightningStoreServer) -> None:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        call: Any = channel.stream_stream(PIPELINE)(iter([b"\xff"]), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError, match="not a lightningpb.v1.PipelineRequest"):
            await call.read()


async def test_answers_come_before_the_end_of_a_stream(stream: Stream) -> None:
    calls = [stream.request("EnqueueRollouts", enqueue(f"r-{n}")) for n in range(20)]
    await stream.send(*calls)
    await stream.call.done_writing()
    for call in calls:
        await stream.outcome(call)
    assert await stream.call.read() is grpc.aio.EOF


async def test_a_large_answer_is_asked_for_by_a_call_of_its_own(
    stream: Stream, stub: Any, store: UnreliableStore
) -> None:
    task = json.dumps("x" * 300_000).encode()
    call = stream.request("EnqueueRollouts", enqueue("large", task))
    await stream.send(call)
    assert (await stream.outcome(call)).too_large
    alone = await stub.EnqueueRollouts(enqueue("large", task), timeout=10)
    assert alone.rollouts[0].input_json == task
    assert (await store.statistics())["total_rollouts"] == 1


async def test_what_a_query_finds_is_one_message_or_too_large(
    stream: Stream, stub: Any, store: UnreliableStore
) -> None:
    await store.enqueue_rollout("small")
    query = pb.QueryRolloutsRequest()

    async def outcome() -> pb.PipelineResponse.Outcome:
        call = stream.request("QueryRollouts", query)
        await stream.send(call)
        return await stream.outcome(call)

    answers = [answer async for answer in stub.QueryRollouts(query, timeout=10)]
    assert pb.QueryRolloutsResponse.FromString((await outcome()).response) == answers[0]
    await store.enqueue_rollout("x" * 2_000_000)  # begins a message of its own
    assert len([answer async for answer in stub.QueryRollouts(query, timeout=10)]) == 2
    assert (await outcome()).too_large


async def test_a_server_that_stops_answers_first(
    stream: Stream, store: UnreliableStore, server: LightningStoreServer
) -> None:
    waiting = stream.request("DequeueRollouts", claim("c-1", wait_seconds=50))
    await stream.send(waiting)
    await store.wait_for_calls("claim_rollouts")
    stopping = asyncio.ensure_future(server.stop(reason="lunch"))
    response = pb.DequeueRolloutsResponse.FromString((await stream.outcome(waiting)).response)
    assert not response.rollouts
    assert not response.complete
    assert stream.closing is not None
    assert (stream.closing.reason, stream.closing.message) == (pb.CLOSE_REASON_DRAINING, "lunch")
    await stopping


async def test_each_call_is_held_against_its_own_row_of_the_table(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token, _ = add_token(path, "viewer", "v", None)
    server = await serve(tokens=path)
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        stub: Any = LightningStoreServiceStub(channel)
        stream = Stream(stub.Pipeline(metadata=(("authorization", f"Bearer {token}"),), timeout=60))
        allowed = stream.request("GetStatistics", pb.GetStatisticsRequest())
        refused = stream.request("EnqueueRollouts", enqueue("r-1"))
        await stream.send(refused, allowed)
        assert detail_of(await stream.outcome(refused)) == (
            StatusCode.PERMISSION_DENIED.value[0],
            errors_pb2.ERROR_REASON_PERMISSION_DENIED,
        )
        assert (await stream.outcome(allowed)).WhichOneof("outcome") == "response"


async def test_a_message_that_is_too_large_ends_the_stream(stream: Stream) -> None:
    await stream.send(stream.request("GetStatistics", b"\0" * 5_000_000))
    with pytest.raises(grpc.aio.AioRpcError, match="has at most 4194304 bytes") as caught:
        await stream.read()
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED


class Unread:
    """The context of a stream that its client never reads from."""

    def __init__(self) -> None:
        self.written = asyncio.Event()

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def write(self, _: bytes) -> None:
        self.written.set()
        await asyncio.Event().wait()


def session_of(context: Any) -> Any:
    limits = ServerLimits()
    service = StoreService(InMemoryLightningStore(), "InMemoryLightningStore", limits)
    reception = Reception(None, Admission(limits), (), certificates=False)
    return sessions_module._Session(service, reception, context)


async def test_failures_that_are_never_read_are_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(sessions_module, "_UNSENT_BYTES", 100_000)
    taken = 0

    async def requests() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield pb.PipelineRequest(calls=[{"call_id": taken, "method": "x" * 1000}]).SerializeToString()

    context = Unread()
    session = asyncio.ensure_future(session_of(context).run(requests()))
    await context.written.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert 50 < taken < 500
    session.cancel()
    with pytest.raises(asyncio.CancelledError):
        await session


async def test_a_stream_ends_after_what_is_on_its_way() -> None:
    """gRPC would refuse to send the status while a message is being sent, and the client would wait for it for ever."""

    class Slow(Unread):
        sent = False

        async def write(self, _: bytes) -> None:
            self.written.set()
            for _ in range(10):
                await asyncio.sleep(0)
            self.sent = True

    async def requests() -> AsyncIterator[bytes]:
        yield pb.PipelineRequest(calls=[{"call_id": 1, "method": "GetStatistics"}]).SerializeToString()
        await context.written.wait()
        yield b"no request"

    context = Slow()
    with pytest.raises(ValueError, match="is not a"):
        await session_of(context).run(requests())
    assert context.sent


async def test_many_calls_in_a_message_leave_others_their_turn() -> None:
    statistics = [{"call_id": number, "method": "GetStatistics"} for number in range(3000)]

    async def requests() -> AsyncIterator[bytes]:
        yield pb.PipelineRequest(calls=statistics).SerializeToString()

        taken.set()

    taken = asyncio.Event()
    session = asyncio.ensure_future(session_of(Unread()).run(requests()))
    turns = 0
    while not taken.is_set():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10
    session.cancel()
    with pytest.raises(asyncio.CancelledError):
        await session


# --- The client -------------------------------------------------------------------------------------------------


async def test_a_client_makes_its_calls_by_one_stream(
    serve: Any, connect: Any, streams_opened: Any, caplog: Any
) -> None:
    server = await serve(access_log=True)
    client = connect(server.endpoint)
    rollouts = await asyncio.gather(*(client.enqueue_rollout(number) for number in range(100)))
    assert [rollout.input for rollout in rollouts] == list(range(100))
    await client.close()
    await server.stop()
    assert (streams_opened("EnqueueRollouts"), streams_opened("Pipeline")) == (100, 1)
    assert all("code=OK" in r.getMessage() for r in caplog.records if "/EnqueueRollouts " in r.getMessage())


async def test_threads_share_a_client(client: LightningStoreClient) -> None:
    got: list[int] = []

    def work(first: int) -> None:
        async def calls() -> None:
            rollouts = await asyncio.gather(*(client.enqueue_rollout(first + n) for n in range(20)))
            got.extend(rollout.input for rollout in rollouts)

        asyncio.run(calls())

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join, DEADLINE_SECONDS)
    assert sorted(got) == [100 * number + n for number in range(8) for n in range(20)]
    assert (await client.statistics())["total_rollouts"] == 160


async def test_a_cancelled_claim_takes_no_work(client: LightningStoreClient, store: UnreliableStore) -> None:
    waiting = asyncio.ensure_future(client.claim_rollouts(timeout=50))
    await store.wait_for_calls("claim_rollouts")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await client.statistics()  # is sent after the cancellation
    rollout = await client.enqueue_rollout(1)
    (claimed,) = await client.claim_rollouts(timeout=20)
    assert claimed.rollout_id == rollout.rollout_id


async def test_a_call_that_takes_too_long_is_given_up(
    serve: Any, connect: Any, store: UnreliableStore
) -> None:
    class Stuck(UnreliableStore):
        async def _while_here(self, call: Any) -> Any:
            call.close()
            await asyncio.Event().wait()

    stuck = Stuck(InMemoryLightningStore())
    client = connect((await serve(stuck)).endpoint, request_timeout=0.2, retry_delays=())
    with pytest.raises(StoreUnavailableError, match="Deadline Exceeded"):
        await client.get_rollout_by_id("ro-1")


@pytest.mark.parametrize("how", ["an older server", "no room for streams"])
async def test_without_a_pipeline_calls_go_one_by_one(
    serve: Any, connect: Any, monkeypatch: Any, streams_opened: Any, how: str
) -> None:
    options: dict[str, Any] = {"access_log": True}
    if how == "an older server":
        none = grpc.method_handlers_generic_handler("of.another.Service", {})
        monkeypatch.setattr(server_module, "pipeline_handler", lambda *_: none)
    else:
        options["max_streams"] = 1
    server = await serve(**options)
    if "max_streams" in options:
        assert not await connect(server.endpoint).receive_commands("w-1", timeout=0)
    client = connect(server.endpoint)
    for _ in range(3):
        await asyncio.gather(*(client.enqueue_rollout(number) for number in range(5)))
    assert (await client.statistics())["total_rollouts"] == 15
    assert not client._connect()._pipeline.takes("GetStatistics", b"")


async def test_small_limits_break_no_call_that_would_pass_alone(serve: Any, connect: Any) -> None:
    server = await serve(max_message_bytes=20_000)
    client = connect(server.endpoint, max_message_bytes=20_000)
    tasks = [letter * 15_000 for letter in "abcdefgh"]
    stored = await asyncio.gather(*(client.enqueue_rollout(task) for task in tasks))
    assert [rollout.input for rollout in stored] == tasks
    with pytest.raises(LimitExceededError, match="raise max_message_bytes of LightningStoreServer"):
        await client.enqueue_rollout("x" * 30_000)
    found = await asyncio.gather(*(client.get_rollout_by_id(rollout.rollout_id) for rollout in stored))
    assert [rollout.input for rollout in found] == tasks


async def test_large_answers_are_fetched_alone(client: LightningStoreClient, store: UnreliableStore) -> None:
    update = await store.add_resources({"p": PromptTemplate(template="x" * 1_000_000)})
    for _ in range(3):
        found = await client.get_resources_by_id(update.resources_id)
        assert found is not None
        assert found == update
    # in vain by the pipeline once, and never again
    assert store.calls["get_resources_by_id"] == 4


async def test_queries_go_by_the_pipeline_unless_the_last_one_found_much(
    client: LightningStoreClient, store: UnreliableStore
) -> None:
    small = await store.enqueue_rollout("small")
    large = [await store.enqueue_rollout(f"{number}" * 200_000) for number in range(10)]

    async def calls_for(ids: list[str]) -> int:
        before = store.calls["query_rollouts"]
        found = await client.query_rollouts(rollout_id_in=ids)
        assert [rollout.rollout_id for rollout in found] == ids
        return store.calls["query_rollouts"] - before

    few, many = [small.rollout_id], [rollout.rollout_id for rollout in large]
    assert await calls_for(few) == 1
    assert await calls_for(many) == 2  # in vain by the pipeline
    assert await calls_for(many) == 1
    assert await calls_for(few) == 1  # alone, and so small that the next one need not be
    assert client._connect()._pipeline.takes("QueryRollouts", b"")
    assert await calls_for(few) == 1
    assert await calls_for(many) == 2


async def test_queries_go_alone_to_a_server_that_takes_none_by_pipeline(
    client: LightningStoreClient, store: UnreliableStore, monkeypatch: Any
) -> None:
    monkeypatch.setattr(StoreService, "has", lambda _, method: method in UNARY_HANDLERS)
    stored = await client.enqueue_rollout("task")
    assert [rollout.rollout_id for rollout in await client.query_rollouts()] == [stored.rollout_id]
    assert store.calls["query_rollouts"] == 1


async def test_streams_that_end_by_age_break_no_call(serve: Any, connect: Any, streams_opened: Any) -> None:
    server = await serve(max_connection_age=0.1, access_log=True)
    client = connect(server.endpoint, retry_delays=())  # nothing is repeated
    waiting = asyncio.ensure_future(client.claim_rollouts(timeout=0.05))
    while streams_opened("Pipeline") < 3:
        await client.statistics()
    assert not await waiting


async def test_another_token_opens_another_stream(serve: Any, connect: Any, tmp_path: Path) -> None:
    path, token_file = tmp_path / "tokens.json", tmp_path / "token"
    viewer, algorithm = (add_token(path, role, role, None)[0] for role in ("viewer", "algorithm"))
    server = await serve(tokens=path)
    token_file.write_text(viewer)
    client = connect(server.endpoint, token_file=token_file)
    with pytest.raises(PermissionDenied):
        await client.enqueue_rollout(1)
    token_file.write_text(algorithm)
    await client.enqueue_rollout(1)


async def test_a_revoked_token_is_refused_on_an_open_stream(serve: Any, connect: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token, _ = add_token(path, "viewer", "v", None)
    client = connect((await serve(tokens=path)).endpoint, token=token)
    await client.statistics()
    path.unlink()
    add_token(path, "viewer", "another", None)
    with pytest.raises(Unauthenticated, match="revoked"):
        await client.statistics()


async def test_a_closed_client_says_so_to_calls_under_way(
    client: LightningStoreClient, store: UnreliableStore
) -> None:
    waiting = [asyncio.ensure_future(client.claim_rollouts(timeout=50)) for _ in range(3)]
    await store.wait_for_calls("claim_rollouts", 3)
    await client.close()
    for call in waiting:
        with pytest.raises(RuntimeError, match="was closed"):
            await call


class Silent:
    """A stream to a server that never answers."""

    async def write(self, _: Any) -> None:
        return

    async def read(self) -> None:
        await asyncio.Event().wait()

    def cancel(self) -> None:
        return

    async def code(self) -> StatusCode:
        return StatusCode.CANCELLED


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("a pipeline's")
    yield thread
    thread.stop()


def silent_pipeline(thread: LoopThread, opened: threading.Event) -> Pipeline:
    def open_stream() -> Silent:
        opened.set()
        return Silent()

    return Pipeline(thread, open_stream, lambda: None, lambda: RuntimeError("it was closed"))


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_call_that_comes_while_the_client_closes_opens_no_stream(
    thread: LoopThread, stopped: bool
) -> None:
    opened = threading.Event()
    pipeline = silent_pipeline(thread, opened)
    await thread.run(pipeline.close())
    if stopped:
        thread.stop()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it was closed"):
            await pipeline.call("GetStatistics", b"", timeout=DEADLINE_SECONDS)
    assert not opened.is_set()


async def test_a_call_can_be_cancelled_after_the_end_of_the_loop_of_grpc(thread: LoopThread) -> None:
    opened = threading.Event()
    pipeline = silent_pipeline(thread, opened)
    call = asyncio.ensure_future(pipeline.call("GetStatistics", b"", timeout=DEADLINE_SECONDS))
    await asyncio.to_thread(opened.wait, DEADLINE_SECONDS)
    thread.stop()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_server_that_learns_of_pipelines_is_asked_again(
    serve: Any, connect: Any, monkeypatch: Any, streams_opened: Any
) -> None:
    monkeypatch.setattr(pipeline_module, "_NO_ROOM_PAUSE_SECONDS", 0.0)
    with monkeypatch.context() as older:
        none = grpc.method_handlers_generic_handler("of.another.Service", {})
        older.setattr(server_module, "pipeline_handler", lambda *_: none)
        server = await serve()
    client = connect(server.endpoint)
    await client.statistics()
    await server.stop()
    newer = await serve(port=server.port, access_log=True)
    await client.statistics()
    await client.close()
    await newer.stop()
    assert streams_opened("Pipeline") == 1


async def test_an_answer_for_a_loop_that_is_gone_is_dropped(
    client: LightningStoreClient, store: UnreliableStore
) -> None:
    def begin() -> asyncio.Task[Any]:
        loop = asyncio.new_event_loop()
        task = loop.create_task(client.claim_rollouts(timeout=50))
        loop.run_until_complete(store.wait_for_calls("claim_rollouts"))
        loop.close()
        return task

    left: Any = await asyncio.to_thread(begin)
    await client.enqueue_rollout(1)
    await store.wait_for_answers("claim_rollouts")
    assert (await client.statistics())["total_rollouts"] == 1
    left._log_destroy_pending = False  # it is meant to be
    left.get_coro().close()
