"""Execution in the threads of one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import ClassVar, Literal, get_args

from lightning.execution.base import AlgorithmBundle, ExecutionStrategy, RunnerBundle, worker_name
from lightning.execution.bundles import BundleRun, BundleStart
from lightning.execution.commands import tell_runners
from lightning.execution.events import ThreadingEvent
from lightning.execution.hosting import LentStore
from lightning.execution.job import Job, first_of
from lightning.store.contract import LightningStore
from lightning.store.open import open_store
from lightning.store.threaded import LightningStoreThreaded
from lightning.types import Stop

logger = logging.getLogger(__name__)

MainThread = Literal["algorithm", "runner"]

_DEFAULT_STORE = "memory"


class SharedMemoryExecutionStrategy(ExecutionStrategy):
    """The algorithm and the runners as threads of this process, with the store between them in its memory.

    For trying out and debugging: nothing needs to be pickled, everything can be looked at. A crash of any of them ends
    the job, and a thread that hangs in a call cannot be ended, only left behind.

    Args:
        n_runners: How many runners.
        main_thread: What runs in the thread that calls `execute`: `"algorithm"`, or `"runner"` to set breakpoints in an
            agent (then there is one runner).
        join_timeout: Seconds that the other threads get to end after they were cancelled, before they are left behind.
        graceful_delay: Seconds that a bundle gets to end after it was asked to, before it is cancelled.
        poll_interval: How often the event is looked at, in seconds, for a bundle that set it to end the job.
        managed_store: Whether the store is made safe to use from many threads; False if it is so by itself.

    Raises:
        ValueError: A setting is out of range, or they contradict each other.
    """

    alias: ClassVar[str] = "shm"

    def __init__(
        self,
        n_runners: int = 1,
        main_thread: MainThread = "algorithm",
        join_timeout: float = 15.0,
        graceful_delay: float = 5.0,
        poll_interval: float = 0.05,
        managed_store: bool = True,
    ) -> None:
        if n_runners < 1:
            raise ValueError(f"n_runners must be at least 1, not {n_runners}")
        if main_thread not in get_args(MainThread):
            raise ValueError(
                f"main_thread must be one of {', '.join(get_args(MainThread))}, not {main_thread!r}"
            )
        if main_thread == "runner" and n_runners != 1:
            raise ValueError(f"main_thread='runner' has room for one runner only, not n_runners={n_runners}")
        for name, value in (("join_timeout", join_timeout), ("graceful_delay", graceful_delay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        if not poll_interval > 0:
            raise ValueError(f"poll_interval must be positive, but is {poll_interval}")
        self.n_runners = n_runners
        self.main_thread: MainThread = main_thread
        self.join_timeout = join_timeout
        self.graceful_delay = graceful_delay
        self.poll_interval = poll_interval
        self.managed_store = managed_store

    def execute(
        self, algorithm: AlgorithmBundle, runner: RunnerBundle, store: LightningStore | None = None
    ) -> None:
        execution = _Execution(self, algorithm, runner, store)
        execution.job.execute(execution.conduct)


class _Execution:
    """One call of `execute`."""

    def __init__(
        self,
        settings: SharedMemoryExecutionStrategy,
        algorithm: AlgorithmBundle,
        runner: RunnerBundle,
        store: LightningStore | None,
    ) -> None:
        self.settings = settings
        self.algorithm = algorithm
        self.runner = runner
        self.event = ThreadingEvent()
        self.job = Job(
            self.event,
            graceful_timeout=settings.graceful_delay,
            terminate_timeout=settings.join_timeout,
            poll_interval=settings.poll_interval,
        )
        self.store: LightningStore = open_store(_DEFAULT_STORE) if store is None else LentStore(store)
        if settings.managed_store:
            self.store = LightningStoreThreaded(self.store)
        self.background: dict[str, BundleRun] = {}

    async def conduct(self) -> None:
        """The whole job."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.store.close)
            stack.push_async_callback(self._stop_background)
            if self.settings.main_thread == "algorithm":
                for index in range(self.settings.n_runners):
                    self._start(worker_name(index), self._runner_start(index))
                await self.job.run_in_caller(lambda: self.algorithm(self.store, self.event))
            else:
                algorithm = self._start("algorithm", lambda: self.algorithm(self.store, self.event))
                stop = asyncio.create_task(self._stop_after(algorithm))
                stack.callback(stop.cancel)
                await self.job.run_in_caller(self._runner_start(0))
                await self.job.unless_failed(first_of(algorithm.end(), self.job.stopping))

    def _runner_start(self, index: int) -> BundleStart:
        return lambda: self.runner(self.store, index, self.event)

    def _start(self, name: str, start: BundleStart) -> BundleRun:
        """Run a bundle in a thread; if it raises, the job has failed."""
        run = self.background[name] = BundleRun(start)
        run.end().add_done_callback(lambda _: self._check(run))
        run.run_in_thread(f"lightning-{name}")
        return run

    def _check(self, run: BundleRun) -> None:
        if run.error is not None:
            self.job.fail(run.error)

    async def _stop_after(self, algorithm: BundleRun) -> None:
        await algorithm.end()
        await self._ask_to_stop()

    async def _ask_to_stop(self) -> None:
        self.event.set()
        await tell_runners(self.store, Stop(reason="the job is over"))

    async def _stop_background(self) -> None:
        """Ask, cancel, and leave behind what does not heed."""
        await self._ask_to_stop()
        everything = asyncio.ensure_future(asyncio.wait([run.end() for run in self.background.values()]))
        if not await self.job.pause(everything, self.settings.graceful_delay):
            for run in self.background.values():
                run.cancel()
            await asyncio.wait({everything}, timeout=self.settings.join_timeout)
        for name, run in self.background.items():
            if not run.ended.done():
                logger.error("%s does not end; its thread is left behind", name)
