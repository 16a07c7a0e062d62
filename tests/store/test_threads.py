"""Stores called from many threads and event loops."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest
from plain_store import PlainStore

from lightning.store import InMemoryLightningStore, LightningStoreThreaded
from lightning.store.broker import BrokerClosed
from lightning.store.contract import LightningStore
from lightning.store.threaded import LoopThread
from lightning.testing.stress import for_rounds, stress
from lightning.types import RolloutConfig

DEADLINE_SECONDS = 10.0

STORES: dict[str, Callable[[], LightningStore]] = {
    "memory": InMemoryLightningStore,
    "threaded memory": lambda: LightningStoreThreaded(InMemoryLightningStore()),
    "threaded foreign": lambda: LightningStoreThreaded(PlainStore()),
}


@pytest.mark.parametrize("make_store", STORES.values(), ids=STORES.keys())
def test_64_threads_and_8_event_loops_lose_nothing(make_store: Callable[[], LightningStore]) -> None:
    store = make_store()
    assert store.capabilities["thread_safe"]
    try:
        report = stress(store, go_on=for_rounds(4))
    finally:
        asyncio.run(store.close())
    assert len(report.enqueued) == 64 * 4


class Racy(InMemoryLightningStore):
    """Reads, lets others go first, and writes."""

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        number = await super().get_next_span_sequence_id(rollout_id, attempt_id)
        await asyncio.sleep(0)
        return number - number % 2


def test_a_store_that_loses_something_is_found_out() -> None:
    store = Racy()
    try:
        with pytest.raises(AssertionError, match="lost or repeated"):
            stress(store, n_threads=4, n_loops=2, go_on=for_rounds(5))
    finally:
        asyncio.run(store.close())


@pytest.mark.parametrize("make_store", STORES.values(), ids=STORES.keys())
def test_who_waits_holds_up_nobody_and_is_woken_from_another_thread(
    make_store: Callable[[], LightningStore],
) -> None:
    store = make_store()
    started = asyncio.run(store.start_rollout("task"))
    waits, found = threading.Event(), []

    async def wait() -> None:
        waiting = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[started.rollout_id]))
        claiming = asyncio.ensure_future(store.claim_rollouts())
        await store.statistics()
        waits.set()
        found.extend(await asyncio.wait_for(waiting, DEADLINE_SECONDS))
        found.extend(await asyncio.wait_for(claiming, DEADLINE_SECONDS))

    thread = threading.Thread(target=lambda: asyncio.run(wait()))
    thread.start()
    assert waits.wait(DEADLINE_SECONDS)
    asyncio.run(store.update_rollout(started.rollout_id, status="succeeded"))
    enqueued = asyncio.run(store.enqueue_rollout("another"))
    thread.join(DEADLINE_SECONDS)
    asyncio.run(store.close())
    assert [rollout.rollout_id for rollout in found] == [started.rollout_id, enqueued.rollout_id]


@pytest.mark.parametrize("make_store", STORES.values(), ids=STORES.keys())
def test_closing_releases_who_waits(make_store: Callable[[], LightningStore]) -> None:
    async def scenario() -> None:
        store = make_store()
        started = await store.start_rollout("task")
        waiter = asyncio.ensure_future(store.wait_for_rollouts(rollout_ids=[started.rollout_id]))
        for _ in range(5):
            await store.statistics()
        await store.close()
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(waiter, DEADLINE_SECONDS)
        await store.close()

    asyncio.run(scenario())


def test_a_threaded_store_that_was_closed_says_so_and_starts_no_thread() -> None:
    async def scenario() -> None:
        store = LightningStoreThreaded(InMemoryLightningStore())
        await store.enqueue_rollout("task")
        await store.close()
        with pytest.raises(BrokerClosed, match="closed"):
            await store.enqueue_rollout("task")

    asyncio.run(scenario())


def test_a_deadline_is_kept_although_the_loop_that_set_it_is_gone() -> None:
    store = InMemoryLightningStore()
    started = asyncio.run(store.start_rollout("task", config=RolloutConfig(timeout_seconds=0.05)))

    async def wait() -> list[str]:
        finished = await asyncio.wait_for(
            store.wait_for_rollouts(rollout_ids=[started.rollout_id]), DEADLINE_SECONDS
        )
        return [rollout.status for rollout in finished]

    assert asyncio.run(wait()) == ["failed"]
    asyncio.run(store.close())


async def _until_cancelled(begun: threading.Event) -> None:
    try:
        begun.set()
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise RuntimeError("of no interest any more") from None


def test_what_is_submitted_last_is_ended_with_the_loop() -> None:
    thread, submitted = LoopThread("calls"), []

    async def submit_and_stop() -> None:  # on the loop: it stops before the task takes its first step
        submitted.append(thread.submit(asyncio.sleep(DEADLINE_SECONDS)))
        thread.stop()

    thread.run_blocking(submit_and_stop(), DEADLINE_SECONDS)
    with pytest.raises(CancelledError):
        submitted[0].result(DEADLINE_SECONDS)
    submitted.clear()
    gc.collect()  # a coroutine that was never awaited would complain


def test_what_a_call_raises_that_its_caller_has_given_up_is_not_complained_about() -> None:
    complaints: list[object] = []
    thread, begun = LoopThread("calls"), threading.Event()

    async def watch() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def call() -> None:
        calling = asyncio.ensure_future(thread.run(_until_cancelled(begun)))
        await asyncio.to_thread(begun.wait, DEADLINE_SECONDS)
        calling.cancel()
        await asyncio.wait({calling})
        assert calling.cancelled()

    thread.run_blocking(watch())
    asyncio.run(call())
    thread.stop()
    gc.collect()
    assert complaints == []
