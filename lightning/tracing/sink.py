"""The way of an attempt's spans to the store: a bounded buffer that never blocks the agent, emptied while it runs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from lightning.backoff import STORE_AWAY, Backoff
from lightning.store.contract import LightningStore, UnknownIdError
from lightning.tracing import provider
from lightning.types import Span

logger = logging.getLogger(__name__)

T = TypeVar("T")
AnySpan = ReadableSpan | Span
RunElsewhere = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
"""Runs a coroutine on some event loop, awaited from the caller's."""

MAX_BUFFERED_SPANS = 50_000
MAX_BUFFERED_BYTES = 64 * 1024 * 1024
MAX_BATCH_SPANS = 512
MAX_BATCH_BYTES = 1024 * 1024
LINGER_SECONDS = 0.005
"""How long a span waits for others to travel with; the first of an attempt does not."""

_SPAN_OVERHEAD_BYTES = 512


class AttemptTrace:
    """Takes the spans of one attempt and sends them to the store while the attempt runs.

    Batches go out one after the other, so the store numbers spans in the order in which they ended. When the store
    cannot be reached, spans wait, up to the bounds; what exceeds them is dropped and counted. A span that the store
    refuses is left out, the others of its batch are stored.

    Args:
        store: Where spans go.
        rollout_id: The rollout.
        attempt_id: The attempt.
        run: Runs the sending on an event loop of the caller's choice; None: on the one where `start` is called.
        max_buffered_spans: Bound of what waits, as a count.
        max_buffered_bytes: Bound of what waits, in (estimated) bytes.
    """

    def __init__(
        self,
        store: LightningStore,
        rollout_id: str,
        attempt_id: str,
        *,
        run: RunElsewhere | None = None,
        max_buffered_spans: int = MAX_BUFFERED_SPANS,
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
    ) -> None:
        self.rollout_id = rollout_id
        self.attempt_id = attempt_id
        self.otel_trace_id = RandomIdGenerator().generate_trace_id()
        self.open = True
        self.stored = 0
        """Spans that the store has, also when it had them before they were sent again because an answer was lost."""
        self.refused = 0
        """Spans that the store would not take as they are."""
        self.dropped = 0
        """Spans lost because too many waited for a store out of reach, or it stayed so until the end."""
        self.late = 0
        """Spans that ended after the attempt had."""
        self._store = store
        self._run = run or _run_here
        self._max_spans = max_buffered_spans
        self._max_bytes = max_buffered_bytes
        self._lock = threading.Lock()
        self._buffer: deque[tuple[AnySpan, int]] = deque()
        self._buffered_bytes = 0
        self._in_flight: Sequence[AnySpan] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Future[None] | None = None
        self._sender: asyncio.Task[None] | None = None
        self._sender_sleeps = False
        self._sender_hurries = False
        self._woken = asyncio.Event()
        self._hurried = asyncio.Event()
        self._drained = asyncio.Event()

    # --- From any thread ---------------------------------------------------------------------------------------

    def put(self, span: AnySpan) -> None:
        """Take a span; returns at once, whatever the store does."""
        size = _estimate_bytes(span)
        with self._lock:
            if not self.open:
                self.late += 1
                return
            if len(self._buffer) >= self._max_spans or self._buffered_bytes + size > self._max_bytes:
                self._drop(1)
                return
            self._buffer.append((span, size))
            self._buffered_bytes += size
            full = len(self._buffer) >= MAX_BATCH_SPANS or self._buffered_bytes >= MAX_BATCH_BYTES
            wake, self._sender_sleeps = self._sender_sleeps, False
            hurry, self._sender_hurries = full and not self._sender_hurries, full
        if (wake or hurry) and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, hurry)

    def _drop(self, count: int) -> None:
        if not self.dropped:
            logger.error(
                "attempt %s: spans are being dropped: the store does not take them, and %d (%d bytes) wait already",
                self.attempt_id,
                len(self._buffer),
                self._buffered_bytes,
            )
        self.dropped += count

    # --- From the runner ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to send. Does not wait for another thread's event loop to have begun: the agent can."""
        self._starting = asyncio.ensure_future(self._run(self._start()))
        await asyncio.sleep(0)  # it is handed over now, whatever blocks this loop next

    async def flush(self) -> None:
        """Return when every span taken so far is stored, refused or dropped; waits as long as the store is away."""
        await self._started()
        await self._run(self._flush())

    async def close(self, timeout: float | None = None) -> None:
        """Take no more spans, and send those that wait.

        Args:
            timeout: Give up after so many seconds, and count what is left as dropped; None: wait for the store.
        """
        with self._lock:
            self.open = False
        provider.forget(self)
        await self._started()
        await self._run(self._close(timeout))

    async def _started(self) -> None:
        if self._starting is not None:
            # who is cancelled while it waits for a flush must not stop it
            await asyncio.shield(self._starting)

    # --- On the event loop that sends --------------------------------------------------------------------------

    async def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sender = asyncio.create_task(self._send_all())

    def _wake(self, hurry: bool) -> None:
        self._woken.set()
        if hurry:
            self._hurried.set()

    async def _send_all(self) -> None:
        loop = asyncio.get_running_loop()
        sent_any = False
        while True:
            while batch := self._take_batch():
                await self._send(batch)
                sent_any = True
            self._drained.set()
            await self._woken.wait()
            self._woken.clear()
            if sent_any:
                linger = loop.call_later(LINGER_SECONDS, self._hurried.set)
                await self._hurried.wait()
                linger.cancel()
            self._hurried.clear()

    def _take_batch(self) -> list[AnySpan]:
        batch: list[AnySpan] = []
        batch_bytes = 0
        with self._lock:
            while self._buffer and len(batch) < MAX_BATCH_SPANS:
                span, size = self._buffer[0]
                if batch and batch_bytes + size > MAX_BATCH_BYTES:
                    break
                self._buffer.popleft()
                self._buffered_bytes -= size
                batch_bytes += size
                batch.append(span)
            self._sender_sleeps = not batch
            self._sender_hurries = False
            self._in_flight = batch
        return batch

    async def _send(self, batch: Sequence[AnySpan]) -> None:
        spans = []
        for span in batch:
            try:
                spans.append(self._to_span(span))
            except Exception as error:  # noqa: BLE001  # what is wrong with one span must not cost the others
                self._refuse([span], error)
        if spans:
            await self._store_or_split(spans)
        self._in_flight = ()

    def _to_span(self, span: AnySpan) -> Span:
        if isinstance(span, Span):
            return span.model_copy(update={"rollout_id": self.rollout_id, "attempt_id": self.attempt_id})
        return Span.from_opentelemetry(span, self.rollout_id, self.attempt_id, 0)

    async def _store_or_split(self, spans: Sequence[Span]) -> None:
        """Store spans; halve what is refused, so that only those that cannot be stored are left out."""
        backoff = Backoff()
        while True:
            try:
                await self._store.deliver_spans(spans)
                self.stored += len({span.span_id for span in spans})
                return
            except STORE_AWAY as error:
                backoff.log_first(logger, "attempt %s: spans wait for the store: %s", self.attempt_id, error)
                await backoff.sleep()
            except Exception as error:  # noqa: BLE001  # whatever it is, it must not cost the agent's work
                if len(spans) == 1 or isinstance(error, UnknownIdError):
                    self._refuse(spans, error)
                    return
                break
        middle = len(spans) // 2
        await self._store_or_split(spans[:middle])
        await self._store_or_split(spans[middle:])

    def _refuse(self, spans: Sequence[AnySpan], error: Exception) -> None:
        self.refused += len(spans)
        kind = type(error).__name__
        names = ", ".join(sorted({repr(span.name) for span in spans}))
        logger.error("attempt %s: spans were not stored: %s: %s: %s", self.attempt_id, names, kind, error)

    async def _flush(self) -> None:
        self._drained.clear()
        self._wake(hurry=True)
        await self._drained.wait()

    async def _close(self, timeout: float | None) -> None:
        sender = self._sender
        if sender is None or sender.done():
            return
        try:
            await asyncio.wait_for(self._flush(), timeout)
        except asyncio.TimeoutError:
            left = len(self._in_flight) + len(self._buffer)
            self.dropped += left
            logger.error("attempt %s: gave up sending %d spans after %s s", self.attempt_id, left, timeout)
        finally:
            sender.cancel()
            await asyncio.wait([sender])


async def _run_here(coroutine: Coroutine[Any, Any, T]) -> T:
    return await coroutine


def _estimate_bytes(span: AnySpan) -> int:
    """About what the span takes in memory and on the wire; texts are what makes spans big."""
    size = _SPAN_OVERHEAD_BYTES + _texts_bytes(span.attributes)
    for event in span.events:
        size += _SPAN_OVERHEAD_BYTES + _texts_bytes(event.attributes)
    return size


def _texts_bytes(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _texts_bytes(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_texts_bytes, value))
    return 8
