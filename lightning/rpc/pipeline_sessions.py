"""The server's side of a pipeline: calls that share a stream, each received and answered as if it came by itself."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import ServicerContext
from lightningpb.v1 import store_service_pb2 as pb

from lightning.rpc.errors import (
    Failure,
    LimitExceededError,
    OverloadedError,
    RemoteStoreError,
    abort,
    to_failure,
)
from lightning.rpc.interception import Reception
from lightning.rpc.repeats import Outcome
from lightning.rpc.service import SERVICE_NAME, SHARED_RESPONSE_BYTES, StoreService
from lightning.types import WorkerCommand

logger = logging.getLogger(__name__)

Context = ServicerContext[Any, Any]

_MESSAGE_BYTES = 512 * 1024
"""Of responses, in one message, roughly."""
_UNSENT_BYTES = 8 * 1024 * 1024
"""With so much unsent, for the client does not read, no further calls are taken from it."""
_CANCELLATION_SECONDS = 1.0
"""A store that does not let go of a call by then holds up no others."""
_MAX_CALLS = 65_536
"""Under way at once on one stream."""
_LAST_WRITE_SECONDS = 5.0
"""How long a client whose mistake ends the stream has to read what was answered before."""
_MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Of one message, which is held while its calls wait for the client to read."""
_CALLS_IN_A_ROW = 256
"""Instant ones, before other streams have their turn."""


def pipeline_handler(service: StoreService, reception: Reception) -> grpc.GenericRpcHandler:
    """The RPC `Pipeline`, for `grpc.aio.Server.add_generic_rpc_handlers`."""

    async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
        session = _Session(service, reception, context)
        try:
            service.refuse_while_draining()
            await session.run(requests)
        except (RemoteStoreError, ValueError) as error:
            await abort(context, to_failure(error))

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(handle)
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Pipeline": handler})


class _Session:
    """One stream."""

    def __init__(self, service: StoreService, reception: Reception, context: Context) -> None:
        self._service = service
        self._line = reception.line(context)
        self._context = context
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._unsent: deque[pb.PipelineResponse] = deque()
        """Messages that are to go; the last one takes further outcomes until it is full."""
        self._sizes: deque[int] = deque()
        """Of each, what its outcomes have, in bytes."""
        self._unsent_bytes = 0
        self._closing: pb.StreamClosing | None = None
        self._writer: asyncio.Task[None] | None = None

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Answer calls until the client has made its last.

        Raises:
            ValueError: What came is no request, or names two calls alike.
            LimitExceededError: It is too large.
            OverloadedError: Too many calls are under way.
        """
        self._service.streams.add(self, None)
        try:
            async for data in requests:
                await self._take(_parse(data))
            while self._tasks:
                await asyncio.wait(self._tasks.values())
            if self._writer is not None:
                await self._writer
        except Exception:
            if self._writer is not None:
                # gRPC sends no status while a message is on its way, whether or not somebody waits for that any more
                await asyncio.wait({self._writer}, timeout=_LAST_WRITE_SECONDS)
            raise
        finally:
            self._service.streams.discard(self, None)
            left = [*self._tasks.values(), *([] if self._writer is None else [self._writer])]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def close(
        self, reason: pb.CloseReason.ValueType, message: str, last_word: WorkerCommand | None = None
    ) -> None:
        """Tell the client to make further calls elsewhere. It ends the stream when it has its answers."""
        self._closing = pb.StreamClosing(reason=reason, message=message)
        self._write()

    async def _take(self, message: pb.PipelineRequest) -> None:
        await self._cancel(message.cancelled_call_ids)
        for number, call in enumerate(message.calls, 1):
            while self._unsent_bytes > _UNSENT_BYTES and self._writer is not None:
                await asyncio.shield(self._writer)
            if number % _CALLS_IN_A_ROW == 0:
                await asyncio.sleep(0)
            call_id, method, request = call.call_id, call.method, call.request
            if call_id in self._tasks:
                raise ValueError(f"call_id {call_id} names a call that is under way")
            if self._service.is_instant(method, request):
                await self._serve(call_id, method, request)
                continue
            if len(self._tasks) >= _MAX_CALLS:
                raise OverloadedError(f"{_MAX_CALLS} calls are under way on this stream already")
            task = asyncio.get_running_loop().create_task(self._serve(call_id, method, request))
            self._tasks[call_id] = task
            task.add_done_callback(partial(self._forget, call_id))

    async def _cancel(self, call_ids: Sequence[int]) -> None:
        """End calls before others begin: a claim that nobody waits for must not get what is enqueued next."""
        cancelled = [self._tasks[call_id] for call_id in call_ids if call_id in self._tasks]
        for task in cancelled:
            task.cancel()
        if cancelled:
            await asyncio.wait(cancelled, timeout=_CANCELLATION_SECONDS)

    async def _serve(self, call_id: int, method: str, request: bytes) -> None:
        if self._service.has(method):
            outcome = await self._line.receive(
                f"/{SERVICE_NAME}/{method}", len(request), partial(self._service.answer, method, request)
            )
        else:  # nobody hears of it, as of single calls: a name that a client made up is nothing for logs and metrics
            outcome = to_failure(
                NotImplementedError(
                    f"{SERVICE_NAME} has no RPC {method[:100]!r} with one request and one response, nor such a query, "
                    "and no other goes through a pipeline"
                )
            )
        self._put(call_id, outcome)
        self._write()

    def _forget(self, call_id: int, _: asyncio.Task[None]) -> None:
        del self._tasks[call_id]

    def _write(self) -> None:
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_all())

    async def _write_all(self) -> None:
        """Send what is unsent. While one message is on its way, what is to be in the next comes together."""
        try:
            while self._unsent or self._closing is not None:
                message = self._unsent.popleft() if self._unsent else pb.PipelineResponse()
                self._unsent_bytes -= self._sizes.popleft() if self._sizes else 0
                if self._closing is not None:
                    message.closing.CopyFrom(self._closing)
                    self._closing = None
                await self._context.write(message.SerializeToString())
        except grpc.aio.BaseError as error:  # the client is gone, which ends what reads from it as well
            logger.debug("a pipeline broke: %s", error)
        finally:
            self._writer = None

    def _put(self, call_id: int, outcome: Outcome) -> None:
        if not self._unsent or self._sizes[-1] > _MESSAGE_BYTES:
            self._unsent.append(pb.PipelineResponse())
            self._sizes.append(0)
        # set there, where it need not be copied
        answer = self._unsent[-1].outcomes.add(call_id=call_id)
        if isinstance(outcome, Failure):
            answer.failure.status_code = outcome.status.value[0]
            answer.failure.message = outcome.message
            answer.failure.detail.MergeFromString(outcome.detail)
        elif len(outcome) > SHARED_RESPONSE_BYTES:
            answer.too_large = True
        else:
            answer.response = outcome
        size_bytes = answer.ByteSize()
        self._sizes[-1] += size_bytes
        self._unsent_bytes += size_bytes


def _parse(data: bytes) -> pb.PipelineRequest:
    if len(data) > _MAX_REQUEST_BYTES:
        raise LimitExceededError(
            f"a message of a pipeline has at most {_MAX_REQUEST_BYTES} bytes, and this one has {len(data)}; send fewer "
            "calls in one, and large ones by themselves"
        )
    try:
        return pb.PipelineRequest.FromString(data)
    except DecodeError:
        raise ValueError("the request is not a lightningpb.v1.PipelineRequest") from None
