"""Between gRPC and the handlers: what every call has in common.

A call is refused while the server drains, run once however often it is repeated, limited in size, and answered with a
status from the table of errors if it fails.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc.aio import ServicerContext
from lightningpb.v1 import store_service_pb2 as pb

from lightning.rpc.errors import (
    Failure,
    LimitExceededError,
    StoreDrainingError,
    abort,
    to_failure,
)
from lightning.rpc.handlers import QUERY_HANDLERS, UNARY_HANDLERS, QueryHandler, UnaryHandler
from lightning.rpc.options import ServerLimits
from lightning.rpc.otlp import OTLP_HANDLERS, OTLP_SERVICE
from lightning.rpc.repeats import Outcome, RepeatTable
from lightning.rpc.requests import reader
from lightning.rpc.rollout_watches import watch_rollouts
from lightning.rpc.span_sessions import SpanSessions, stream_spans
from lightning.rpc.streams import OpenStreams
from lightning.rpc.worker_sessions import worker_session
from lightning.store.backends import InMemoryLightningStore
from lightning.store.contract import LightningStore
from lightning.store.idempotency import request as request_scope
from lightning.types import WorkerCommand

T = TypeVar("T")
Context = ServicerContext[Any, Any]

SERVICE = pb.DESCRIPTOR.services_by_name["LightningStoreService"]
SERVICE_NAME = SERVICE.full_name
SERVED = (SERVICE_NAME, OTLP_SERVICE.full_name)
"""The services that are answered here."""

_MAY_WAIT: dict[str, Callable[[Any], bool]] = {
    "DequeueRollouts": lambda request: request.wait_seconds > 0,
    "WaitForRollouts": lambda request: True,
}
"""Calls that wait until there is something to answer, if the request says so."""
SHARED_RESPONSE_BYTES = 256 * 1024
"""What is larger has to be asked for by a call of its own: in a pipeline it would hold up the others."""
_MAX_REQUEST_ID_LENGTH = 256
"""Clients choose their request ids, and the server keeps them for a while."""


async def _found(query: QueryHandler, service: StoreService, request: Any) -> AsyncGenerator[bytes, None]:
    for message in (await query(service, request)).messages():
        yield message


async def _found_in_one(query: QueryHandler, service: StoreService, request: Any) -> bytes:
    """All messages of a query's result as one, which they make if written one after the other. Of a result that is too
    large for a pipeline, one message that is so, too."""
    taken: list[bytes] = []
    for message in (await query(service, request)).messages():
        taken.append(message)
        if sum(map(len, taken)) > SHARED_RESPONSE_BYTES:
            return max(taken, key=len)  # of two, one is nearly half as large as a message may get
    return b"".join(taken)


class StreamHandler(Protocol):
    """Many requests, many responses."""

    def __call__(
        self, service: StoreService, requests: AsyncIterator[Any], /
    ) -> AsyncGenerator[Message, None]: ...


class AnswerHandler(Protocol):
    """One request, many responses, or serialised ones."""

    def __call__(self, service: StoreService, request: Any, /) -> AsyncGenerator[Message | bytes, None]: ...


ANSWER_HANDLERS: dict[str, AnswerHandler] = {
    "WatchRollouts": watch_rollouts,
    **{name: partial(_found, query) for name, query in QUERY_HANDLERS.items()},
}
STREAM_HANDLERS: dict[str, StreamHandler] = {"StreamSpans": stream_spans, "WorkerSession": worker_session}


class _InFlight:
    """Counts the calls that are in flight: each is inside while it is."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        """Set while there are none."""
        self.ended.set()
        self._count = 0

    def __enter__(self) -> None:
        self._count += 1
        self.ended.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self.ended.set()


class StoreService:
    """Serves one store. Belongs to the event loop that it is made on.

    Args:
        store: Where the calls go.
        store_class: The name of the class of the store, for `GetServerInfo`.
        limits: What a caller may ask for.
        suspect: Hears of what the store raises.
    """

    def __init__(
        self,
        store: LightningStore,
        store_class: str,
        limits: ServerLimits,
        suspect: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.store = store
        self.store_class = store_class
        self.limits = limits
        self._suspect = suspect
        self.instant = type(store) is InMemoryLightningStore and store.instant
        """Whether no verb that changes something suspends in its middle. Of derived classes nothing is known."""
        self.instance_id = uuid.uuid4().hex
        self.streams = OpenStreams(limits.max_connection_age)
        self.span_sessions = SpanSessions(
            max_bytes=limits.remembered_bytes, keep_seconds=limits.remembered_seconds
        )
        self._repeats = RepeatTable(max_bytes=limits.remembered_bytes, keep_seconds=limits.remembered_seconds)
        self._drain_reason: str | None = None
        self._waiting: set[asyncio.Future[Any]] = set()
        self._in_flight = _InFlight()
        self._answers = {
            **{name: self._admitted(SERVICE, name, handler) for name, handler in UNARY_HANDLERS.items()},
            **{
                name: self._admitted(SERVICE, name, partial(_found_in_one, query))
                for name, query in QUERY_HANDLERS.items()
            },
        }

    # --- For the handlers ---

    def bounded_wait(self, seconds: float) -> float:
        """How long a call that asks to wait so long is kept waiting at most."""
        return min(seconds, self.limits.max_wait_seconds)

    async def interruptible(self, wait: Coroutine[Any, Any, T], interrupted: T) -> T:
        """Await something that may take long; the beginning of a drain ends it, with `interrupted` as the result."""
        if self._drain_reason is not None:
            wait.close()
            return interrupted
        task = asyncio.ensure_future(wait)
        self._waiting.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self._drain_reason is None:
                raise
            return interrupted
        finally:
            self._waiting.discard(task)

    # --- For pipelines ---

    async def answer(self, method: str, data: bytes) -> Outcome:
        """What comes of a call that came by a pipeline: the name of an RPC that it `has`, and its request."""
        with self._in_flight:
            return await self._answers[method](data)

    def has(self, method: str) -> bool:
        """Whether a call by a pipeline may name this RPC, without its service."""
        return method in self._answers

    def is_instant(self, method: str, data: bytes) -> bool:
        """Whether `answer` has this outcome without waiting for anything."""
        if not self.instant or method not in _MAY_WAIT:
            return self.instant
        try:
            return not _MAY_WAIT[method](reader(SERVICE, method)(data))
        except ValueError:
            return True  # to be refused

    def refuse_while_draining(self) -> None:
        """Raises `StoreDrainingError` when no new calls are taken."""
        if self._drain_reason is not None:
            raise StoreDrainingError(f"the server is shutting down: {self._drain_reason}")

    # --- For the server ---

    def generic_handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """All RPCs of the services that are answered here, for `grpc.aio.Server.add_generic_rpc_handlers`."""
        # Messages are parsed and serialised here rather than by gRPC, which would not say what is wrong with one.
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, handler in UNARY_HANDLERS.items():
            handlers[name] = self._unary(SERVICE, name, handler)
        for name, answer in ANSWER_HANDLERS.items():
            handlers[name] = grpc.unary_stream_rpc_method_handler(self._answer(name, answer))
        for name, stream in STREAM_HANDLERS.items():
            handlers[name] = grpc.stream_stream_rpc_method_handler(self._stream(name, stream))
        otlp = {name: self._unary(OTLP_SERVICE, name, handler) for name, handler in OTLP_HANDLERS.items()}
        return (
            grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),
            grpc.method_handlers_generic_handler(OTLP_SERVICE.full_name, otlp),
        )

    async def drain(self, reason: str, grace: float, last_word: WorkerCommand | None) -> None:
        """Refuse new calls, end those that wait, close streams, and let the rest finish for `grace` seconds.

        Workers that listen are given the `last_word` if there is one.
        """
        self._drain_reason = reason
        for task in self._waiting:
            task.cancel()
        self.streams.close_all(pb.CLOSE_REASON_DRAINING, reason, last_word)
        with suppress(asyncio.TimeoutError):  # the server cancels what does not finish in time
            await asyncio.wait_for(self._in_flight.ended.wait(), grace)

    async def close(self) -> None:
        """Cancel what is left after a drain."""
        await self.span_sessions.close()
        await self._repeats.close()

    # --- The three shapes of calls ---

    def _unary(
        self, of: ServiceDescriptor, name: str, handler: UnaryHandler
    ) -> grpc.RpcMethodHandler[Any, Any]:
        answer = self._admitted(of, name, handler)

        async def handle(data: bytes, context: Context) -> bytes:
            with self._in_flight:
                outcome = await answer(data)
                if isinstance(outcome, Failure):
                    await abort(context, outcome)
                return outcome

        return grpc.unary_unary_rpc_method_handler(handle)

    def _admitted(
        self,
        of: ServiceDescriptor,
        name: str,
        handler: Callable[[StoreService, Any], Awaitable[Message | bytes]],
    ) -> Callable[[bytes], Awaitable[Outcome]]:
        """What makes an outcome of a serialised request."""
        read = reader(of, name)
        changes_something = "request_id" in of.methods_by_name[name].input_type.fields_by_name

        async def run(request: Any) -> Outcome:
            try:
                return self._serialised(await handler(self, request))
            except Exception as error:  # noqa: BLE001  # the client hears of each, the log of the unexpected
                self._suspect(error)
                return to_failure(error)

        async def run_once(request: Any) -> Outcome:
            with request_scope(request.request_id):
                return await run(request)

        async def admit(data: bytes) -> Outcome:
            try:
                self.refuse_while_draining()
                request = read(data)
            except (StoreDrainingError, ValueError) as error:
                return to_failure(error)
            if not changes_something or not request.request_id:
                return await run(request)
            if len(request.request_id) > _MAX_REQUEST_ID_LENGTH:
                return to_failure(
                    ValueError(f"request_id is longer than {_MAX_REQUEST_ID_LENGTH} characters")
                )
            key = (name, request.request_id)
            # a claim that waits for work must not go on waiting when the runner is gone
            waits = name in _MAY_WAIT and _MAY_WAIT[name](request)
            return await self._repeats.run(
                key, lambda: run_once(request), abandonable=waits, instant=self.instant and not waits
            )

        return admit

    def _answer(self, name: str, handler: AnswerHandler) -> Callable[..., Awaitable[None]]:
        read = reader(SERVICE, name)

        async def answer(data: bytes) -> AsyncGenerator[bytes, None]:
            self.refuse_while_draining()
            async with aclosing(handler(self, read(data))) as messages:
                async for message in messages:
                    yield self._serialised(message)

        async def handle(data: bytes, context: Context) -> None:
            await self._send_all(answer(data), context)

        return handle

    def _stream(self, name: str, handler: StreamHandler) -> Callable[..., Awaitable[None]]:
        read = reader(SERVICE, name)

        async def parsed(requests: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
            async for data in requests:
                yield read(data)

        async def answer(requests: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
            self.refuse_while_draining()
            async with aclosing(handler(self, parsed(requests))) as responses:
                async for response in responses:
                    yield self._serialised(response)

        async def handle(requests: AsyncIterator[bytes], context: Context) -> None:
            await self._send_all(answer(requests), context)

        return handle

    async def _send_all(self, responses: AsyncGenerator[bytes, None], context: Context) -> None:
        """Send what a stream's handler yields, and at last how it failed if it does."""
        with self._in_flight:
            async with aclosing(responses):
                while True:
                    try:
                        response = await anext(responses)
                    except StopAsyncIteration:
                        return
                    except Exception as error:  # noqa: BLE001  # as for unary calls
                        self._suspect(error)
                        failure = to_failure(error)
                        break
                    await context.write(response)
            await abort(context, failure)

    def _serialised(self, message: Message | bytes) -> bytes:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        if len(data) > self.limits.max_message_bytes:
            raise LimitExceededError(
                f"the answer has {len(data)} bytes, more than the {self.limits.max_message_bytes} that the server may "
                "send; raise max_message_bytes of LightningStoreServer and LightningStoreClient"
            )
        return data
