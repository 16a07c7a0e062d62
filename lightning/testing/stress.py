"""Many threads and event loops on one store at once, and the count afterwards: nothing lost, nothing done twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning.store.contract import LightningStore
from lightning.testing.records import make_span
from lightning.types import AttemptedRollout

T = TypeVar("T")

_CALL_DEADLINE_SECONDS = 60.0
"""A call that takes longer counts as a deadlock."""
_SPANS_PER_ROLLOUT = 3


@dataclass
class StressReport:
    """What all threads together did."""

    calls: int = 0
    enqueued: list[str] = field(default_factory=list)
    claimed: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Sequence ids that were taken from the one attempt that all threads share."""

    def add(self, other: StressReport) -> None:
        """Count another thread's share as well."""
        self.calls += other.calls
        self.enqueued += other.enqueued
        self.claimed += other.claimed
        self.numbers += other.numbers


def stress(
    store: LightningStore,
    *,
    n_threads: int = 64,
    n_loops: int = 8,
    go_on: Callable[[int], bool],
) -> StressReport:
    """Have `n_threads` threads call `store`, by way of `n_loops` event loops, and check what came of it.

    Args:
        store: An empty store that may be called from many threads and event loops.
        n_threads: How many threads call.
        n_loops: How many event loops they share.
        go_on: Told how many rounds a thread has done, says whether it shall do another one.

    Raises:
        AssertionError: An update was lost, a rollout was claimed twice, or a number was issued twice.
        TimeoutError: A call took longer than a minute.
    """
    with ExitStack() as stack:
        loops = [stack.enter_context(_running_loop()) for _ in range(n_loops)]
        shared = _on(loops[0], store.start_rollout("shared"))
        with ThreadPoolExecutor(n_threads, thread_name_prefix="stress") as pool:
            threads = [
                pool.submit(_Caller(store, loops[n % n_loops], f"w-{n}", shared).work, go_on)
                for n in range(n_threads)
            ]
            report = StressReport()
            for thread in threads:
                report.add(thread.result())
        _on(loops[0], _check(store, report, shared, [f"w-{n}" for n in range(n_threads)]))
    return report


class _Caller:
    """One thread."""

    def __init__(
        self, store: LightningStore, loop: asyncio.AbstractEventLoop, name: str, shared: AttemptedRollout
    ) -> None:
        self.store = store
        self.loop = loop
        self.name = name
        self.shared = shared
        self.report = StressReport()

    def call(self, verb: Coroutine[Any, Any, T]) -> T:
        self.report.calls += 1
        return _on(self.loop, verb)

    def work(self, go_on: Callable[[int], bool]) -> StressReport:
        rounds = 0
        while go_on(rounds):
            rounds += 1
            self.round()
        return self.report

    def round(self) -> None:
        """Enqueue one, claim one (most likely another thread's), execute it, and count in between."""
        store, ids = self.store, (self.shared.rollout_id, self.shared.attempt.attempt_id)
        self.report.enqueued.append(self.call(store.enqueue_rollout(self.name)).rollout_id)
        claimed = self.call(store.dequeue_rollout(worker_id=self.name))
        self.report.numbers.append(self.call(store.get_next_span_sequence_id(*ids)))
        if claimed is None:
            return
        self.report.claimed.append(claimed.rollout_id)
        self.call(store.add_many_spans([make_span(claimed) for _ in range(_SPANS_PER_ROLLOUT)]))
        shared_span = self.call(store.add_span(make_span(self.shared)))
        assert shared_span is not None
        self.report.numbers.append(shared_span.sequence_id)
        self.call(store.update_worker(self.name, {"claimed": len(self.report.claimed)}))
        self.call(store.update_rollout(claimed.rollout_id, metadata={"by": self.name}))
        self.call(store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded"))


async def _check(
    store: LightningStore, report: StressReport, shared: AttemptedRollout, names: list[str]
) -> None:
    while rest := await store.dequeue_many_rollouts(limit=1000):
        for left in rest:
            report.claimed.append(left.rollout_id)
            await store.add_many_spans([make_span(left) for _ in range(_SPANS_PER_ROLLOUT)])
            await store.update_rollout(left.rollout_id, metadata={"by": "the last"}, status="succeeded")
    twice = [rollout_id for rollout_id, count in Counter(report.claimed).items() if count > 1]
    assert not twice, f"claimed twice: {twice[:5]}"
    assert sorted(report.claimed) == sorted(report.enqueued), "some were enqueued and never handed out"
    assert sorted(report.numbers) == list(range(1, len(report.numbers) + 1)), "numbers were lost or repeated"
    statistics = await store.statistics()
    assert statistics["total_rollouts"] == statistics["total_attempts"] == len(report.enqueued) + 1
    spans_of_shared = (await store.query_spans(shared.rollout_id, limit=0)).total
    assert statistics["total_spans"] == len(report.enqueued) * _SPANS_PER_ROLLOUT + spans_of_shared
    for rollout in await store.query_rollouts(rollout_id_in=report.enqueued):
        assert (rollout.status, bool(rollout.metadata)) == ("succeeded", True), rollout
    for name in names:
        worker = await store.get_worker_by_id(name)
        assert worker is not None
        assert worker.current_attempt_id is None, worker


def _on(loop: asyncio.AbstractEventLoop, verb: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(verb, loop).result(_CALL_DEADLINE_SECONDS)


@contextmanager
def _running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="stress-loop", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(_CALL_DEADLINE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CALL_DEADLINE_SECONDS)
        loop.close()


async def _cancel_all() -> None:
    """Such as a store's watchdog, which runs on the loop of whoever caused a deadline."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def for_seconds(seconds: float) -> Callable[[int], bool]:
    """For `stress`: go on until so much time has passed, in seconds from now."""
    end = time.monotonic() + seconds
    return lambda rounds: time.monotonic() < end


def for_rounds(count: int) -> Callable[[int], bool]:
    """For `stress`: every thread does so many rounds."""
    return lambda rounds: rounds < count
