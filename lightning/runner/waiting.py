"""Waiting for something, unless something else happens first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any, Protocol, TypeVar

from lightning.runner.threads import BlockingThread

logger = logging.getLogger(__name__)

T = TypeVar("T")

_EVENT_WAIT_SECONDS = 0.1
"""How soon the thread that waits for an event notices that nobody is interested in it any more."""


class StopEvent(Protocol):
    """What `run` needs of an `ExecutionEvent`. Both methods may be called from any thread."""

    def is_set(self) -> bool:
        """Whether the event has happened."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it happens or `timeout` seconds have passed; returns whether it has."""


async def unless(event: asyncio.Event, coroutine: Coroutine[Any, Any, T]) -> T | None:
    """The result of `coroutine`; or None, and it is cancelled, if `event` happens first.

    A result that is there in spite of the cancellation is returned.
    """
    work = asyncio.ensure_future(coroutine)
    happened = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({work, happened}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        happened.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
    return None if work.cancelled() else work.result()


@asynccontextmanager
async def watching(event: StopEvent | None, then: Callable[[], object]) -> AsyncIterator[None]:
    """Within the block, call `then` as soon as `event` is set; None: never.

    A thread waits for it, as such an event can be waited for in no other way.
    """
    if event is None:
        yield
        return
    thread = BlockingThread("lightning-event-watch")
    over = False

    def watch() -> None:
        while not over:
            if event.wait(_EVENT_WAIT_SECONDS):
                return

    watched = thread.call(watch, copy_context())
    watched.add_done_callback(lambda _: over or then())
    try:
        yield
    finally:
        over = True
        await asyncio.wait({watched})
        if watched.exception() is not None:
            logger.error(
                "the runner stops, as its event can no longer be waited for: %r", watched.exception()
            )
        thread.stop()
        thread.join(_EVENT_WAIT_SECONDS)
