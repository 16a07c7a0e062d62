"""The server's side of span streams: batches up, acknowledgements down, and what is remembered between two connections.

A session outlives its connection. While a batch is being stored the connection may break; the batch is stored all the
same, and the stream that resumes the session is told what became of it. Whatever a client does, a stream holds no more
than a few messages: a reader runs ahead of the storing by a bounded number of bytes, and answers wait in a bounded
outbox.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from lightningpb.v1 import errors_pb2
from lightningpb.v1 import store_service_pb2 as pb

from lightning.rpc.errors import LimitExceededError, to_failure
from lightning.rpc.handlers import receive_spans
from lightning.rpc.requests import SpanBatch
from lightning.rpc.streams import Outbox

if TYPE_CHECKING:
    from lightning.rpc.service import StoreService
    from lightning.store.contract import LightningStore

CREDITS = 8
"""How many batches of a stream may be on their way or waiting to be stored."""
_READ_AHEAD_BYTES = 4 * 1024 * 1024
"""How many bytes of batches wait, read, while an earlier one is being stored; reading goes on below that."""
_FRAME_BYTES = 64
"""What a message has beside its batch."""
_MAX_SESSION_ID_LENGTH = 256
_SESSION_OVERHEAD_BYTES = 1024

_Request = SpanBatch | pb.StreamSpansRequest.Open | None
"""What a stream's messages are read as; None for one that is neither."""


class SpanSession:
    """What a client has sent and been answered, across its connections.

    Args:
        acknowledged: The batch that was answered last; 0 for none.
    """

    def __init__(self, acknowledged: int) -> None:
        self.acknowledged = acknowledged
        self.streams = 0
        """How many streams of it are open: two, while a newer one takes over."""
        # A client that has sent batch n has seen the answers up to n - CREDITS.
        self._answers: deque[pb.StreamSpansResponse] = deque(maxlen=2 * CREDITS)
        self._storing: asyncio.Task[None] | None = None

    async def store(self, store: LightningStore, batch: SpanBatch, *, instant: bool) -> None:
        """Store a batch, or find that it must be refused, and note the answer; goes on if the caller is cancelled.

        Args:
            store: Where.
            batch: What.
            instant: The caller cannot be cancelled in the middle, so this needs no task of its own.

        Raises:
            ConnectionError: The store cannot be reached; nothing is known about the batch.
        """
        if instant:
            await self._store(store, batch)
            return
        self._storing = asyncio.get_running_loop().create_task(self._store(store, batch))
        self._storing.add_done_callback(_retrieve)
        await asyncio.shield(self._storing)

    async def settle(self) -> None:
        """Wait until nothing is being stored."""
        if self._storing is not None:
            await asyncio.wait({self._storing})

    def cancel(self) -> None:
        """Break off what is being stored."""
        if self._storing is not None:
            self._storing.cancel()

    def answers_after(self, batch_sequence: int) -> list[pb.StreamSpansResponse]:
        """The answers to the later batches. Raises `ValueError` if one of them is not remembered."""
        count = self.acknowledged - batch_sequence
        if not 0 <= count <= len(self._answers):
            raise ValueError(
                f"Open.resume_from is {batch_sequence}, but this session's last answers are those to the batches "
                f"{self.acknowledged - len(self._answers) + 1} to {self.acknowledged}"
            )
        return list(self._answers)[len(self._answers) - count :]

    @property
    def size_bytes(self) -> int:
        """About what it takes to remember this."""
        return _SESSION_OVERHEAD_BYTES + sum(answer.ByteSize() for answer in self._answers)

    async def _store(self, store: LightningStore, batch: SpanBatch) -> None:
        number = batch.batch_sequence
        answer = pb.StreamSpansResponse(ack=pb.StreamSpansResponse.Ack(batch_sequence=number, credits=1))
        try:
            await receive_spans(store, batch.spans, answer.ack.receipts)
        except Exception as error:
            failure = to_failure(error)
            if failure.leaves_open:
                raise
            rejected = pb.StreamSpansResponse.Rejected(
                batch_sequence=number, error=errors_pb2.ErrorDetail.FromString(failure.detail), credits=1
            )
            answer = pb.StreamSpansResponse(rejected=rejected)
        self._answers.append(answer)
        self.acknowledged = number


