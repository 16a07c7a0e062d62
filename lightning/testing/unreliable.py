"""A store that fails on demand, to test what depends on one."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any

from lightning.store.contract import LightningStore
from lightning.store.forwarding import ForwardingStore
from lightning.types import LightningStoreCapabilities, Span

_AWAY_POLL_SECONDS = 0.01


class UnreliableStore(ForwardingStore):
    """Passes calls on to `store`, unless it is told to behave as if it could not be reached.

    Args:
        store: Who answers when all is well.
        thread_safe: What it claims about itself; None: what `store` says.
    """

    def __init__(self, store: LightningStore, *, thread_safe: bool | None = None) -> None:
        self.away = False
        """While True, calls raise `ConnectionError`, and those that wait already break off with it."""
        self.calls: Counter[str] = Counter()
        """How often each verb was called, also in vain."""
        self.answers: Counter[str] = Counter()
        """How often each verb was answered by `store`."""
        self.span_batches: list[list[str]] = []
        """The names of the spans of each `add_many_spans` or `deliver_spans` that was passed on."""
        self._store = store
        self._thread_safe = thread_safe
        self._changed = threading.Condition()

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        given = self._store.capabilities
        return given if self._thread_safe is None else {**given, "thread_safe": self._thread_safe}

    async def close(self) -> None:
        await self._store.close()

    async def wait_for_calls(self, verb: str, count: int = 1, *, timeout: float = 10.0) -> None:
        """Wait until `verb` was called `count` times. Raises `TimeoutError` after `timeout` seconds."""
        await self._wait_for(self.calls, verb, count, timeout)

    async def wait_for_answers(self, verb: str, count: int = 1, *, timeout: float = 10.0) -> None:
        """Wait until `verb` was answered `count` times. Raises `TimeoutError` after `timeout` seconds."""
        await self._wait_for(self.answers, verb, count, timeout)

    async def _wait_for(self, counts: Counter[str], verb: str, count: int, timeout: float) -> None:
        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: counts[verb] >= count, timeout)

        # calls may come from any thread
        if not await asyncio.to_thread(wait):
            raise TimeoutError(f"{verb}: {counts[verb]} instead of {count} within {timeout} s")

    def _count(self, counts: Counter[str], verb: str) -> None:
        with self._changed:
            counts[verb] += 1
            self._changed.notify_all()

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        self._count(self.calls, verb)
        self._check()
        if verb in ("add_many_spans", "deliver_spans"):
            spans: Sequence[Span] = args[0] if args else kwargs["spans"]
            self.span_batches.append([span.name for span in spans])
        answer = await self._while_here(getattr(self._store, verb)(*args, **kwargs))
        self._count(self.answers, verb)
        return answer

    async def _forward_stream(self, verb: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        self._count(self.calls, verb)
        async with aclosing(getattr(self._store, verb)(*args, **kwargs)) as items:
            while (item := await self._while_here(anext(items, None))) is not None:
                yield item
        self._count(self.answers, verb)

    async def _while_here(self, answer: Awaitable[Any]) -> Any:
        """What comes of it, unless the store is away before."""
        call = asyncio.ensure_future(answer)
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=_AWAY_POLL_SECONDS)
                if not call.done():
                    self._check()
        finally:
            call.cancel()
            await asyncio.wait({call})
        return await call

    def _check(self) -> None:
        if self.away:
            raise ConnectionError("the store is out of reach, as the test wants it")
