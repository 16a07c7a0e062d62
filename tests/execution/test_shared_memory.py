"""The algorithm and the runners as threads of one process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from lightning.execution import ExecutionEvent, SharedMemoryExecutionStrategy, worker_name
from lightning.store import InMemoryLightningStore, LightningStore, LightningStoreThreaded

DEADLINE_SECONDS = 20.0


async def work(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
    """A runner that does what it finds until it is told to stop."""
    while not event.is_set():
        for claimed in await store.claim_rollouts(worker_id=worker_name(worker_id), timeout=0.05):
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")


async def idle(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
    """A runner that only waits to be told to stop."""
    while not event.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def never_ends(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
    """A runner that has to be cancelled."""
    await asyncio.get_running_loop().create_future()


class Algorithm:
    """Has ten rollouts done and remembers how they ended and where it ran."""

    def __init__(self) -> None:
        self.statuses: list[str] = []
        self.thread: threading.Thread | None = None

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        self.thread = threading.current_thread()
        assert isinstance(store, LightningStoreThreaded)
        ids = [(await store.enqueue_rollout(input=number)).rollout_id for number in range(10)]
        done = await store.wait_for_rollouts(rollout_ids=ids, timeout=DEADLINE_SECONDS)
        self.statuses = [rollout.status for rollout in done]


@pytest.mark.parametrize("n_runners", [1, 3])
def test_runners_do_the_work_of_the_algorithm(n_runners: int) -> None:
    algorithm = Algorithm()
    SharedMemoryExecutionStrategy(n_runners=n_runners).execute(algorithm, work)
    assert algorithm.statuses == ["succeeded"] * 10
    assert algorithm.thread is threading.main_thread()


def test_the_runner_can_have_the_main_thread() -> None:
    algorithm, threads = Algorithm(), []

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        threads.append((worker_id, threading.current_thread()))
        await work(store, worker_id, event)

    SharedMemoryExecutionStrategy(main_thread="runner").execute(algorithm, runner)
    assert algorithm.statuses == ["succeeded"] * 10
    assert threads == [(0, threading.main_thread())]
    assert algorithm.thread is not threading.main_thread()


def test_the_callers_store_is_used_and_stays_open() -> None:
    store = InMemoryLightningStore()
    SharedMemoryExecutionStrategy().execute(Algorithm(), work, store)

    async def look() -> int:
        return (await store.query_rollouts(status_in=["succeeded"])).total

    assert asyncio.run(look()) == 10


def test_an_unmanaged_store_is_not_wrapped_in_another_thread() -> None:
    seen = []

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        seen.append(isinstance(store, LightningStoreThreaded))
        await store.enqueue_rollout(input=1)

    SharedMemoryExecutionStrategy(managed_store=False).execute(algorithm, idle)
    assert seen == [False]


@pytest.mark.parametrize("main_thread", ["algorithm", "runner"])
def test_what_the_algorithm_raises_is_raised(main_thread: str) -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        raise KeyError("of the algorithm")

    strategy = SharedMemoryExecutionStrategy(main_thread=main_thread)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="of the algorithm"):
        strategy.execute(algorithm, idle)


@pytest.mark.parametrize("main_thread", ["algorithm", "runner"])
def test_what_a_runner_raises_ends_the_job(main_thread: str) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        await asyncio.to_thread(begun.wait)
        raise ZeroDivisionError("of the runner")

    strategy = SharedMemoryExecutionStrategy(main_thread=main_thread, graceful_delay=0.05)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError, match="of the runner"):
        strategy.execute(algorithm, runner)
    assert cancelled.is_set()


def test_system_exit_of_the_algorithm_is_the_callers() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        raise SystemExit(7)

    with pytest.raises(SystemExit) as raised:
        SharedMemoryExecutionStrategy().execute(algorithm, idle)
    assert raised.value.code == 7


def test_a_runner_that_does_not_heed_the_event_is_cancelled() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        return

    started = time.monotonic()
    SharedMemoryExecutionStrategy(graceful_delay=0.1).execute(algorithm, never_ends)
    assert 0.1 <= time.monotonic() - started < 5


@pytest.mark.parametrize("main_thread", ["algorithm", "runner"])
def test_a_bundle_that_sets_the_event_ends_the_job(main_thread: str) -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        await asyncio.get_running_loop().create_future()

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        event.set()

    strategy = SharedMemoryExecutionStrategy(
        main_thread=main_thread,  # type: ignore[arg-type]
        graceful_delay=0.05,
        poll_interval=0.01,
    )
    strategy.execute(algorithm, runner)


def test_a_thread_that_hangs_is_left_behind_and_named(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        return

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        release.wait(DEADLINE_SECONDS)

    try:
        SharedMemoryExecutionStrategy(graceful_delay=0.05, join_timeout=0.05).execute(algorithm, runner)
    finally:
        release.set()
    assert "runner-0 does not end" in caplog.text


def test_ctrl_c_ends_the_job_in_order() -> None:
    ended = []

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("algorithm")

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        await idle(store, worker_id, event)
        ended.append("runner")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        SharedMemoryExecutionStrategy().execute(algorithm, runner)
    assert sorted(ended) == ["algorithm", "runner"]
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_ends_the_job_in_order() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SystemExit) as raised:
        SharedMemoryExecutionStrategy().execute(algorithm, idle)
    assert raised.value.code == 128 + signal.SIGTERM


def test_the_programs_own_handler_gets_the_signal_in_the_end() -> None:
    heard = []

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.get_running_loop().create_future()

    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        SharedMemoryExecutionStrategy().execute(algorithm, idle)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [signal.SIGTERM]


def test_ctrl_c_reaches_an_algorithm_that_blocks_after_the_graceful_time() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(DEADLINE_SECONDS)  # noqa: ASYNC251

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        SharedMemoryExecutionStrategy(graceful_delay=0.1).execute(algorithm, idle)
    assert time.monotonic() - started < 5


def test_the_second_ctrl_c_does_not_wait() -> None:
    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(DEADLINE_SECONDS)  # noqa: ASYNC251

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        SharedMemoryExecutionStrategy(graceful_delay=DEADLINE_SECONDS).execute(algorithm, idle)
    assert time.monotonic() - started < 5


def test_it_works_where_an_event_loop_runs_already() -> None:
    """As in a notebook."""
    algorithm = Algorithm()

    async def cell() -> None:
        SharedMemoryExecutionStrategy().execute(algorithm, work)

    asyncio.run(cell())
    assert algorithm.statuses == ["succeeded"] * 10


def test_a_bundle_that_hangs_does_not_keep_a_running_event_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning.execution.job._LAST_CHANCE_SECONDS", 0.01)
    blocks, released = threading.Event(), threading.Event()

    async def algorithm(store: LightningStore, event: ExecutionEvent) -> None:
        blocks.set()
        released.wait(DEADLINE_SECONDS)

    async def runner(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        await asyncio.to_thread(blocks.wait, DEADLINE_SECONDS)
        raise KeyError("of the runner")

    async def cell() -> None:
        SharedMemoryExecutionStrategy(graceful_delay=0, join_timeout=0).execute(algorithm, runner)

    try:
        with pytest.raises(KeyError, match="of the runner"):
            asyncio.run(cell())
        assert not released.is_set()
        assert "its thread is left behind" in caplog.text
    finally:
        released.set()


def test_it_works_in_another_thread() -> None:
    algorithm = Algorithm()
    thread = threading.Thread(target=lambda: SharedMemoryExecutionStrategy().execute(algorithm, work))
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert algorithm.statuses == ["succeeded"] * 10
    assert algorithm.thread is thread


def test_a_strategy_can_be_used_again() -> None:
    strategy = SharedMemoryExecutionStrategy()
    for _ in range(2):
        algorithm = Algorithm()
        strategy.execute(algorithm, work)
        assert algorithm.statuses == ["succeeded"] * 10


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"n_runners": 0}, "n_runners must be at least 1"),
        ({"n_runners": 2, "main_thread": "runner"}, "one runner only, not n_runners=2"),
        ({"main_thread": "store"}, "main_thread must be one of algorithm, runner"),
        ({"join_timeout": -1}, "join_timeout must not be negative"),
        ({"graceful_delay": float("nan")}, "graceful_delay must not be negative"),
        ({"poll_interval": 0}, "poll_interval must be positive"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SharedMemoryExecutionStrategy(**arguments)  # type: ignore[arg-type]
