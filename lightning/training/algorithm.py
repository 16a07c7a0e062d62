"""What a user writes to train: an `Algorithm` that hands out work, waits, reads what happened, publishes the better."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from lightning.store.contract import LightningStore
from lightning.tracing import find_final_reward
from lightning.training.adapter import Adapter, TraceToTriplets
from lightning.types import EnqueueRolloutRequest, NamedResources, RolloutMode

logger = logging.getLogger(__name__)

T = TypeVar("T")
ItemT_co = TypeVar("ItemT_co", covariant=True)


class Dataset(Protocol[ItemT_co]):
    """Tasks by position: a list is one, and so is a PyTorch dataset. Each item becomes the `input` of rollouts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ItemT_co: ...


class Algorithm(ABC):
    """Base of all algorithms. Write `run`; the trainer sets the rest before it calls it.

    ```python
    class Best(Algorithm):
        async def run(self, train_dataset=None, val_dataset=None):
            store = self.get_store()
            rollouts = [await store.enqueue_rollout(input=task, mode="train") for task in train_dataset]
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in rollouts])
            ...
    ```

    An algorithm travels to another process when the execution strategy says so: what `__init__` keeps must pickle.
    """

    _store: LightningStore | None = None
    _adapter: Adapter[Any] | None = None
    _initial_resources: NamedResources | None = None
    _thread_runner: _ThreadRunner | None = None

    @abstractmethod
    def run(self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None) -> Any:
        """Train. When it returns, the job is over and the runners are told to stop.

        Written as `async def`, it runs on the event loop of the store. Written as `def`, it runs in a thread of its
        own, where it may compute or block as it likes, and calls the store with `run_async`. It is interrupted when
        the job is stopped: `asyncio.CancelledError` is raised where an `async def` awaits, or in `run_async`.
        """

    def get_store(self) -> LightningStore:
        """The store of this job. Raises `RuntimeError` outside of a run."""
        if self._store is None:
            raise RuntimeError("the algorithm has no store; the trainer sets it before it calls run()")
        return self._store

    def get_adapter(self) -> Adapter[Any]:
        """The adapter that the trainer was given, else the algorithm's own if it set one, else `TraceToTriplets`."""
        return TraceToTriplets() if self._adapter is None else self._adapter

    def get_initial_resources(self) -> NamedResources | None:
        """The resources that the trainer was given and has published already; None if there are none."""
        return self._initial_resources

    def set_store(self, store: LightningStore | None) -> None:
        """Say what `get_store` returns."""
        self._store = store

    def set_adapter(self, adapter: Adapter[Any] | None) -> None:
        """Say what `get_adapter` returns."""
        self._adapter = adapter

    def set_initial_resources(self, resources: NamedResources | None) -> None:
        """Say what `get_initial_resources` returns. This does not publish them."""
        self._initial_resources = resources

    def __getstate__(self) -> dict[str, Any]:
        """What belongs to a run does not travel."""
        return {name: value for name, value in vars(self).items() if name not in ("_store", "_thread_runner")}

    def run_async(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """For a `run` that is no coroutine: have the job's event loop execute `coroutine`, and wait for its result.

        ```python
        rollout = self.run_async(self.get_store().enqueue_rollout(input=task))
        ```

        Raises:
            asyncio.CancelledError: The job is being stopped. Let it pass.
            RuntimeError: It was called outside of a run, or from the event loop itself, where `await` does it.
        """
        if self._thread_runner is None:
            coroutine.close()
            raise RuntimeError("run_async is for algorithms whose run() is a plain function, while it runs")
        return self._thread_runner.call(coroutine)

    async def execute(self, train_dataset: Dataset[Any] | None, val_dataset: Dataset[Any] | None) -> None:
        """Call `run` as it was written: await it, or give it a thread. For those who run algorithms."""
        if inspect.iscoroutinefunction(self.run):
            await self.run(train_dataset=train_dataset, val_dataset=val_dataset)
            return
        thread = self._thread_runner = _ThreadRunner(asyncio.get_running_loop())
        try:
            result = await thread.run(lambda: self.run(train_dataset=train_dataset, val_dataset=val_dataset))
        finally:
            if thread.ended.is_set():  # one that was left behind is still to be told that it is cancelled
                self._thread_runner = None
        if inspect.isawaitable(result):  # a coroutine function behind a decorator that hides it
            await result


class SinglePass(Algorithm):
    """Has every item of the datasets executed once and logs how each went; trains nothing.

    What `Trainer.dev` runs when it has no other algorithm: the quickest way to try an agent.
    """

    async def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> None:
        """Items of `train_dataset` are enqueued with mode `train`, then those of `val_dataset` with `val`.

        Raises:
            ValueError: There are no items.
        """
        requests = _requests(train_dataset, "train") + _requests(val_dataset, "val")
        if not requests:
            raise ValueError(
                "there is nothing to do: give a train_dataset or a val_dataset with at least one item"
            )
        store = self.get_store()
        rollouts = await store.enqueue_many_rollouts(requests)
        for number, rollout in enumerate(rollouts, 1):
            [ended] = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id])
            reward = find_final_reward(await store.query_spans(ended.rollout_id, "latest"))
            logger.info(
                "%d of %d: rollout %s %s in %.2f s, reward %s",
                number,
                len(rollouts),
                ended.rollout_id,
                ended.status,
                (ended.end_time or ended.start_time) - ended.start_time,
                reward,
            )


def _requests(dataset: Dataset[Any] | None, mode: RolloutMode) -> list[EnqueueRolloutRequest]:
    if dataset is None:
        return []
    return [EnqueueRolloutRequest(input=dataset[index], mode=mode) for index in range(len(dataset))]


class _ThreadRunner:
    """A thread for a `run` that blocks, with a way back to the event loop.

    The thread is a daemon: one that computes on when the job is stopped is left behind, since nothing can interrupt
    it, and must not keep the process from ending.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._loop_thread_id = threading.get_ident()
        self._lock = threading.Lock()
        self._stopped = False
        self.ended = asyncio.Event()
        """Set when the function has returned or raised."""
        self._calls: set[concurrent.futures.Future[Any]] = set()

    async def run(self, function: Callable[[], T]) -> T:
        """Call `function` in a new thread. When this is cancelled, so are the calls that the thread waits for."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def main() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:  # noqa: BLE001 - it is raised where the thread is awaited
                outcome.set_exception(error)
            with self._lock:
                if not self._stopped:
                    self._loop.call_soon_threadsafe(self.ended.set)

        threading.Thread(target=main, name="lightning-algorithm", daemon=True).start()
        try:
            await self.ended.wait()
        finally:
            self._stop()
        return outcome.result()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """From the thread: have the loop execute `coroutine`."""
        if threading.get_ident() == self._loop_thread_id:
            coroutine.close()
            raise RuntimeError("run_async was called from the event loop itself: use await there")
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise asyncio.CancelledError
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._calls.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError from None
        finally:
            with self._lock:
                self._calls.discard(future)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            calls = list(self._calls)
        for future in calls:
            future.cancel()
