"""What streams that stay open have in common on the server: an outbox each, and a way to end them.

Each stream has one writer, its handler, which takes messages from a bounded outbox that other tasks fill; so a client
that does not read holds up only itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from google.protobuf.message import Message
from lightningpb.v1 import store_service_pb2 as pb

from lightning.types import WorkerCommand

ResponseT = TypeVar("ResponseT", bound=Message)

_OUTBOX_MESSAGES = 64


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
            if self.closing is not None:  # it was superseded while it was being opened
                producer.close()
                continue
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


class Stream(Protocol):
    """A stream that can be ended from elsewhere."""

    def close(
        self, reason: pb.CloseReason.ValueType, message: str, last_word: WorkerCommand | None = None
    ) -> None:
        """See `Outbox.close`."""


class OpenStreams:
    """The streams that are open now, to end them by name, by age, or all at once.

    Args:
        max_age: How long a stream may stay open, in seconds; None: as long as it likes.
    """

    def __init__(self, max_age: float | None = None) -> None:
        self._max_age = max_age
        self._streams: dict[Stream, asyncio.TimerHandle | None] = {}
        self._by_key: dict[Any, Stream] = {}

    def add(self, stream: Stream, key: Any) -> None:
        """A stream opened. An older one of the same `key` (None: it has none) is closed."""
        age = self._max_age
        self._streams[stream] = (
            None
            if age is None
            else asyncio.get_running_loop().call_later(
                age,
                stream.close,
                pb.CLOSE_REASON_MAX_AGE,
                f"the stream was open for {age:g} s; open it again",
            )
        )
        if key is None:
            return
        older = self._by_key.get(key)
        if older is not None:
            older.close(pb.CLOSE_REASON_SUPERSEDED, "the same process opened another stream")
        self._by_key[key] = stream

    def discard(self, stream: Stream, key: Any) -> None:
        """A stream ended."""
        timer = self._streams.pop(stream, None)
        if timer is not None:
            timer.cancel()
        if self._by_key.get(key) is stream:
            del self._by_key[key]

    def close_all(
        self, reason: pb.CloseReason.ValueType, message: str, last_word: WorkerCommand | None = None
    ) -> None:
        """End all streams, those of workers with a command."""
        for stream in list(self._streams):
            stream.close(reason, message, last_word)
