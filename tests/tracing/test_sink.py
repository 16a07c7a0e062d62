"""The way of an attempt's spans to the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry import trace

from lightning.store.backends import InMemoryLightningStore
from lightning.store.threaded import LoopThread
from lightning.testing.unreliable import UnreliableStore
from lightning.tracing import AttemptTrace, OtelTracer, sink
from lightning.types import Span

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 10.0


def span(name: str, number: int = 1, **fields: Any) -> Span:
    ids = {"rollout_id": "-", "attempt_id": "-", "trace_id": "1" * 32, "span_id": format(number, "016x")}
    return Span(sequence_id=0, name=name, **ids, **fields)


@asynccontextmanager
async def attempt_trace(store: UnreliableStore, **bounds: int) -> AsyncIterator[AttemptTrace]:
    rollout = await store.start_rollout("task")
    attempt = AttemptTrace(store, rollout.rollout_id, rollout.attempt.attempt_id, **bounds)
    await attempt.start()
    try:
        yield attempt
    finally:
        await attempt.close(0)


async def stored_names(store: UnreliableStore, attempt: AttemptTrace) -> list[str]:
    return [found.name for found in await store.query_spans(attempt.rollout_id, attempt.attempt_id)]


async def test_the_first_span_is_sent_at_once_and_makes_the_attempt_running(store: UnreliableStore) -> None:
    async with attempt_trace(store) as attempt:
        attempt.put(span("first"))
        await store.wait_for_answers("deliver_spans")
        rollout = await store.get_rollout_by_id(attempt.rollout_id)
        assert rollout is not None
        assert rollout.status == "running"


async def test_a_burst_travels_in_one_call_in_the_order_of_its_spans(store: UnreliableStore) -> None:
    async with attempt_trace(store) as attempt:
        for number in range(100):
            attempt.put(span(f"s{number}", number + 1))
        await attempt.flush()
        names = [f"s{number}" for number in range(100)]
        assert await stored_names(store, attempt) == names
        assert store.span_batches == [names]
        found = await store.query_spans(attempt.rollout_id)
        assert [one.sequence_id for one in found] == list(range(1, 101))
        assert store.calls["get_next_span_sequence_id"] == 0
        assert attempt.stored == 100


async def test_batches_are_cut_by_count(store: UnreliableStore) -> None:
    async with attempt_trace(store) as attempt:
        for number in range(sink.MAX_BATCH_SPANS + 1):
            attempt.put(span("s", number + 1))
        await attempt.flush()
        assert [len(batch) for batch in store.span_batches] == [sink.MAX_BATCH_SPANS, 1]


async def test_batches_are_cut_by_bytes_but_take_one_span_however_big(store: UnreliableStore) -> None:
    half = sink.MAX_BATCH_BYTES // 2
    async with attempt_trace(store) as attempt:
        for number, size in enumerate([half - 1000, half - 1000, half, 3 * half, 1]):
            attempt.put(span(f"s{number}", number + 1, attributes={"text": "x" * size}))
        await attempt.flush()
        assert store.span_batches == [["s0", "s1"], ["s2"], ["s3"], ["s4"]]


async def test_a_flush_that_is_given_up_before_sending_began_stops_nothing(store: UnreliableStore) -> None:
    may_begin = asyncio.Event()

    async def run_late(work: Any) -> Any:
        await may_begin.wait()
        return await work

    rollout = await store.start_rollout("task")
    attempt = AttemptTrace(store, rollout.rollout_id, rollout.attempt.attempt_id, run=run_late)
    await attempt.start()
    attempt.put(span("s"))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(attempt.flush(), 0.01)
    may_begin.set()
    await attempt.close()
    assert attempt.stored == 1


async def test_flush_returns_when_everything_is_stored_and_can_be_called_again(
    store: UnreliableStore,
) -> None:
    async with attempt_trace(store) as attempt:
        await attempt.flush()
        for number in range(3):
            attempt.put(span(f"s{number}", number + 1))
            await attempt.flush()
            assert len(await stored_names(store, attempt)) == number + 1


async def test_spans_wait_for_a_store_that_is_away(
    store: UnreliableStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with attempt_trace(store) as attempt:
        store.away = True
        attempt.put(span("one", 1))
        await store.wait_for_calls("deliver_spans", 2)
        attempt.put(span("two", 2))
        flushing = asyncio.ensure_future(attempt.flush())
        await asyncio.sleep(0)
        assert not flushing.done()
        store.away = False
        await asyncio.wait_for(flushing, DEADLINE_SECONDS)
        assert await stored_names(store, attempt) == ["one", "two"]
    assert (attempt.stored, attempt.dropped, attempt.refused) == (2, 0, 0)
    warnings = [record for record in caplog.records if "wait for the store" in record.message]
    assert len(warnings) == 1


class ForgetfulStore(UnreliableStore):
    """Stores the first delivery, but never says so."""

    async def _forward(self, verb: str, *args: Any, **kwargs: Any) -> Any:
        answer = await super()._forward(verb, *args, **kwargs)
        if verb == "deliver_spans" and self.answers[verb] == 1:
            raise ConnectionError("the answer is lost")
        return answer


async def test_spans_that_were_stored_before_the_answer_was_lost_count_as_stored() -> None:
    store = ForgetfulStore(InMemoryLightningStore())
    async with attempt_trace(store) as attempt:
        attempt.put(span("one", 1))
        await asyncio.wait_for(attempt.flush(), DEADLINE_SECONDS)
        assert await stored_names(store, attempt) == ["one"]
    assert store.calls["deliver_spans"] == 2
    assert (attempt.stored, attempt.dropped, attempt.refused) == (1, 0, 0)


@pytest.mark.parametrize("bounds", [{"max_buffered_spans": 3}, {"max_buffered_bytes": 5000}])
async def test_what_exceeds_the_bounds_while_the_store_is_away_is_dropped_and_counted(
    store: UnreliableStore, caplog: pytest.LogCaptureFixture, bounds: dict[str, int]
) -> None:
    async with attempt_trace(store, **bounds) as attempt:
        store.away = True
        attempt.put(span("in flight", 99))
        await store.wait_for_calls("deliver_spans")
        for number in range(5):
            attempt.put(span(f"s{number}", number + 1, attributes={"text": "x" * 1000}))
        assert attempt.dropped == 2
        store.away = False
        await asyncio.wait_for(attempt.flush(), DEADLINE_SECONDS)
        assert await stored_names(store, attempt) == ["in flight", "s0", "s1", "s2"]
    assert sum("being dropped" in record.message for record in caplog.records) == 1


async def test_a_span_that_cannot_be_stored_does_not_cost_the_others(
    store: UnreliableStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with attempt_trace(store) as attempt:
        for number in range(10):
            bad = {"attributes": {"deep": object()}} if number in (3, 8) else {}
            attempt.put(span(f"s{number}", number + 1, **bad))
        await attempt.flush()
        assert await stored_names(store, attempt) == [f"s{n}" for n in range(10) if n not in (3, 8)]
        assert (attempt.stored, attempt.refused) == (8, 2)
    refused = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert any("'s3'" in message and "deep" in message for message in refused)
    assert any("'s8'" in message for message in refused)


async def test_spans_of_an_attempt_that_the_store_does_not_know_are_refused_in_one_call(
    store: UnreliableStore,
) -> None:
    attempt = AttemptTrace(store, "ro-unknown", "at-unknown")
    await attempt.start()
    for number in range(10):
        attempt.put(span("s", number + 1))
    await attempt.close()
    assert attempt.refused == 10
    assert store.calls["deliver_spans"] == 1


async def test_a_span_is_not_counted_twice_when_it_is_a_duplicate(store: UnreliableStore) -> None:
    async with attempt_trace(store) as attempt:
        attempt.put(span("s", 1))
        attempt.put(span("s", 1))
        await attempt.flush()
        assert attempt.stored == 1


async def test_close_with_a_time_limit_gives_up_on_a_store_that_stays_away(store: UnreliableStore) -> None:
    async with attempt_trace(store) as attempt:
        store.away = True
        attempt.put(span("s", 1))
        await store.wait_for_calls("deliver_spans")
        attempt.put(span("s", 2))
        await attempt.close(0.01)
        assert attempt.dropped == 2
        assert not attempt.open


async def test_what_comes_after_the_end_is_counted_as_late(store: UnreliableStore) -> None:
    async with attempt_trace(store) as attempt:
        await attempt.close()
        attempt.put(span("s", 1))
        assert (attempt.late, attempt.stored) == (1, 0)


async def test_the_sending_can_go_on_while_the_own_loop_is_blocked() -> None:
    store = InMemoryLightningStore()
    rollout = await store.start_rollout("task")
    thread = LoopThread("upkeep")
    tracer = OtelTracer()
    async with tracer.trace(store, rollout.rollout_id, rollout.attempt.attempt_id, run=thread.run) as attempt:
        with trace.get_tracer("t").start_as_current_span("blocking"):
            pass
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not attempt.stored and time.monotonic() < deadline:
            pass  # this loop is held up all the while
        assert attempt.stored == 1
    thread.stop()
    await store.close()
