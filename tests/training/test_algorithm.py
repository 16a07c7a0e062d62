"""How algorithms are run, written with and without `async`."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest

from lightning.store import InMemoryLightningStore, LightningStoreThreaded
from lightning.training.adapter import TraceToMessages, TraceToTriplets
from lightning.training.algorithm import Algorithm, SinglePass

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0


class Blocking(Algorithm):
    """Enqueues what it is given from a thread, then returns or raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.thread: threading.Thread | None = None

    def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        self.thread = threading.current_thread()
        for task in train_dataset:
            self.run_async(self.get_store().enqueue_rollout(input=task))
        if self.error is not None:
            raise self.error


class Waiting(Algorithm):
    """Waits, from a thread, for a rollout that nobody executes."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.ended = threading.Event()
        self.ending: BaseException | None = None
        self.afterwards: BaseException | None = None

    def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        try:
            rollout = self.run_async(self.get_store().enqueue_rollout(input=1))
            self.waiting.set()
            self.run_async(self.get_store().wait_for_rollouts(rollout_ids=[rollout.rollout_id]))
        except BaseException as error:
            self.ending = error
            try:
                self.run_async(asyncio.sleep(0))
            except asyncio.CancelledError as further:
                self.afterwards = further
            raise
        finally:
            self.ended.set()


async def test_a_plain_function_runs_in_a_thread_and_calls_the_store() -> None:
    store = InMemoryLightningStore()
    algorithm = Blocking()
    algorithm.set_store(store)
    await algorithm.execute([1, 2, 3], None)
    assert algorithm.thread is not threading.current_thread()
    assert [rollout.input for rollout in await store.query_rollouts()] == [1, 2, 3]
    await store.close()


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3)])
async def test_what_a_plain_function_raises_comes_out(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        await Blocking(error).execute([], None)
    assert caught.value is error


async def test_stop_iteration_does_not_hang() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(Blocking(StopIteration()).execute([], None), DEADLINE_SECONDS)


async def test_cancelling_interrupts_the_call_that_a_thread_waits_for() -> None:
    store = InMemoryLightningStore()
    algorithm = Waiting()
    algorithm.set_store(store)
    running = asyncio.ensure_future(algorithm.execute(None, None))
    assert await asyncio.to_thread(algorithm.waiting.wait, DEADLINE_SECONDS)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await asyncio.to_thread(algorithm.ended.wait, DEADLINE_SECONDS)
    assert isinstance(algorithm.ending, asyncio.CancelledError)
    assert isinstance(algorithm.afterwards, asyncio.CancelledError)
    await store.close()


async def test_run_async_is_refused_outside_of_a_run() -> None:
    algorithm = Blocking()
    with pytest.raises(RuntimeError, match="run_async is for algorithms whose run"):
        algorithm.run_async(asyncio.sleep(0))
    await algorithm.execute([], None)
    with pytest.raises(RuntimeError, match="run_async is for algorithms whose run"):
        algorithm.run_async(asyncio.sleep(0))


async def test_what_belongs_to_a_run_does_not_travel() -> None:
    algorithm = Waiting()
    algorithm.set_store(InMemoryLightningStore())
    assert "_store" not in algorithm.__getstate__()
    assert "waiting" in algorithm.__getstate__()


async def test_run_async_on_the_event_loop_is_refused_instead_of_hanging() -> None:
    algorithm = Waiting()
    store = InMemoryLightningStore()
    algorithm.set_store(store)
    running = asyncio.ensure_future(algorithm.execute(None, None))
    assert await asyncio.to_thread(algorithm.waiting.wait, DEADLINE_SECONDS)
    with pytest.raises(RuntimeError, match="from the event loop itself"):
        algorithm.run_async(asyncio.sleep(0))
    running.cancel()
    assert await asyncio.to_thread(algorithm.ended.wait, DEADLINE_SECONDS)
    await store.close()


async def test_a_store_is_needed_and_an_adapter_is_not() -> None:
    algorithm = SinglePass()
    with pytest.raises(RuntimeError, match="the algorithm has no store"):
        algorithm.get_store()
    assert isinstance(algorithm.get_adapter(), TraceToTriplets)
    adapter = TraceToMessages()
    algorithm.set_adapter(adapter)
    assert algorithm.get_adapter() is adapter
    assert algorithm.get_initial_resources() is None


async def test_a_single_pass_executes_every_item_once_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightning")
    store = LightningStoreThreaded(InMemoryLightningStore())
    algorithm = SinglePass()
    algorithm.set_store(store)
    running = asyncio.ensure_future(algorithm.execute(["a", "b"], ["c"]))
    executed = []
    for status in ("succeeded", "failed", "succeeded"):
        [claimed] = await store.claim_rollouts(timeout=DEADLINE_SECONDS)
        executed.append((claimed.input, claimed.mode))
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status=status)
    await asyncio.wait_for(running, DEADLINE_SECONDS)
    assert executed == [("a", "train"), ("b", "train"), ("c", "val")]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    for line, number, status in zip(told, (1, 2, 3), ("succeeded", "failed", "succeeded"), strict=True):
        assert re.fullmatch(rf"{number} of 3: rollout ro-\S+ {status} in \d\.\d\d s, reward None", line)
    await store.close()


async def test_a_single_pass_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="there is nothing to do"):
        await SinglePass().execute([], None)
