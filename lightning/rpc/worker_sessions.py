"""The server's side of worker sessions: heartbeats up, commands down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.rpc.streams import Outbox
from lightning.store.lifecycle import DEFAULT_SILENT_AFTER_SECONDS
from lightning.types import WorkerCommand

if TYPE_CHECKING:
    from lightning.rpc.service import StoreService


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
    silent_after: float | None = None  # who only listens here has other ways to be heard
    while True:
        try:
            request = await asyncio.wait_for(anext(requests), silent_after)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            outbox.close(pb.CLOSE_REASON_SILENT, f"no heartbeat came for {silent_after:g} s")
            return
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
        silent_after = heartbeat.silent_after_seconds or DEFAULT_SILENT_AFTER_SECONDS


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
