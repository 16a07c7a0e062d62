"""The stop event, in threads and across processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from lightning.execution import ExecutionEvent, MultiprocessingEvent, ThreadingEvent

DEADLINE_SECONDS = 20.0


@pytest.fixture(params=[ThreadingEvent, MultiprocessingEvent])
def event(request: pytest.FixtureRequest) -> ExecutionEvent:
    made: ExecutionEvent = request.param()
    return made


def test_is_what_bundles_expect(event: ExecutionEvent) -> None:
    assert isinstance(event, ExecutionEvent)
    assert not event.is_set()
    event.set()
    assert event.is_set()
    assert event.wait()
    event.set()
    event.clear()
    assert not event.is_set()


def test_waiting_ends_when_the_time_is_up(event: ExecutionEvent) -> None:
    started = time.monotonic()
    assert event.wait(0.05) is False
    assert time.monotonic() - started >= 0.04
    assert event.wait(0) is False
    assert event.wait(-1) is False


def test_setting_wakes_every_waiting_thread(event: ExecutionEvent) -> None:
    woken = []
    threads = [
        threading.Thread(target=lambda: woken.append(event.wait(DEADLINE_SECONDS)), daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    event.set()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
    assert woken == [True, True, True]


def test_setting_it_very_often_does_not_block(event: ExecutionEvent) -> None:
    for _ in range(100_000):
        event.set()
    event.clear()
    assert not event.is_set()


@pytest.mark.anyio
async def test_an_event_loop_can_wait_for_it() -> None:
    event = MultiprocessingEvent()
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(event.fileno(), seen.set)
    try:
        threading.Timer(0.01, event.set).start()
        await asyncio.wait_for(seen.wait(), DEADLINE_SECONDS)
    finally:
        loop.remove_reader(event.fileno())


def _answer(question: MultiprocessingEvent, answer: MultiprocessingEvent) -> None:
    if question.wait(DEADLINE_SECONDS):
        answer.set()


def _wait_for_ever(ready: MultiprocessingEvent, event: MultiprocessingEvent) -> None:
    ready.set()
    while True:
        event.is_set()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_share_it(method: str) -> None:
    context = multiprocessing.get_context(method)
    question, answer = MultiprocessingEvent(context), MultiprocessingEvent(context)
    process = context.Process(target=_answer, args=(question, answer))  # type: ignore[attr-defined]
    process.start()
    assert not answer.is_set()
    question.set()
    assert answer.wait(DEADLINE_SECONDS)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0


def test_a_process_that_is_killed_takes_nothing_with_it() -> None:
    context = multiprocessing.get_context("spawn")
    ready, event = MultiprocessingEvent(), MultiprocessingEvent()
    process = context.Process(target=_wait_for_ever, args=(ready, event))
    process.start()
    assert ready.wait(DEADLINE_SECONDS)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE_SECONDS)
    event.set()
    assert event.is_set()


def test_it_cannot_be_sent_to_a_process_that_runs_already() -> None:
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(MultiprocessingEvent())


def _open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_it_gives_its_file_descriptors_back() -> None:
    before = _open_files()
    events = [MultiprocessingEvent() for _ in range(10)]
    assert _open_files() == before + 20
    del events
    assert _open_files() == before
