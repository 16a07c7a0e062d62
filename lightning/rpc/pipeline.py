"""The client's side of a pipeline: many calls on one stream.

A single call costs gRPC several times what it costs to decode, do and encode it. So calls that are made while others
are being sent go with the next message, and answers come back as they did: the busier a client is the less each call
costs. The same holds for handing calls over to gRPC's event loop, which is done at once for all that are made in one
turn of the caller's loop, and for handing back their answers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc import StatusCode
from grpc.aio import AioRpcError
from lightningpb.v1 import store_service_pb2 as pb

from lightning.rpc.errors import rpc_error, to_rpc_error
from lightning.rpc.loop import end_call
from lightning.store.threaded import LoopThread

if TYPE_CHECKING:
    from lightning.rpc.credentials import Metadata

_SHARED_BYTES = 256 * 1024
"""A larger request goes alone, and so does one with a larger answer: they would hold up the others."""
_MESSAGE_BYTES = 256 * 1024
"""Of requests, in one message, roughly."""
_SHARES = 2
"""Of the calls under way no more than this part goes into one message, so that the server does some while the client
deals with the answers to others. Left alone, all would soon travel as one, and each side wait for the other."""
_FAREWELL_SECONDS = 0.5
"""How long a server has to end a stream when its client is closed, and gRPC to say that it has: what it says after the
end of its loop would disturb the next one of this process."""
_UNIMPLEMENTED = StatusCode.UNIMPLEMENTED.value[0]
"""So an older server says that it takes a method no other way than by itself."""
_NO_ROOM_PAUSE_SECONDS = 10.0
"""How long calls are made one by one when the server has no room for the stream, or knows no pipelines yet."""


class GoAlone(Exception):
    """The call is to be made by itself. Should the server have seen it here already, its request id tells."""


class Pipeline:
    """Makes calls, on one stream at a time. `takes` and `call` may be used on any event loop.

    Args:
        thread: The event loop of gRPC.
        open_stream: Opens a stream.
        shown: What a stream shows of who calls; when that changes, another stream is opened.
        closed_error: Makes what calls raise that are under way when the client is closed.
    """

    def __init__(
        self,
        thread: LoopThread,
        open_stream: Callable[[], Any],
        shown: Callable[[], Metadata | None],
        closed_error: Callable[[], Exception],
    ) -> None:
        self._thread = thread
        self._open_stream = open_stream
        self._shown = shown
        self._closed_error = closed_error
        self._gathered: dict[asyncio.AbstractEventLoop, list[tuple[_Call, bool]]] = {}
        """What callers want in the present turn of their event loops: calls to make, and calls to give up (True)."""
        self._handed_over: deque[tuple[_Call, bool]] = deque()
        """The same, of turns that are over."""
        self._woken = False
        self._line: _Line | None = None
        self._lines: set[_Line] = set()
        """All that are open: those before the present one have answers to come."""
        self._alone: set[str] = set()
        """Methods whose calls go alone: the last answer was too large, or the server takes them nowhere else."""
        self._refused_until = -math.inf
        self._closed = False

    def takes(self, method: str, request: bytes) -> bool:
        """Whether such a call can go by the pipeline now, as far as is known."""
        return (
            len(request) <= _SHARED_BYTES
            and method not in self._alone
            and time.monotonic() >= self._refused_until
        )

    def went_alone(self, method: str, answer_bytes: int) -> None:
        """Hear how large the answer to a call was that was made by itself: the next one may be no larger."""
        if answer_bytes <= _SHARED_BYTES:
            self._alone.discard(method)

    async def call(self, method: str, request: bytes, timeout: float) -> bytes:
        """The response, serialised; to a query, all of it as one message.

        Args:
            method: The RPC's name, without its service.
            request: Serialised.
            timeout: How long to wait for the answer, in seconds.

        Raises:
            GoAlone: The pipeline does not take the call.
            AioRpcError: It failed.
        """
        loop = asyncio.get_running_loop()
        call = _Call(method, request, loop)
        self._hand_over(call, give_up=False)
        timer = loop.call_later(timeout, self._time_out, call)
        try:
            return await call.answer
        except asyncio.CancelledError:
            self._give_up(call)
            raise
        finally:
            timer.cancel()

    async def close(self) -> None:
        """End the streams; calls under way fail, and so do further ones. On the loop of gRPC."""
        self._closed = True
        await asyncio.gather(*(line.close() for line in self._lines))

    def _time_out(self, call: _Call) -> None:
        if not call.answer.done():
            call.answer.set_exception(rpc_error(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
            self._give_up(call)

    def _give_up(self, call: _Call) -> None:
        self._hand_over(call, give_up=True)

    def _hand_over(self, call: _Call, *, give_up: bool) -> None:
        gathered, line = self._gathered.get(call.loop), self._line
        if gathered is not None:
            gathered.append((call, give_up))
        elif line is None or line.is_idle:  # there is nothing to go along with
            self._pass_on([(call, give_up)])
        else:
            self._gathered[call.loop] = [(call, give_up)]
            call.loop.call_soon(self._end_turn, call.loop)

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pass_on(self._gathered.pop(loop))

    def _pass_on(self, wanted: list[tuple[_Call, bool]]) -> None:
        self._handed_over.extend(wanted)
        if self._woken:  # which `_wake` undoes before it looks, so that nothing is overlooked
            return
        self._woken = True
        try:
            self._thread.call_soon(self._wake)
        except RuntimeError:  # the client was closed meanwhile, and all calls with it
            self._woken = False
            _resolve((call.answer, self._closed_error()) for call, give_up in wanted if not give_up)

    # --- On the loop of gRPC ---

    def _wake(self) -> None:
        self._woken = False
        while self._handed_over:
            call, give_up = self._handed_over.popleft()
            if not give_up and self._closed:
                _deliver([(call, self._closed_error())])
            elif not give_up:
                self._present_line().begin(call)
            elif call.line is not None:
                call.line.give_up(call)

    def _present_line(self) -> _Line:
        line, shown = self._line, self._shown()
        if line is None or line.is_retired or line.shown != shown:
            if line is not None:
                line.retire()
            line = self._line = _Line(shown)
            self._lines.add(line)
            line.task = asyncio.get_running_loop().create_task(self._use(line))
        return line

    async def _use(self, line: _Line) -> None:
        """Open a stream, and answer calls from it until it ends."""
        try:
            await line.run(self._open_stream(), self._alone)
        except AioRpcError as error:
            line.fail(self._make_of(error))
        except asyncio.CancelledError:
            line.fail(self._closed_error)
            raise
        except Exception as error:  # noqa: BLE001  # such as that of a certificate that cannot be read
            line.fail(partial(copy, error))
        else:
            line.fail(lambda: rpc_error(StatusCode.UNAVAILABLE, "the server has ended the pipeline"))
        finally:
            if self._line is line:
                self._line = None
            await line.wind_up()
            self._lines.discard(line)

    def _make_of(self, error: AioRpcError) -> Callable[[], Exception]:
        """What makes the error of a call whose stream failed."""
        code = error.code()
        # an older server, which may be replaced; no room, or a message was too large for either side
        if code in (StatusCode.UNIMPLEMENTED, StatusCode.RESOURCE_EXHAUSTED):
            self._refused_until = time.monotonic() + _NO_ROOM_PAUSE_SECONDS
            return GoAlone
        return lambda: rpc_error(code, error.details(), error.trailing_metadata())


class _Call:
    """A call that somebody waits for."""

    __slots__ = ("answer", "call_id", "line", "loop", "method", "request")

    def __init__(self, method: str, request: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.method = method
        self.request = request
        self.loop = loop
        self.answer: asyncio.Future[bytes] = loop.create_future()
        """Belongs to `loop`, the caller's."""
        self.line: _Line | None = None
        self.call_id = 0


