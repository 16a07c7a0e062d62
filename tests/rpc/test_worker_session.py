"""The worker session as any client may use it: heartbeats up, commands down, and reasons at its end."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from lightningpb.v1 import store_service_pb2 as pb
from lightningpb.v1 import worker_pb2
from lightningpb.v1.store_service_pb2_grpc import LightningStoreServiceStub

from lightning.rpc import LightningStoreServer, worker_sessions
from lightning.types import Drain

pytestmark = pytest.mark.anyio


class Session:
    """One stream, by a synchronous stub; its answers are read in a thread."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[Any] = queue.Queue()
        call = LightningStoreServiceStub(channel).WorkerSession(iter(self._requests.get, None), timeout=30)
        self._reader = threading.Thread(target=self._read, args=(call,))
        self._reader.start()

    def send(self, **fields: Any) -> None:
        self._requests.put(pb.WorkerSessionRequest(**fields))

    def finish(self) -> None:
        self._requests.put(None)

    async def answer(self) -> Any:
        """The next answer; the error at the end of the stream, None if it ended well."""
        return await asyncio.to_thread(self._answers.get, timeout=10)

    def _read(self, call: Any) -> None:
        try:
            for answer in call:
                self._answers.put(answer)
            self._answers.put(None)
        except grpc.RpcError as error:
            self._answers.put(error)


@pytest.fixture
def session(server: LightningStoreServer) -> Iterator[Session]:
    with grpc.insecure_channel(server.endpoint) as channel:
        session = Session(channel)
        yield session
        session.finish()
    session._reader.join(10)


def hello(worker_id: str = "w", instance_id: str | None = "i") -> pb.WorkerSessionRequest.Hello:
    return pb.WorkerSessionRequest.Hello(worker_id=worker_id, instance_id=instance_id)


async def test_a_worker_is_welcomed_heard_and_told(session: Session, server: LightningStoreServer) -> None:
    session.send(hello=hello())
    welcome = await session.answer()
    assert welcome.WhichOneof("message") == "welcome"
    assert not welcome.welcome.HasField("worker"), "opening is no sign of life"

    await server.enqueue_rollout("task")
    (claimed,) = await server.claim_rollouts(worker_id="w", instance_id="i", timeout=0)
    ref = worker_pb2.AttemptRef(rollout_id=claimed.rollout_id, attempt_id=claimed.attempt.attempt_id)
    session.send(heartbeat=worker_pb2.WorkerHeartbeat(worker_id="w", instance_id="i", attempts=[ref]))
    acknowledged = (await session.answer()).heartbeat_ack
    assert acknowledged.worker.current_attempt_id == claimed.attempt.attempt_id
    attempt = await server.get_latest_attempt(claimed.rollout_id)
    assert attempt is not None
    assert attempt.last_heartbeat_time is not None

    await server.send_command(Drain(reason="enough"), "w")
    assert (await session.answer()).command.drain.reason == "enough"

    session.finish()
    assert await session.answer() is None


async def test_a_heartbeats_answer_cancels_what_is_gone(
    session: Session, server: LightningStoreServer
) -> None:
    rollout = await server.start_rollout("task", worker_id="w")
    await server.update_rollout(rollout.rollout_id, status="cancelled")
    session.send(hello=hello())
    await session.answer()
    ref = worker_pb2.AttemptRef(rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id)
    session.send(heartbeat=worker_pb2.WorkerHeartbeat(worker_id="w", instance_id="i", attempts=[ref]))
    assert (await session.answer()).WhichOneof("message") == "heartbeat_ack"
    assert (await session.answer()).command.cancel_attempt.attempt_id == rollout.attempt.attempt_id


@pytest.mark.parametrize(
    ("first", "mentions"),
    [
        ({"heartbeat": worker_pb2.WorkerHeartbeat(worker_id="w", instance_id="i")}, "must be a Hello"),
        ({"hello": pb.WorkerSessionRequest.Hello()}, "must be a Hello"),
        ({}, "must be a Hello"),
    ],
)
async def test_who_does_not_say_hello_is_refused(session: Session, first: Any, mentions: str) -> None:
    session.send(**first)
    error = await session.answer()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert mentions in error.details()


