"""Running bundles: each on an event loop of its own, in whatever thread, ended from any other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable

BundleStart = Callable[[], Awaitable[None]]


class BundleRun:
    """One call of a bundle.

    Args:
        start: Calls the bundle; used in the thread and on the event loop where it runs.
    """

    def __init__(self, start: BundleStart) -> None:
        self.error: BaseException | None = None
        """What it raised, once it has ended; None also when it was cancelled and ended as it should then."""
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.interruptible = False
        """Whether a `KeyboardInterrupt` raised in the main thread now would strike the bundle and nothing else."""
        self.has_own_thread = False
        """Whether the thread that it runs in was made for it, and can be left behind if it hangs."""
        self._start = start
        self._lock = threading.Lock()
        self._cancelled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Run it in this thread; raises nothing, see `error`."""
        try:
            try:
                self.interruptible = threading.current_thread() is threading.main_thread()
                asyncio.run(self._main())
            finally:
                self.interruptible = False
        except asyncio.CancelledError as error:
            self.error = None if self._cancelled else error
        except BaseException as error:  # noqa: BLE001 - kept for the caller, who raises it in the right place
            self.error = error
        self.ended.set_result(None)

    def run_in_thread(self, name: str) -> None:
        """Run it in a thread of its own that does not keep the process alive."""
        self.has_own_thread = True
        threading.Thread(target=self.run, name=name, daemon=True).start()

    def cancel(self) -> None:
        """Have `asyncio.CancelledError` raised where the bundle awaits; from any thread, at any time."""
        with self._lock:
            self._cancelled = True
            if self._loop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._task.cancel)

    def end(self) -> asyncio.Future[None]:
        """A future of the running loop that is done when the run has ended. Cancelling it cancels nothing else."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def tell(_: concurrent.futures.Future[None]) -> None:
            with contextlib.suppress(RuntimeError):  # that loop was closed, nobody waits any more
                loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(None))

        self.ended.add_done_callback(tell)
        return future

    async def _main(self) -> None:
        with self._lock:
            if self._cancelled:
                return
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            await self._start()
        finally:
            with self._lock:
                self._loop = None


class CallerThread:
    """The thread that called `execute`: it runs what the job hands it there, else it waits for the job's end."""

    def __init__(self) -> None:
        self.current: BundleRun | None = None
        self._work: queue.SimpleQueue[BundleRun | None] = queue.SimpleQueue()

    def submit(self, start: BundleStart) -> BundleRun:
        """Have a bundle run in the caller's thread, as soon as that is free."""
        run = BundleRun(start)
        self._work.put(run)
        return run

    def serve(self, job: BundleRun) -> None:
        """Run what is submitted until `job` has ended. To be called in the caller's thread.

        Where that has a running event loop, as in a notebook, it can have no second one: a bundle gets a thread of its
        own then, and the end of the job is not kept by one that hangs.
        """
        job.ended.add_done_callback(lambda _: self._work.put(None))
        while (run := self._work.get()) is not None:
            self.current = run
            if _has_running_loop():
                run.run_in_thread("lightning-bundle")
                concurrent.futures.wait(
                    (run.ended, job.ended), return_when=concurrent.futures.FIRST_COMPLETED
                )
            else:
                run.run()


def _has_running_loop() -> bool:
    return asyncio._get_running_loop() is not None
