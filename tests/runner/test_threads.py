"""Threads that run blocking code, and can be interrupted."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any

import pytest

from lightning.runner.threads import AgentInterrupted, BlockingThread, CallEnded

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0


@asynccontextmanager
async def blocking_thread() -> AsyncIterator[BlockingThread]:
    thread = BlockingThread("lightning-test")
    try:
        yield thread
    finally:
        thread.stop()
        assert thread.join(DEADLINE_SECONDS)


def call(thread: BlockingThread, function: Callable[[], Any]) -> asyncio.Future[Any]:
    return thread.call(function, copy_context())


async def test_calls_run_one_after_the_other_on_one_thread() -> None:
    async with blocking_thread() as thread:
        idents = [await call(thread, threading.get_ident) for _ in range(3)]
    assert len(set(idents)) == 1
    assert idents[0] != threading.get_ident()


async def test_a_call_sees_the_context_it_is_given() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("mine")
    async with blocking_thread() as thread:
        assert await call(thread, variable.get) == "mine"


async def test_what_a_call_raises_is_raised_to_who_awaits_it() -> None:
    def fail() -> None:
        raise LookupError("as it happens")

    async with blocking_thread() as thread:
        with pytest.raises(LookupError, match="as it happens"):
            await call(thread, fail)
        assert await call(thread, lambda: "still alive") == "still alive"


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), StopIteration(1), GeneratorExit(), asyncio.CancelledError()]
)
async def test_what_would_end_the_event_loop_arrives_wrapped(error: BaseException) -> None:
    def fail() -> None:
        raise error

    async with blocking_thread() as thread:
        with pytest.raises(CallEnded) as caught:
            await call(thread, fail)
        assert caught.value.cause is error


async def test_an_interruption_is_raised_in_the_code_within_200_ms_whatever_it_catches() -> None:
    entered = threading.Event()
    struck: list[float] = []

    def stubborn() -> None:
        try:
            while True:
                try:
                    entered.set()
                    time.sleep(0.005)
                except Exception:  # noqa: BLE001  # as agents do that try again
                    continue
        finally:
            struck.append(time.monotonic())

    async with blocking_thread() as thread:
        running = call(thread, stubborn)
        assert await asyncio.to_thread(entered.wait, DEADLINE_SECONDS)
        before = time.monotonic()
        thread.interrupt(running)
        with pytest.raises(CallEnded) as caught:
            await asyncio.wait_for(running, DEADLINE_SECONDS)
        assert isinstance(caught.value.cause, AgentInterrupted)
        assert struck[0] - before < 0.2
        assert not thread.reusable


async def test_an_interrupted_thread_takes_no_further_call() -> None:
    async with blocking_thread() as thread:
        running = call(thread, lambda: time.sleep(0.05))
        thread.interrupt(running)
        with pytest.raises(RuntimeError, match="take another"):
            call(thread, lambda: None)
        await asyncio.wait({running})
        assert running.exception() is not None


async def test_interrupting_a_call_that_is_done_touches_nothing() -> None:
    async with blocking_thread() as thread:
        done = call(thread, lambda: 1)
        await done
        thread.interrupt(done)
        assert thread.reusable
        assert await call(thread, lambda: 2) == 2


async def test_an_interruption_at_any_moment_leaves_the_call_answered() -> None:
    """It may strike before the call begins, in it, or in what follows; the caller must hear of it in each case."""
    for delay in range(300):
        thread = BlockingThread("lightning-test")
        running = call(thread, lambda: sum(range(200)))
        for _ in range(delay * 5):
            pass
        thread.interrupt(running)
        thread.stop()
        await asyncio.wait_for(asyncio.wait({running}), DEADLINE_SECONDS)
        error = running.exception()
        assert error is None or isinstance(error, CallEnded)
        assert thread.join(DEADLINE_SECONDS)