@pytest.mark.parametrize(
    ("second", "mentions"),
    [
        ({"hello": hello()}, "one Hello"),
        ({"heartbeat": worker_pb2.WorkerHeartbeat(worker_id="v", instance_id="i")}, "not of 'v'"),
        ({"heartbeat": worker_pb2.WorkerHeartbeat(worker_id="w", instance_id="j")}, "'j'"),
        (
            {
                "heartbeat": worker_pb2.WorkerHeartbeat(
                    worker_id="w", instance_id="i", silent_after_seconds=-1
                )
            },
            "-1",
        ),
    ],
)
async def test_a_worker_speaks_for_itself_only(session: Session, second: Any, mentions: str) -> None:
    session.send(hello=hello())
    assert (await session.answer()).WhichOneof("message") == "welcome"
    session.send(**second)
    error = await session.answer()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert mentions in error.details()


async def test_a_drain_is_the_last_word(session: Session, server: LightningStoreServer) -> None:
    session.send(hello=hello())
    await session.answer()
    await server.stop(reason="maintenance")
    closing = (await session.answer()).closing
    assert closing.reason == pb.CLOSE_REASON_DRAINING
    assert closing.message == "maintenance"


async def test_another_stream_of_the_process_takes_over(
    session: Session, server: LightningStoreServer
) -> None:
    session.send(hello=hello())
    await session.answer()
    with grpc.insecure_channel(server.endpoint) as channel:
        others = [Session(channel), Session(channel)]
        others[0].send(hello=hello(instance_id="j"))
        others[1].send(hello=hello())
        assert (await others[1].answer()).WhichOneof("message") == "welcome"
        assert (await session.answer()).closing.reason == pb.CLOSE_REASON_SUPERSEDED
        assert await session.answer() is None
        assert (await others[0].answer()).WhichOneof("message") == "welcome"
        assert await server.send_command(Drain(), "w") == 2
        for other in others:
            assert (await other.answer()).command.HasField("drain")
            other.finish()
            assert await other.answer() is None
            other._reader.join(10)


async def test_a_worker_that_reads_nothing_holds_up_only_itself(
    session: Session, server: LightningStoreServer, client: Any
) -> None:
    with grpc.insecure_channel(server.endpoint) as channel:
        requests: queue.Queue[Any] = queue.Queue()
        requests.put(pb.WorkerSessionRequest(hello=hello("silent")))
        call = LightningStoreServiceStub(channel).WorkerSession(iter(requests.get, None), timeout=30)
        await asyncio.to_thread(next, call)
        for _ in range(2000):
            await server.send_command(Drain(reason="x" * 1000), "silent")
        session.send(hello=hello())
        assert (await session.answer()).WhichOneof("message") == "welcome"
        await server.send_command(Drain(reason="for you"), "w")
        assert (await session.answer()).command.drain.reason == "for you"
        requests.put(None)
        call.cancel()


async def test_a_worker_that_falls_silent_is_told_so(session: Session) -> None:
    session.send(hello=hello())
    await session.answer()
    heartbeat = worker_pb2.WorkerHeartbeat(worker_id="w", instance_id="i", silent_after_seconds=0.2)
    session.send(heartbeat=heartbeat)
    assert (await session.answer()).WhichOneof("message") == "heartbeat_ack"
    closing = (await session.answer()).closing
    assert closing.reason == pb.CLOSE_REASON_SILENT
    assert closing.message == "no heartbeat came for 0.2 s"
    assert await session.answer() is None


async def test_who_only_listens_is_not_taken_for_silent(
    session: Session, server: LightningStoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_sessions, "DEFAULT_SILENT_AFTER_SECONDS", 0.01)
    session.send(hello=hello())
    await session.answer()
    with grpc.insecure_channel(server.endpoint) as channel:
        talker = Session(channel)
        talker.send(hello=hello("v"))
        await talker.answer()
        talker.send(heartbeat=worker_pb2.WorkerHeartbeat(worker_id="v", instance_id="i"))
        assert (await talker.answer()).WhichOneof("message") == "heartbeat_ack"
        assert (await talker.answer()).closing.reason == pb.CLOSE_REASON_SILENT  # so long has passed
        talker.finish()
        talker._reader.join(10)
    await server.send_command(Drain(), "w")
    assert (await session.answer()).command.HasField("drain")
