"""The client's side of span streams: spans of many callers on one stream, kept until they are acknowledged.

Everything here runs on the process's event loop for gRPC, and spans are bytes: their callers have encoded them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import grpc.aio
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from lightningpb.v1 import store_service_pb2 as pb

from lightning import codec
from lightning.rpc.errors import LimitExceededError, from_detail, is_connection_failure
from lightning.rpc.loop import end_call

if TYPE_CHECKING:
    from lightning.rpc.connection import Connection

_BATCH_BYTES = 1024 * 1024
"""Batches are cut at this size; a span that is larger travels alone."""
_MAX_BUFFERED_BYTES = 32 * 1024 * 1024
"""How many bytes of spans are kept, sent or not; callers with more wait."""
_IDLE_SECONDS = 30.0
"""The stream is closed when there was nothing to send for so long."""
_MAX_AGE_SECONDS = 3600.0
"""The stream's deadline; then it is opened anew."""
_REOPEN_PAUSE_SECONDS = 0.1


class _Parcel:
    """The spans of one caller."""

    def __init__(self, spans: Sequence[bytes]) -> None:
        self.size_bytes = sum(map(len, spans))
        self.settled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._open_spans = len(spans)
        self._stored = 0
        self._error: Exception | None = None

    def settle(self, count: int, stored: int, error: Exception | None = None) -> bool:
        """Note what became of some of its spans; returns whether that was all of them."""
        self._open_spans -= count
        self._stored += stored
        self._error = self._error or error
        if self._open_spans == 0 and not self.settled.done():
            if self._error is None:
                self.settled.set_result(self._stored)
            else:
                self.settled.set_exception(self._error)
        return self._open_spans == 0

    def fail(self, error: Exception) -> None:
        """None of the rest will be sent."""
        if not self.settled.done():
            self.settled.set_exception(error)


@dataclass
class _Piece:
    """Spans that travel in one batch, of one parcel."""

    parcel: _Parcel
    spans: Sequence[bytes]
    alone: bool = False
    """Whether it shares its batch with no other piece: one was refused, and it must turn out whose fault that is."""


@dataclass(frozen=True)
class _Batch:
    number: int
    pieces: Sequence[_Piece]
    request: bytes


