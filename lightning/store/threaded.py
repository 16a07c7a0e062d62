"""Any store, safe to call from many threads and event loops: it lives on a loop of its own, in a thread of its own.

A call from elsewhere is handed over to that loop and awaited from the caller's. So a store that knows nothing of
threads, or that is bound to its loop as database drivers are, is used only as it expects; and a call that waits holds
nothing up, for no lock is involved.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from lightning.store.broker import BrokerClosed
from lightning.store.forwarding import ForwardingStore, complete
from lightning.types import LightningStoreCapabilities

T = TypeVar("T")

_STOP_TIMEOUT_SECONDS = 10.0


class _End:
    """There is no further item."""


_END = _End()


class LoopThread:
    """An event loop in a daemon thread.

    Args:
        name: Of the thread, for people who debug.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        # a daemon thread inside C code at interpreter exit can crash the process: end it before
        self._at_exit = weakref.finalize(self, _stop_loop, self._loop, self._thread)
        self._at_exit.atexit = False
        atexit.register(self._at_exit)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._loop.is_closed() or not self._thread.is_alive()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on this loop without waiting for it. Raises `RuntimeError` if the loop was stopped."""
        if self.stopped:
            coroutine.close()
            raise RuntimeError("the store's event loop was stopped")
        return asyncio.run_coroutine_threadsafe(_heeded(coroutine), self._loop)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Have `callback` called on this loop. Raises `RuntimeError` if the loop was stopped."""
        if self.stopped:
            raise RuntimeError("the store's event loop was stopped")
        self._loop.call_soon_threadsafe(callback)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on this loop, awaited from the caller's; cancelling the one cancels the other."""
        if self._thread is threading.current_thread():
            return await coroutine
        return await asyncio.wrap_future(self.submit(coroutine))

    async def run_stream(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """As `run`, for an asynchronous generator: each item is asked for when the last one was taken."""
        turn = asyncio.Lock()  # an item that was given up on must have ended before the generator is closed

        async def take() -> T | _End:
            async with turn:
                return await anext(items, _END)

        async def close() -> None:
            async with turn:
                await items.aclose()

        try:
            while not isinstance(item := await self.run(take()), _End):
                yield item
        finally:
            if not self.stopped:
                await self.run(close())

    def run_blocking(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """As `run`, for callers that have no event loop. Raises `TimeoutError` after `timeout` seconds."""
        return self.submit(coroutine).result(timeout)

    def stop(self) -> None:
        """Cancel what runs on the loop, end the thread and wait for it. Harmless when called twice."""
        self._at_exit()
        atexit.unregister(self._at_exit)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(
                asyncio.sleep(0)
            )  # what was submitted last begins, so that it can be ended
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


async def _heeded(coroutine: Coroutine[Any, Any, T]) -> T:
    """`coroutine`, whose error does not end up on stderr when whoever called it has cancelled the call meanwhile."""
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return await coroutine


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(_STOP_TIMEOUT_SECONDS)


class LightningStoreThreaded(ForwardingStore):
    """Makes `store` safe to use from any thread and event loop.

    Args:
        store: A `LightningStore`, or any object with its methods. From now on to be used only through this object,
            which also closes it.

    Raises:
        TypeError: `store` lacks a method.
    """

    def __init__(self, store: Any) -> None:
        self._store = complete(store)
        self._thread: LoopThread | None = None
        self._thread_lock = threading.Lock()
        self._closed = False

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return {**self._store.capabilities, "thread_safe": True, "async_safe": True}

    async def close(self) -> None:
        with self._thread_lock:
            closed, self._closed = self._closed, True
            thread, self._thread = self._thread, None
        if closed:
            return
        if thread is None:
            await self._store.close()
        elif not thread.stopped:
            try:
                await thread.run(self._store.close())
            finally:
                thread.stop()

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        return await self._running().run(getattr(self._store, verb)(*args, **kwargs))

    def _forward_stream(self, verb: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        return self._running().run_stream(getattr(self._store, verb)(*args, **kwargs))

    def _running(self) -> LoopThread:
        with self._thread_lock:
            if self._closed:
                raise BrokerClosed("the store was closed")
            if self._thread is None:
                self._thread = LoopThread("lightning-store")
            return self._thread