class SpanSessions:
    """The sessions that a client may resume. One that was forgotten costs nothing but receipts: the client sends again
    what it has no answer to, and the store recognises the spans.

    Args:
        max_bytes: How much memory sessions without a connection may take; those left first are forgotten first.
        keep_seconds: How long such a session is remembered.
    """

    def __init__(self, *, max_bytes: int, keep_seconds: float) -> None:
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._sessions: dict[str, SpanSession] = {}
        self._left: OrderedDict[str, tuple[float, int]] = OrderedDict()
        """When each session without a stream was left, and its size."""
        self._left_bytes = 0

    def enter(self, session_id: str, resume_from: int) -> SpanSession:
        """Begin a stream of a session; of an unknown one, at the batch of which the client knows it is answered."""
        session = self._sessions.setdefault(session_id, SpanSession(resume_from))
        session.streams += 1
        _, size = self._left.pop(session_id, (0.0, 0))
        self._left_bytes -= size
        return session

    def leave(self, session_id: str) -> None:
        """A stream of the session ended."""
        session = self._sessions[session_id]
        session.streams -= 1
        if not session.streams:
            size = session.size_bytes
            self._left[session_id] = (time.monotonic(), size)
            self._left_bytes += size
            self._forget_oldest()

    async def close(self) -> None:
        """Break off what is being stored. Streams that are still open leave their sessions later."""
        for session in list(self._sessions.values()):
            session.cancel()
            await session.settle()

    def _forget_oldest(self) -> None:
        too_old = time.monotonic() - self._keep_seconds
        while self._left:
            session_id, (left_at, size) = next(iter(self._left.items()))
            if left_at > too_old and self._left_bytes <= self._max_bytes:
                return
            del self._left[session_id], self._sessions[session_id]
            self._left_bytes -= size


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at how a task ended that may have nobody else to look at it: asyncio would complain."""
    if not task.cancelled():
        task.exception()


class _Intake:
    """The batches of a stream in their order, some of them read in advance."""

    def __init__(self, requests: AsyncIterator[_Request], answered: int) -> None:
        self._requests = requests
        self._expected = answered + 1
        self._ahead: deque[SpanBatch] = deque()
        self._ahead_bytes = 0
        self._changed = asyncio.Event()

    async def batches(self) -> AsyncGenerator[SpanBatch, None]:
        """Each batch. The next is asked for when the last is answered.

        Raises:
            ValueError: What came is no batch, or not the next one.
            LimitExceededError: The client sent more batches than it was granted.
        """
        reading = asyncio.get_running_loop().create_task(self._read())
        reading.add_done_callback(_retrieve)
        reading.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                while self._ahead:
                    batch = self._ahead[0]
                    yield batch  # counted until it is answered
                    self._ahead.popleft()
                    self._ahead_bytes -= batch.size_bytes
                    self._changed.set()
                if reading.done():
                    await reading
                    return
                self._changed.clear()
                await self._changed.wait()
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(self) -> None:
        async for request in self._requests:
            batch = self._check(request)
            self._ahead.append(batch)
            self._ahead_bytes += batch.size_bytes
            self._changed.set()
            if len(self._ahead) > CREDITS:
                raise LimitExceededError(
                    f"batch {batch.batch_sequence} exceeds the credits: {CREDITS} batches before it are not answered "
                    "yet; wait for the grants that come with the answers"
                )
            while self._ahead_bytes > _READ_AHEAD_BYTES:
                self._changed.clear()
                await self._changed.wait()

    def _check(self, request: _Request) -> SpanBatch:
        if not isinstance(request, SpanBatch):
            raise ValueError("a StreamSpans takes one Open, then batches")
        if request.batch_sequence != self._expected:
            raise ValueError(
                f"batches count up by one: {self._expected} is next, not {request.batch_sequence}"
            )
        self._expected += 1
        return request


async def stream_spans(
    service: StoreService, requests: AsyncIterator[_Request]
) -> AsyncGenerator[Message, None]:
    """Batches up, acknowledgements down."""
    opened = await _first(requests)
    key = ("spans", opened.session_id)
    outbox: Outbox[pb.StreamSpansResponse] = Outbox()
    service.streams.add(outbox, key)  # an older stream of the session stores no further batch from here on
    session = service.span_sessions.enter(opened.session_id, opened.resume_from)
    try:
        await session.settle()
        answers = session.answers_after(opened.resume_from)
        answered = session.acknowledged
        yield _opened(service, answered)
        for answer in answers:
            yield answer
        outbox.produce(_store_batches(service, session, requests, outbox))
        async with aclosing(outbox.messages()) as messages:
            async for message in messages:
                yield message
                answered += 1
        if outbox.closing is not None:
            await session.settle()
            if outbox.closing.reason != pb.CLOSE_REASON_SUPERSEDED:
                for answer in session.answers_after(answered):
                    yield answer
            yield pb.StreamSpansResponse(closing=outbox.closing)
    finally:
        service.streams.discard(outbox, key)
        service.span_sessions.leave(opened.session_id)


def _opened(service: StoreService, acknowledged: int) -> pb.StreamSpansResponse:
    return pb.StreamSpansResponse(
        opened=pb.StreamSpansResponse.Opened(
            acknowledged_batch_sequence=acknowledged,
            credits=CREDITS,
            max_batch_bytes=max(1, service.limits.max_message_bytes - _FRAME_BYTES),
        )
    )


async def _first(requests: AsyncIterator[_Request]) -> pb.StreamSpansRequest.Open:
    async for request in requests:
        if not isinstance(request, pb.StreamSpansRequest.Open):
            break
        if not 0 < len(request.session_id) <= _MAX_SESSION_ID_LENGTH:
            raise ValueError(f"Open.session_id must have 1 to {_MAX_SESSION_ID_LENGTH} characters")
        if request.resume_from < 0:
            raise ValueError(f"Open.resume_from is negative: {request.resume_from}")
        return request
    raise ValueError("the first message of a StreamSpans must be an Open")


async def _store_batches(
    service: StoreService,
    session: SpanSession,
    requests: AsyncIterator[_Request],
    outbox: Outbox[pb.StreamSpansResponse],
) -> None:
    intake = _Intake(requests, session.acknowledged)
    async with aclosing(intake.batches()) as batches:
        async for batch in batches:
            await session.store(service.store, batch, instant=service.instant)
            await outbox.put(session.answers_after(batch.batch_sequence - 1)[0])
            await asyncio.sleep(0)  # who sends one after the other does not keep the others waiting
