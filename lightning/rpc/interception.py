"""What is done with every call, of whatever service and shape, before and around its handler.

arrives ─▶ guard: who calls, and may they? ─▶ admission: is there room? ─▶ handler
   └─────────────────── observers: what came of it, and what did it cost? ───────┘
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc.aio import ServicerContext

from lightning.rpc.admission import Admission, Place
from lightning.rpc.errors import Failure, RemoteStoreError, abort, to_failure
from lightning.rpc.repeats import Outcome
from lightning.rpc.security import Caller, Guard

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

Context = ServicerContext[Any, Any]

_CARRIERS = frozenset({"/lightningpb.v1.LightningStoreService/Pipeline"})


@dataclass
class Call:
    """A call that is under way."""

    method: str
    """The full name of the RPC, as `/package.Service/Method`."""
    is_stream: bool
    """Whether it may have more than one request or response."""
    caller: Caller | None = None
    """Who calls, where tokens are asked for."""
    peer: str = ""
    """Where it comes from, in gRPC's words."""
    certificate_name: str | None = None
    """The common name in the caller's certificate, where one was asked for."""
    received_bytes: int = 0
    held_bytes: int = 0
    """What of that is being worked on, as `Admission` counts it."""
    sent_bytes: int = 0
    code: grpc.StatusCode = grpc.StatusCode.OK
    """How it ended."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.perf_counter() - self.started

    @property
    def is_carrier(self) -> bool:
        """Whether it is a stream of other calls, each of which is received by itself, see `Line`."""
        return self.method in _CARRIERS

    @property
    def client(self) -> str:
        """Who is behind it, as well as is known: the token's name, the certificate's, or the host."""
        if self.caller is not None:
            return self.caller.name
        return self.certificate_name or self.peer.rpartition(":")[0]


class Observer(Protocol):
    """Somebody who wants to know what came of the calls."""

    def begun(self, call: Call, /) -> None:
        """A call arrived."""

    def ended(self, call: Call, /) -> None:
        """It is over."""


class Reception(grpc.aio.ServerInterceptor):
    """Receives calls for all services of a server.

    Args:
        guard: Decides who may call what; None lets everybody in.
        admission: Decides whether there is room.
        observers: Hear of each call.
        certificates: Whether clients are asked for certificates.
    """

    def __init__(
        self, guard: Guard | None, admission: Admission, observers: Sequence[Observer], *, certificates: bool
    ) -> None:
        self._guard = guard
        self._certificates = certificates
        self._admission = admission
        self._observers = observers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler: Any = await continuation(details)
        if handler is None:
            return None
        method = details.method
        call = Call(method, handler.request_streaming or handler.response_streaming)
        try:
            if self._guard is not None:
                call.caller = self._guard.identify(method, details.invocation_metadata or ())
                self._guard.authorize(method, call.caller)
        except RemoteStoreError as error:
            return self._refusal(call, error)
        return self._around(handler, call)

    def line(self, context: Context) -> Line:
        """Where calls come in that share the stream of `context`."""
        return Line(self._guard, self._admission, self._observers, context, certificates=self._certificates)

    def _refusal(self, call: Call, error: RemoteStoreError) -> Handler:
        # as a stream, whatever the method is, for that reads nothing of the request
        async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
            with self._visit(call, context):
                await abort(context, to_failure(error))

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _around(self, handler: Any, call: Call) -> Handler:
        """The handler, for this one call, with what is done around it."""
        shape = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        inner = getattr(handler, shape)
        receive = _counting(call, "received_bytes", handler.request_deserializer, before=True)
        send = _counting(call, "sent_bytes", handler.response_serializer, before=False)

        def begin(request: Any, context: Context) -> Any:
            held = handler.request_streaming and not call.is_carrier
            return inner(self._admission.held(request, call) if held else request, context)

        async def one_response(request: Any, context: Context) -> Any:
            with self._visit(call, context), await self._admitted(call, context):
                outcome = begin(request, context)
                response = await outcome if hasattr(outcome, "__await__") else outcome
                return send(response)  # here, for gRPC would do so when the call is over

        async def many_responses(request: Any, context: Context) -> None:
            with self._visit(call, context), await self._admitted(call, context):
                outcome = begin(request, context)
                if hasattr(outcome, "__await__"):  # it writes them itself
                    await outcome
                    return
                async for response in outcome:
                    await context.write(response)

        make = getattr(grpc, f"{shape}_rpc_method_handler")
        wrapped: Handler = (
            make(many_responses, request_deserializer=receive, response_serializer=send)
            if handler.response_streaming
            else make(one_response, request_deserializer=receive)
        )
        return wrapped

    def _visit(self, call: Call, context: Context) -> _Visit:
        return _Visit(call, context, self._observers, self._certificates)

    async def _admitted(self, call: Call, context: Context) -> Place:
        """Room for a call, or the end of it."""
        try:
            return self._admission.enter(call)
        except RemoteStoreError as error:
            await abort(context, to_failure(error))


class Line:
    """Receives the calls that come by one stream, each as if it came by itself. See `Reception.line`."""

    def __init__(
        self,
        guard: Guard | None,
        admission: Admission,
        observers: Sequence[Observer],
        context: Context,
        *,
        certificates: bool,
    ) -> None:
        self._guard = guard
        self._admission = admission
        self._observers = observers
        self._metadata = context.invocation_metadata() or ()
        self._peer = context.peer()
        self._certificate_name = _certificate_name(context) if certificates else None

    async def receive(
        self, method: str, request_bytes: int, answer: Callable[[], Awaitable[Outcome]]
    ) -> Outcome:
        """Have a call answered, if it may be and there is room.

        Args:
            method: The full name of the RPC.
            request_bytes: The size of the request.
            answer: Makes the outcome.
        """
        call = Call(
            method,
            False,
            peer=self._peer,
            certificate_name=self._certificate_name,
            received_bytes=request_bytes,
        )
        for observer in self._observers:
            observer.begun(call)
        call.code = grpc.StatusCode.CANCELLED  # unless it comes to an end
        try:
            outcome = await self._outcome(call, answer)
            if isinstance(outcome, Failure):
                call.code = outcome.status
            else:
                call.code, call.sent_bytes = grpc.StatusCode.OK, len(outcome)
            return outcome
        finally:
            for observer in self._observers:
                observer.ended(call)

    async def _outcome(self, call: Call, answer: Callable[[], Awaitable[Outcome]]) -> Outcome:
        try:
            if self._guard is not None:
                call.caller = self._guard.identify(call.method, self._metadata)
                self._guard.authorize(call.method, call.caller)
            with self._admission.enter(call):
                return await answer()
        except Exception as error:  # noqa: BLE001  # as for a single call, nothing but its outcome is lost
            return to_failure(error)


class _Visit:
    """A call, from when its handler begins until that has ended, however it does."""

    __slots__ = ("_call", "_certificates", "_context", "_observers")

    def __init__(
        self, call: Call, context: Context, observers: Sequence[Observer], certificates: bool
    ) -> None:
        self._call = call
        self._context = context
        self._observers = observers
        self._certificates = certificates

    def __enter__(self) -> None:
        call = self._call
        call.peer = self._context.peer()
        if self._certificates:
            call.certificate_name = _certificate_name(self._context)
        for observer in self._observers:
            observer.begun(call)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        call = self._call
        if kind is None:
            call.code = self._code(grpc.StatusCode.OK)
        elif issubclass(kind, asyncio.CancelledError):
            call.code = grpc.StatusCode.CANCELLED
        else:
            call.code = self._code(grpc.StatusCode.UNKNOWN)
        for observer in self._observers:
            observer.ended(call)

    def _code(self, otherwise: grpc.StatusCode) -> grpc.StatusCode:
        """The status that the handler set, if it set one."""
        code: Any = self._context.code()  # gRPC hands out both numbers and members
        return _CODES.get(code, code) if code else otherwise


def _certificate_name(context: Context) -> str | None:
    names = list(context.auth_context().get("x509_common_name", ()))
    return names[0].decode("utf-8", "replace") if names else None


_CODES: dict[Any, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _counting(
    call: Call, count: str, convert: Callable[[Any], Any] | None, *, before: bool
) -> Callable[[Any], Any]:
    """A serializer or deserializer that adds to the bytes of a call: of what it is given, or of what it makes of it."""

    def counting(message: Any) -> Any:
        converted = message if convert is None else convert(message)
        setattr(call, count, getattr(call, count) + len(message if before else converted))
        return converted

    return counting
