"""The server's side of streams that stay open: worker sessions, with heartbeats up and commands down.

Each stream has one writer, its handler, which takes messages from a bounded outbox that other tasks fill; so a client
that does not read holds up only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from google.protobuf.message import Message
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.types import WorkerCommand

if TYPE_CHECKING:
    from lightning.rpc.service import StoreService

ResponseT = TypeVar("ResponseT", bound=Message)

_OUTBOX_MESSAGES = 64


class StreamHandler(Protocol):
    """Many requests, many responses."""

    def __call__(
        self, service: StoreService, requests: AsyncIterator[Any], /
    ) -> AsyncGenerator[Message, None]: ...


class Outbox(Generic[ResponseT]):
    """What is to be sent on one stream, and the tasks that make it."""

    def __init__(self) -> None:
        self.closing: pb.StreamClosing | None = None
        self.last_word: WorkerCommand | None = None
        self._queue: asyncio.Queue[ResponseT | None] = asyncio.Queue()
        self._slots = asyncio.Semaphore(_OUTBOX_MESSAGES)
        self._producers: list[asyncio.Task[None]] = []
        self._error: BaseException | None = None

    async def put(self, message: ResponseT) -> None:
        """Send `message` when its turn comes; waits while too much is waiting already."""
        await self._slots.acquire()
        self._queue.put_nowait(message)

    def produce(self, *producers: Coroutine[Any, Any, None]) -> None:
        """Run tasks that call `put`. The stream ends when the first of them does, with its error if it has one."""
        for producer in producers:
            task = asyncio.get_running_loop().create_task(producer)
            task.add_done_callback(self._end)
            self._producers.append(task)

    def close(
        self, reason: pb.CloseReason.ValueType, message: str, last_word: WorkerCommand | None = None
    ) -> None:
        """End the stream after what is in the outbox, saying why, and for workers with a command before that."""
        if self.closing is None:
            self.closing = pb.StreamClosing(reason=reason, message=message)
            self.last_word = last_word
            for task in self._producers:
                task.cancel()
            self._queue.put_nowait(None)

    async def messages(self) -> AsyncGenerator[ResponseT, None]:
        """What to send, until the stream ends. Raises what a producer raised."""
        try:
            while (message := await self._queue.get()) is not None:
                self._slots.release()
                yield message
        finally:
            for task in self._producers:
                task.cancel()
            await asyncio.gather(*self._producers, return_exceptions=True)
        if self._error is not None and self.closing is None:
            raise self._error

    def _end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and self._error is None:
            self._error = task.exception()
        self._queue.put_nowait(None)


class OpenStreams:
    """The streams that are open now, to end them by name or all at once."""

    def __init__(self) -> None:
        self._outboxes: set[Outbox[Any]] = set()
        self._by_key: dict[Any, Outbox[Any]] = {}

    def add(self, outbox: Outbox[Any], key: Any) -> None:
        """A stream opened. An older one of the same `key` (None: it has none) is closed."""
        self._outboxes.add(outbox)
        if key is None:
            return
        older = self._by_key.get(key)
        if older is not None:
            older.close(pb.CLOSE_REASON_SUPERSEDED, "the same process opened another stream")
        self._by_key[key] = outbox

    def discard(self, outbox: Outbox[Any], key: Any) -> None:
        """A stream ended."""
        self._outboxes.discard(outbox)
        if self._by_key.get(key) is outbox:
            del self._by_key[key]

    def close_all(
        self, reason: pb.CloseReason.ValueType, message: str, last_word: WorkerCommand | None = None
    ) -> None:
        """End all streams, those of workers with a command."""
        for outbox in list(self._outboxes):
            outbox.close(reason, message, last_word)


async def worker_session(
    service: StoreService, requests: AsyncIterator[pb.WorkerSessionRequest]
) -> AsyncGenerator[Message, None]:
    """Heartbeats up, commands down."""
    hello = await _first(requests)
    worker_id = hello.worker_id
    instance_id = hello.instance_id if hello.HasField("instance_id") else None
    key = None if instance_id is None else (worker_id, instance_id)
    outbox: Outbox[pb.WorkerSessionResponse] = Outbox()
    service.streams.add(outbox, key)
    try:
        # asking opens the worker's mailbox: from the welcome on, whatever is sent to it arrives
        first = await service.store.receive_commands(worker_id, instance_id=instance_id, timeout=0)
        worker = await service.store.get_worker_by_id(worker_id)
        known = None if worker is None else codec.worker_to_proto(worker)
        yield pb.WorkerSessionResponse(welcome=pb.WorkerSessionResponse.Welcome(worker=known))
        for command in first:
            yield _command_message(command)
        outbox.produce(
            _record_heartbeats(service, requests, hello, outbox),
            _forward_commands(service, worker_id, instance_id, outbox),
        )
        async with aclosing(outbox.messages()) as messages:
            async for message in messages:
                yield message
        if outbox.closing is not None:
            for command in await _last_commands(service, worker_id, instance_id, outbox.last_word):
                yield _command_message(command)
            yield pb.WorkerSessionResponse(closing=outbox.closing)
    finally:
        service.streams.discard(outbox, key)


async def _last_commands(
    service: StoreService, worker_id: str, instance_id: str | None, last_word: WorkerCommand | None
) -> Sequence[WorkerCommand]:
    """What a worker is told before its stream is closed: the last word, which makes all others void, or what was sent
    to it meanwhile."""
    if last_word is not None:
        return [last_word]
    return await service.store.receive_commands(worker_id, instance_id=instance_id, timeout=0)


async def _first(requests: AsyncIterator[pb.WorkerSessionRequest]) -> pb.WorkerSessionRequest.Hello:
    async for request in requests:
        if request.WhichOneof("message") == "hello" and request.hello.worker_id:
            return request.hello
        break
    raise ValueError("the first message of a WorkerSession must be a Hello that names the worker")


async def _record_heartbeats(
    service: StoreService,
    requests: AsyncIterator[pb.WorkerSessionRequest],
    hello: pb.WorkerSessionRequest.Hello,
    outbox: Outbox[pb.WorkerSessionResponse],
) -> None:
    async for request in requests:
        if request.WhichOneof("message") != "heartbeat":
            raise ValueError("a WorkerSession takes one Hello, then heartbeats")
        heartbeat = codec.heartbeat_from_proto(request.heartbeat)
        other_instance = hello.HasField("instance_id") and heartbeat.instance_id != hello.instance_id
        if heartbeat.worker_id != hello.worker_id or other_instance:
            raise ValueError(
                f"this is the session of worker {hello.worker_id!r}, not of {heartbeat.worker_id!r} "
                f"(instance {heartbeat.instance_id!r})"
            )
        reply = await service.store.send_heartbeat(heartbeat)
        acknowledged = pb.WorkerSessionResponse.HeartbeatAck(worker=codec.worker_to_proto(reply.worker))
        await outbox.put(pb.WorkerSessionResponse(heartbeat_ack=acknowledged))
        for command in reply.commands:
            await outbox.put(_command_message(command))


async def _forward_commands(
    service: StoreService,
    worker_id: str,
    instance_id: str | None,
    outbox: Outbox[pb.WorkerSessionResponse],
) -> None:
    while True:
        for command in await service.store.receive_commands(worker_id, instance_id=instance_id):
            await outbox.put(_command_message(command))


def _command_message(command: WorkerCommand) -> pb.WorkerSessionResponse:
    return pb.WorkerSessionResponse(command=codec.command_to_proto(command))


STREAM_HANDLERS: dict[str, StreamHandler] = {"WorkerSession": worker_session}
