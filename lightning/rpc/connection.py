"""A client's connection: one channel per process, with retries, health probes and a deadline on every call.

Everything here runs on the process's event loop for gRPC; `Connection`'s public coroutines may be awaited from any.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import grpc.aio
from grpc.aio import AioRpcError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lightningpb.v1 import store_service_pb2 as pb
from lightningpb.v1.store_service_pb2_grpc import LightningStoreServiceStub

from lightning.rpc import loop
from lightning.rpc.address import Endpoint
from lightning.rpc.credentials import BearerChannel
from lightning.rpc.errors import (
    StoreDrainingError,
    StoreUnavailableError,
    from_status,
    is_connection_failure,
    is_draining,
    is_overloaded,
    tls_problem,
)
from lightning.rpc.options import ClientOptions
from lightning.rpc.pipeline import GoAlone, Pipeline
from lightning.rpc.rollout_watches import ClientWatch
from lightning.rpc.sessions import CommandSession
from lightning.rpc.span_sender import SpanSender
from lightning.types import RolloutEvent, WorkerCommand

T = TypeVar("T")

_SERVICE = pb.DESCRIPTOR.services_by_name["LightningStoreService"].full_name
_MIN_PROBE_PAUSE_SECONDS = 0.05
_MAX_PROBE_PAUSE_SECONDS = 1.0
_JITTER = 0.2
"""Clients that lost the same server come back within this part of the delay before and after it, not all at once."""
_QUERY_TIMEOUT_FACTOR = 10
"""A result in many messages may take this much longer than a single answer."""


class Connection:
    """What a client has in one process.

    Args:
        endpoint: The server.
        options: The client's.
    """

    def __init__(self, endpoint: Endpoint, options: ClientOptions) -> None:
        self.endpoint = endpoint
        self.options = options
        self.pid = os.getpid()
        self._thread = loop.acquire()
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._bearing: Any = None
        self._stream_spans: Any = None
        self._health: Any = None
        self._sessions: dict[tuple[str, str | None], CommandSession] = {}
        self._span_sender: SpanSender | None = None
        self._watches: dict[int, ClientWatch] = {}
        self._watch_keys = itertools.count()
        self._shown = options.credentials.metadata()
        self._pipeline = Pipeline(
            self._thread, lambda: self.stub().Pipeline(), self._shown, self.closed_error
        )
        self._query_timeout = options.request_timeout * _QUERY_TIMEOUT_FACTOR
        self._closed = False
        self._last_failure: AioRpcError | None = None

    # --- From any event loop ---

    async def unary(self, method: str, request: bytes, timeout: float) -> bytes:
        """Call a method with one answer, which is returned.

        Args:
            method: Its name.
            request: Its request, serialised. It is sent again as it is if the call must be repeated.
            timeout: The deadline of one try, in seconds.

        Raises:
            StoreUnavailableError: The server stayed away.
            Exception: What the store raised.
        """
        self._check_open()

        async def attempt() -> bytes:
            if self._pipeline.takes(method, request):
                with suppress(GoAlone):
                    return await self._pipeline.call(method, request, timeout)
            answer = await self._thread.run(self._alone(method, request, timeout))
            self._pipeline.went_alone(method, len(answer))
            return answer

        return await self.retrying(attempt)

    async def collect(self, method: str, request: bytes, take: Callable[[bytes], T]) -> list[T]:
        """Call a method with a stream of answers, or with all of them in one.

        Args:
            method: Its name.
            request: Its request, serialised.
            take: What to make of each answer, serialised. Meanwhile the next one is on its way.

        Raises:
            StoreUnavailableError: The server stayed away.
            Exception: What the store or `take` raised.
        """
        self._check_open()

        async def attempt() -> list[T]:
            if self._pipeline.takes(method, request):
                with suppress(GoAlone):
                    return [take(await self._pipeline.call(method, request, self._query_timeout))]
            taken: list[T] = []
            size_bytes = 0
            stream, answer = await self._thread.run(self._begin(method, request))
            try:
                while answer is not grpc.aio.EOF:
                    following = self._thread.submit(stream.read())
                    size_bytes += len(answer)
                    taken.append(take(answer))
                    answer = await asyncio.wrap_future(following)
            except BaseException:
                with suppress(RuntimeError):  # the loop ended, and the stream with it
                    self._thread.call_soon(stream.cancel)
                raise
            self._pipeline.went_alone(method, size_bytes)
            return taken

        return await self.retrying(attempt)

    async def receive_commands(
        self, worker_id: str, instance_id: str | None, timeout: float | None
    ) -> Sequence[WorkerCommand]:
        """What a worker is told, see `LightningStore.receive_commands`. Raises as `unary`."""
        return await self._run(self._receive_commands(worker_id, instance_id, timeout))

    async def deliver_spans(self, spans: Sequence[bytes]) -> int:
        """Store encoded spans, see `LightningStore.deliver_spans`. Raises as `unary`."""
        return await self._run(self._deliver_spans(spans))

    async def open_watch(self, rollout_ids: Sequence[str], after_revision: int | None) -> int:
        """Begin to watch rollouts, see `LightningStore.watch_rollouts`; the key for the two calls below."""
        return await self._run(self._open_watch(rollout_ids, after_revision))

    async def next_event(self, key: int) -> RolloutEvent | None:
        """The next event of a watch; None: there will be none. Raises as `unary`."""
        return await self._run(self._watches[key].next())

    async def close_watch(self, key: int) -> None:
        """End a watch."""
        await self._run(self._close_watch(key))

    async def wait_until_ready(self, timeout: float | None) -> None:
        """Return when the server answers health checks. Raises `StoreUnavailableError` after `timeout` seconds."""
        await self._run(self._wait_until_ready(timeout))

    async def close(self) -> None:
        """Close the channel; calls in flight fail. To be called once."""
        self._closed = True
        try:
            await self._thread.run(self._close())
        finally:
            loop.release()

    def abandon(self) -> None:
        """`close`, from wherever the garbage collector found that nobody uses the connection any more."""
        if not self._closed and self.pid == os.getpid() and not self._thread.stopped:
            self._closed = True
            self._thread.submit(self._close()).add_done_callback(lambda _: loop.release())

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    async def _run(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_open()
        except RuntimeError:
            call.close()
            raise
        return await self._thread.run(call)

    def _check_open(self) -> None:
        if self._closed:
            raise self.closed_error()

    # --- On the loop of gRPC ---

    def stub(self) -> Any:
        """The methods; the channel is made when they are first asked for, for it belongs to the loop it is made on."""
        if self._stub is None:
            credentials = self.options.credentials
            self._channel = credentials.open_channel(
                self.endpoint, self.options.channel_options(self.endpoint)
            )
            bearing: Any = BearerChannel(self._channel, self._shown)
            self._bearing = bearing
            self._stub = LightningStoreServiceStub(bearing)
            self._stream_spans = bearing.stream_stream(
                _path("StreamSpans"), response_deserializer=pb.StreamSpansResponse.FromString
            )
            self._health = health_pb2_grpc.HealthStub(self._channel)
        return self._stub

    def stream_spans_call(self) -> Any:
        """`StreamSpans`, for requests that are bytes already."""
        self.stub()
        return self._stream_spans

    async def retrying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Do something that may fail because the server is away, and do it again when it is back. On any loop; what is
        repeated is so on that of gRPC."""
        try:
            try:
                return await attempt()
            except AioRpcError as error:
                return await self._thread.run(self._retry(attempt, error))
        except (asyncio.CancelledError, grpc.aio.UsageError):
            if self._closed:  # which ends calls in flight by the one, and fails new ones by the other
                raise self.closed_error() from None
            raise

    async def _retry(self, attempt: Callable[[], Awaitable[T]], error: AioRpcError) -> T:
        started = time.monotonic()
        for delay in self.options.retry_delays:
            self._raise_unless_repeatable(error)
            await asyncio.sleep(delay * random.uniform(1 - _JITTER, 1 + _JITTER))
            if not await self._becomes_healthy():
                continue
            try:
                return await attempt()
            except AioRpcError as next_error:
                error = next_error
        self._raise_unless_repeatable(error)
        raise self._unavailable(error, time.monotonic() - started)

    def _raise_unless_repeatable(self, error: AioRpcError) -> None:
        if self._closed:
            raise self.closed_error()
        if not is_connection_failure(error):
            raise from_status(error, str(self.endpoint))
        self._raise_if_untrusted(error)

    async def _alone(self, method: str, request: bytes, timeout: float) -> bytes:
        self.stub()
        call: Any = self._bearing.unary_unary(_path(method))
        response: bytes = await call(request, timeout=timeout)
        return response

    async def _begin(self, method: str, request: bytes) -> tuple[Any, Any]:
        """A stream of answers, and the first of them."""
        self.stub()
        call: Any = self._bearing.unary_stream(_path(method))
        stream = call(request, timeout=self._query_timeout)
        return stream, await stream.read()

    async def _receive_commands(
        self, worker_id: str, instance_id: str | None, timeout: float | None
    ) -> Sequence[WorkerCommand]:
        key = (worker_id, instance_id)
        session = self._sessions.get(key)
        if session is None or session.ended:
            session = self._sessions[key] = CommandSession(self, worker_id, instance_id)
            session.add_end_callback(lambda: self._forget_session(key))
        return await session.receive(timeout)

    async def _deliver_spans(self, spans: Sequence[bytes]) -> int:
        if self._span_sender is None:
            self._span_sender = SpanSender(self)
        return await self._span_sender.deliver(spans)

    async def _open_watch(self, rollout_ids: Sequence[str], after_revision: int | None) -> int:
        key = next(self._watch_keys)
        self._watches[key] = ClientWatch(self, rollout_ids, after_revision)
        return key

    async def _close_watch(self, key: int) -> None:
        await self._watches.pop(key).close()

    def _forget_session(self, key: tuple[str, str | None]) -> None:
        session = self._sessions.get(key)
        if session is not None and session.ended:
            del self._sessions[key]

    async def _becomes_healthy(self) -> bool:
        for pause in (*self.options.health_retry_delays, None):
            if await self._is_healthy():
                return True
            if pause is not None:
                await asyncio.sleep(pause)
        return False

    async def _is_healthy(self) -> bool:
        self.stub()
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            answer = await self._health.Check(request, timeout=self.options.connection_timeout)
        except AioRpcError as error:
            self._raise_if_untrusted(error)
            self._last_failure = error
            return False
        serving: bool = answer.status == health_pb2.HealthCheckResponse.SERVING
        return serving

    def _raise_if_untrusted(self, error: AioRpcError) -> None:
        problem = tls_problem(error, self.endpoint)
        if problem is not None:
            raise problem from None

    async def _wait_until_ready(self, timeout: float | None) -> None:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        pause = _MIN_PROBE_PAUSE_SECONDS
        while not await self._is_healthy():
            rest = deadline - time.monotonic()
            if rest <= 0:
                raise StoreUnavailableError(
                    f"no store answered at {self.endpoint} in time ({timeout} s). {self._advice(self._last_failure)}"
                )
            await asyncio.sleep(min(pause, rest))
            pause = min(2 * pause, _MAX_PROBE_PAUSE_SECONDS)

    async def _close(self) -> None:
        for session in list(self._sessions.values()):
            await session.close()
        for watch in list(self._watches.values()):
            await watch.close()
        if self._span_sender is not None:
            await self._span_sender.close()
        await self._pipeline.close()
        channel, self._channel, self._stub, self._health = self._channel, None, None, None
        if channel is not None:
            await channel.close()

    def closed_error(self) -> RuntimeError:
        """What calls raise after `close`."""
        return RuntimeError(f"the client of {self.endpoint} was closed")

    def _unavailable(self, error: AioRpcError, seconds: float) -> Exception:
        if is_overloaded(error):
            return from_status(error, str(self.endpoint))
        tries = len(self.options.retry_delays) + 1
        kind = StoreDrainingError if is_draining(error) else StoreUnavailableError
        return kind(
            f"the store at {self.endpoint} is unavailable: {error.details() or error.code().name} "
            f"({tries} tries, {seconds:.0f} s). {self._advice(error)}"
        )

    def _advice(self, error: AioRpcError | None) -> str:
        advice = "Is the address right, and is `lightning store` running there?"
        if error is None or "Socket closed" not in (error.details() or ""):
            return advice
        if self.endpoint.secure:  # the server does not tell why
            return f"{advice} If it asks for a certificate of clients: are tls_cert and tls_key given, and still valid?"
        return f"{advice} If it speaks TLS, the address begins with grpcs://."


def _path(method: str) -> str:
    return f"/{_SERVICE}/{method}"