class SpanSender:
    """Sends spans for one connection, in a session that goes on when the stream breaks.

    The stream is opened when there is something to send and closed when there was nothing for a while.

    Args:
        connection: Knows the server, and how to try again.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._news = asyncio.Event()
        self._buffered_bytes = 0
        self._queue_for_room: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._waiting: deque[_Piece] = deque()
        self._task: asyncio.Task[None] | None = None
        self._begin_session()

    async def deliver(self, spans: Sequence[bytes]) -> int:
        """Return when these spans are stored; how many of them were new. Waits while too much is on its way already.

        Raises:
            StoreUnavailableError: The server stayed away. What was sent may be stored.
            Exception: What the store raised for some of them.
        """
        parcel = _Parcel(spans)
        await self._admit(parcel.size_bytes)
        self._waiting.append(_Piece(parcel, spans))
        self._news.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._send_all())
        return await parcel.settled

    async def close(self) -> None:
        """End the stream; calls that wait fail."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _admit(self, size_bytes: int) -> None:
        """Wait for room in the buffer; first come, first served."""
        if not self._queue_for_room and self._has_room(size_bytes):
            self._buffered_bytes += size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue_for_room.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # both at once
                self._release(size_bytes)
            raise

    def _release(self, size_bytes: int) -> None:
        self._buffered_bytes -= size_bytes
        while self._queue_for_room:
            wanted_bytes, turn = self._queue_for_room[0]
            if not turn.cancelled():
                if not self._has_room(wanted_bytes):
                    return
                self._buffered_bytes += wanted_bytes
                turn.set_result(None)
            self._queue_for_room.popleft()

    def _has_room(self, size_bytes: int) -> bool:
        return not self._buffered_bytes or self._buffered_bytes + size_bytes <= _MAX_BUFFERED_BYTES

    def _begin_session(self) -> None:
        self._session_id = uuid4().hex
        self._acknowledged = 0
        self._sent = 0
        """The number of the last batch that was made."""
        self._unanswered: deque[_Batch] = deque()
        self._to_resend: deque[_Batch] = deque()
        self._credits = 0
        self._max_batch_bytes = _BATCH_BYTES

    # --- The session -------------------------------------------------------------------------------------------

    async def _send_all(self) -> None:
        """Until there is nothing to send, or the server stays away."""
        failure: Exception = self._connection.closed_error()
        try:
            while self._waiting or self._unanswered:
                await self._connection.retrying(self._converse)
                if self._waiting or self._unanswered:
                    await asyncio.sleep(_REOPEN_PAUSE_SECONDS)
        except Exception as error:  # noqa: BLE001  # the callers hear of it
            failure = error
        finally:
            self._task = None
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        """Fail what is left, if anything is."""
        pieces = [piece for batch in self._unanswered for piece in batch.pieces]
        parcels = {piece.parcel for piece in (*pieces, *self._waiting)}
        self._waiting.clear()
        self._begin_session()
        for parcel in parcels:
            parcel.fail(error)
            self._release(parcel.size_bytes)

    async def _converse(self) -> None:
        """Open the stream, and send and listen until it ends. Raises `AioRpcError` if that was no use at all."""
        call = self._connection.stream_spans_call()
        stream = call(timeout=_MAX_AGE_SECONDS)
        writer: asyncio.Task[None] | None = None
        progressed = False
        try:
            opening = pb.StreamSpansRequest.Open(session_id=self._session_id, resume_from=self._acknowledged)
            await stream.write(pb.StreamSpansRequest(open=opening).SerializeToString())
            message = await self._read(stream, opening=True)
            if message is grpc.aio.EOF or not message.HasField("opened"):
                return
            self._resume(message.opened)
            writer = asyncio.get_running_loop().create_task(self._write(stream))
            while (message := await self._read(stream)) is not grpc.aio.EOF:
                progressed |= self._take(message)
        except AioRpcError as error:
            if not progressed or not is_connection_failure(error):
                raise
        finally:
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            await end_call(stream)

    async def _read(self, stream: Any, *, opening: bool = False) -> Any:
        """The next message. Raises `AioRpcError` when an answer that is due does not come in time."""
        read = asyncio.ensure_future(stream.read())
        timeout = self._connection.options.request_timeout
        try:
            while True:
                due = opening or bool(self._unanswered)
                done, _ = await asyncio.wait({read}, timeout=timeout)
                if done:
                    return read.result()
                if due:
                    raise AioRpcError(
                        StatusCode.DEADLINE_EXCEEDED, Metadata(), Metadata(), f"no answer within {timeout} s"
                    )
        finally:
            read.cancel()

    def _resume(self, opened: pb.StreamSpansResponse.Opened) -> None:
        """What the server has not had is sent again; its answers to the rest follow."""
        self._credits = opened.credits
        self._max_batch_bytes = opened.max_batch_bytes
        self._to_resend = deque(
            batch for batch in self._unanswered if batch.number > opened.acknowledged_batch_sequence
        )

    async def _write(self, stream: Any) -> None:
        # that the stream broke is seen, and said, by who reads
        with suppress(AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            while await self._something_to_send():
                batch = self._to_resend.popleft() if self._to_resend else self._cut_batch()
                if batch is not None:
                    self._credits -= 1
                    await stream.write(batch.request)
            await stream.done_writing()

    async def _something_to_send(self) -> bool:
        """Wait until there is something, and leave to send it. False: there was nothing for long."""
        while not (self._credits and (self._to_resend or self._waiting)):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), _IDLE_SECONDS)
            except asyncio.TimeoutError:
                if not self._unanswered and not self._waiting:
                    return False
        return True

    def _cut_batch(self) -> _Batch | None:
        """Make a batch of what waits; None if that cannot be sent at all."""
        pieces: list[_Piece] = []
        room_bytes = min(_BATCH_BYTES, self._max_batch_bytes)
        while self._waiting and not (pieces and (pieces[0].alone or self._waiting[0].alone)):
            piece = self._waiting[0]
            count, size_bytes = _count_fitting(piece.spans, room_bytes, at_least=0 if pieces else 1)
            if not count:
                break
            self._waiting.popleft()
            if count < len(piece.spans):
                self._waiting.appendleft(_Piece(piece.parcel, piece.spans[count:], piece.alone))
            pieces.append(_Piece(piece.parcel, piece.spans[:count], piece.alone))
            room_bytes -= size_bytes
        request = codec.batch_request(self._sent + 1, [span for piece in pieces for span in piece.spans])
        if len(request) > self._max_batch_bytes and len(pieces[0].spans) == 1:
            self._settle(pieces[0], 0, self._too_large(len(request)))
            return None
        self._sent += 1
        batch = _Batch(self._sent, pieces, request)
        self._unanswered.append(batch)
        return batch

    def _too_large(self, size_bytes: int) -> LimitExceededError:
        return LimitExceededError(
            f"a span has {size_bytes} bytes, more than the {self._max_batch_bytes} that the server at "
            f"{self._connection.endpoint} takes; raise max_message_bytes of LightningStoreServer"
        )

    def _take(self, message: pb.StreamSpansResponse) -> bool:
        """Act on what the server says; returns whether it was an answer to a batch."""
        kind = message.WhichOneof("message")
        if kind not in ("ack", "rejected"):
            return False
        answer = message.ack if kind == "ack" else message.rejected
        if not self._unanswered or answer.batch_sequence != self._unanswered[0].number:
            raise RuntimeError(f"the server answered to span batch {answer.batch_sequence}, which is not due")
        batch = self._unanswered.popleft()
        self._acknowledged = batch.number
        self._credits += answer.credits
        self._news.set()
        if kind == "ack":
            self._acknowledge(batch, [receipt.stored for receipt in message.ack.receipts])
        elif len(batch.pieces) == 1:
            piece = batch.pieces[0]
            self._settle(piece, 0, from_detail(message.rejected.error))
        else:
            self._waiting.extendleft(
                _Piece(piece.parcel, piece.spans, alone=True) for piece in reversed(batch.pieces)
            )
        return True

    def _acknowledge(self, batch: _Batch, stored: Sequence[bool]) -> None:
        first = 0
        for piece in batch.pieces:
            last = first + len(piece.spans)
            self._settle(piece, sum(stored[first:last]))
            first = last

    def _settle(self, piece: _Piece, stored: int, error: Exception | None = None) -> None:
        if piece.parcel.settle(len(piece.spans), stored, error):
            self._release(piece.parcel.size_bytes)


def _count_fitting(spans: Sequence[bytes], room_bytes: int, *, at_least: int) -> tuple[int, int]:
    """How many of the first spans fit, but at least so many, and how many bytes they have."""
    taken_bytes = 0
    for count, span in enumerate(spans):
        if count >= at_least and taken_bytes + len(span) > room_bytes:
            return count, taken_bytes
        taken_bytes += len(span)
    return len(spans), taken_bytes