class _Line:
    """One stream, and the calls on it that have no answer yet."""

    def __init__(self, shown: Metadata | None) -> None:
        self.shown = shown
        self.is_retired = False
        """Whether no further calls begin here."""
        self.task: asyncio.Task[None]
        self._stream: Any = None
        self._ids = count(1)
        self._calls: dict[int, _Call] = {}
        self._unsent: deque[_Call] = deque()
        self._cancelled_ids: list[int] = []
        self._writer: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there are no calls on it."""
        return not self._calls

    def begin(self, call: _Call) -> None:
        """Make a call."""
        call.line, call.call_id = self, next(self._ids)
        self._calls[call.call_id] = call
        self._unsent.append(call)
        self._write()

    def give_up(self, call: _Call) -> None:
        """Nobody waits for this call any more."""
        if self._calls.pop(call.call_id, None) is not None:
            self._cancelled_ids.append(call.call_id)
            self._write()

    def retire(self) -> None:
        """Begin no further calls, and end the stream when all are answered."""
        self.is_retired = True
        self._write()

    async def close(self) -> None:
        """End the stream: at once if there are calls on it, which end with it, and otherwise as the server sees fit."""
        self.retire()
        if not self._calls and self._stream is not None:
            await asyncio.wait({self.task}, timeout=_FAREWELL_SECONDS)
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def fail(self, error: Callable[[], Exception]) -> None:
        """The stream has ended: so do all calls on it, each with an error of its own."""
        calls, self._calls = self._calls, {}
        self.is_retired = True
        _deliver((call, error()) for call in calls.values())

    async def run(self, stream: Any, alone: set[str]) -> None:
        """Answer calls until the stream ends. Methods whose calls turn out to have to go `alone` are added to those.

        Raises:
            AioRpcError: It broke.
        """
        self._stream = stream
        self._write()
        try:
            while (message := await stream.read()) is not grpc.aio.EOF:
                _deliver(list(self._settle(message, alone)))
                if message.HasField("closing"):
                    self.is_retired = True
                if self.is_retired:
                    self._write()
        finally:
            stream.cancel()

    async def wind_up(self) -> None:
        """After its end, let gRPC say all that it has to say of the stream."""
        if self._stream is not None:
            await end_call(self._stream)
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=_FAREWELL_SECONDS)
        if self._writer is not None:
            self._writer.cancel()

    def _settle(
        self, message: pb.PipelineResponse, alone: set[str]
    ) -> Iterable[tuple[_Call, bytes | Exception]]:
        for outcome in message.outcomes:
            call = self._calls.pop(outcome.call_id, None)
            if call is None:
                continue  # it was given up
            kind = outcome.WhichOneof("outcome")
            if kind == "response":
                yield call, outcome.response
            elif kind == "failure" and outcome.failure.status_code != _UNIMPLEMENTED:
                yield call, to_rpc_error(outcome.failure)
            else:
                alone.add(call.method)
                yield call, GoAlone()

    def _write(self) -> None:
        if self._writer is None and self._stream is not None:
            self._writer = asyncio.get_running_loop().create_task(self._write_all())

    async def _write_all(self) -> None:
        """Send what is unsent. While messages are on their way, what is to be in the next comes together."""
        try:
            while self._unsent or self._cancelled_ids:
                await self._stream.write(self._next_message())
            if self.is_retired and not self._calls:
                await self._stream.done_writing()
        except (AioRpcError, asyncio.InvalidStateError):
            pass  # the stream has ended: who reads from it learns why
        finally:
            self._writer = None

    def _next_message(self) -> pb.PipelineRequest:
        cancelled_ids, self._cancelled_ids = self._cancelled_ids, []
        message = pb.PipelineRequest(cancelled_call_ids=cancelled_ids)
        calls, size_bytes, most = message.calls, 0, max(1, math.ceil(len(self._calls) / _SHARES))
        while self._unsent and size_bytes < _MESSAGE_BYTES and len(calls) < most:
            call = self._unsent.popleft()
            if call.call_id in self._calls:
                calls.add(call_id=call.call_id, method=call.method, request=call.request)
                size_bytes += len(call.request)
        return message


def _deliver(answers: Iterable[tuple[_Call, bytes | Exception]]) -> None:
    """Hand answers to those who wait for them, all of one event loop at once."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[bytes], bytes | Exception]]]
    by_loop = defaultdict(list)
    for call, answer in answers:
        by_loop[call.loop].append((call.answer, answer))
    for loop, settled in by_loop.items():
        with suppress(RuntimeError):  # it is closed: nobody waits
            loop.call_soon_threadsafe(_resolve, settled)


def _resolve(settled: Iterable[tuple[asyncio.Future[bytes], bytes | Exception]]) -> None:
    for future, answer in settled:
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
