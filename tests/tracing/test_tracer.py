"""Which attempt a span that is made with the plain OpenTelemetry API belongs to."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace

from lightning.testing.unreliable import UnreliableStore
from lightning.tracing import AttemptTrace, OtelTracer, emit_reward, provider
from lightning.types import Span

pytestmark = pytest.mark.anyio

TRACER = trace.get_tracer("obtained before anything was installed")


@asynccontextmanager
async def traced(store: UnreliableStore) -> AsyncIterator[AttemptTrace]:
    rollout = await store.start_rollout("task")
    async with OtelTracer().trace(store, rollout.rollout_id, rollout.attempt.attempt_id) as attempt:
        yield attempt


async def spans_of(store: UnreliableStore, attempt: AttemptTrace) -> list[Span]:
    return list(await store.query_spans(attempt.rollout_id))


async def names_of(store: UnreliableStore, attempt: AttemptTrace) -> list[str]:
    return [span.name for span in await spans_of(store, attempt)]


async def test_spans_of_the_plain_api_end_up_in_the_attempt(store: UnreliableStore) -> None:
    async with traced(store) as attempt:
        with TRACER.start_as_current_span("outer"), TRACER.start_as_current_span("inner"):
            trace.get_tracer("another").start_span("leaf").end()
    leaf, inner, outer = await spans_of(store, attempt)
    assert [leaf.name, inner.name, outer.name] == ["leaf", "inner", "outer"]
    assert (leaf.parent_id, inner.parent_id, outer.parent_id) == (inner.span_id, outer.span_id, None)
    assert attempt.stored == 3


async def test_all_spans_of_an_attempt_share_a_trace_and_attempts_do_not(store: UnreliableStore) -> None:
    async with traced(store) as one:
        TRACER.start_span("a").end()
        TRACER.start_span("b").end()
    async with traced(store) as other:
        TRACER.start_span("c").end()
    traces = [{span.trace_id for span in await spans_of(store, attempt)} for attempt in (one, other)]
    assert [len(ids) for ids in traces] == [1, 1]
    assert traces[0] != traces[1]


async def test_outside_of_an_attempt_spans_go_nowhere(store: UnreliableStore) -> None:
    async with traced(store) as attempt:
        pass
    TRACER.start_span("afterwards").end()
    assert provider.current_target() is None
    assert await names_of(store, attempt) == []


async def test_the_spans_around_the_attempt_are_not_part_of_it(store: UnreliableStore) -> None:
    with TRACER.start_as_current_span("the runner's own") as around:
        async with traced(store) as attempt:
            TRACER.start_span("mine").end()
        assert trace.get_current_span() is around
    (mine,) = await spans_of(store, attempt)
    assert (mine.name, mine.parent_id) == ("mine", None)


async def test_concurrent_attempts_in_tasks_stay_apart(store: UnreliableStore) -> None:
    barrier = asyncio.Barrier(4) if sys.version_info >= (3, 11) else None

    async def agent(number: int) -> list[str]:
        async with traced(store) as attempt:
            for _ in range(3):
                with TRACER.start_as_current_span(f"agent {number}"):
                    await (barrier.wait() if barrier else asyncio.sleep(0))
                    await asyncio.create_task(step(number))
            emit_reward(float(number))
        return await names_of(store, attempt)

    async def step(number: int) -> None:
        with TRACER.start_as_current_span(f"step {number}"):
            await asyncio.sleep(0)

    for number, names in enumerate(await asyncio.gather(*(agent(number) for number in range(4)))):
        expected = [f"step {number}", f"agent {number}"] * 3 + ["agentlightning.annotation"]
        assert names == expected


async def test_a_thread_with_a_copied_context_belongs_to_the_attempt(store: UnreliableStore) -> None:
    async with traced(store) as attempt:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: TRACER.start_span("in thread").end(),))
        thread.start()
        thread.join()
    assert await names_of(store, attempt) == ["in thread"]


async def test_a_plain_thread_that_is_given_the_parent_span_belongs_to_its_attempt(
    store: UnreliableStore,
) -> None:
    async with traced(store) as attempt:
        with TRACER.start_as_current_span("parent") as parent:

            def work() -> None:
                with TRACER.start_as_current_span("child", context=trace.set_span_in_context(parent)):
                    TRACER.start_span("grandchild").end()

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert await names_of(store, attempt) == ["grandchild", "child", "parent"]


async def test_a_plain_thread_belongs_to_the_attempt_whose_trace_it_continues(store: UnreliableStore) -> None:
    async with traced(store) as attempt:
        with TRACER.start_as_current_span("parent") as parent:
            carrier = trace.set_span_in_context(parent)
        ended_parent = carrier

        thread = threading.Thread(target=lambda: TRACER.start_span("child", context=ended_parent).end())
        thread.start()
        thread.join()
    assert await names_of(store, attempt) == ["parent", "child"]


async def test_the_parent_decides_where_the_context_is_anothers(store: UnreliableStore) -> None:
    async with traced(store) as one:
        stale = contextvars.copy_context()  # as a thread pool has that was first used in this attempt
        async with traced(store) as other:
            with TRACER.start_as_current_span("parent") as parent:
                context = trace.set_span_in_context(parent)
                stale.run(lambda: TRACER.start_span("child", context=context).end())
    assert await names_of(store, one) == []
    assert await names_of(store, other) == ["child", "parent"]


async def test_attempts_that_continue_one_remote_trace_stay_apart(store: UnreliableStore) -> None:
    remote = trace.SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=trace.TraceFlags(0))
    context = trace.set_span_in_context(trace.NonRecordingSpan(remote), otel_context.Context())

    async def agent(name: str) -> AttemptTrace:
        async with traced(store) as attempt:
            with TRACER.start_as_current_span(name, context=context):
                await asyncio.sleep(0)
        return attempt

    one, other = await asyncio.gather(agent("one"), agent("other"))
    assert await names_of(store, one) == ["one"]
    assert await names_of(store, other) == ["other"]


async def test_a_span_belongs_to_the_attempt_in_which_it_was_started(store: UnreliableStore) -> None:
    async with traced(store) as one:
        span = TRACER.start_span("long")
        async with traced(store) as other:
            span.end()
    assert await names_of(store, one) == ["long"]
    assert await names_of(store, other) == []


async def test_a_span_that_ends_after_its_attempt_is_late_and_one_that_never_ends_is_forgotten(
    store: UnreliableStore,
) -> None:
    async with traced(store) as attempt:
        late = TRACER.start_span("late")
        emit_reward(1.0)
    late.end()
    assert await names_of(store, attempt) == ["agentlightning.annotation"]
    assert not provider._by_open_span
    assert not provider._by_trace


async def test_no_attribute_event_or_link_is_cut(store: UnreliableStore) -> None:
    async with traced(store) as attempt:
        with TRACER.start_as_current_span("big") as span:
            for number in range(500):
                span.set_attribute(f"a{number}", "x" * 100)
                span.add_event(f"e{number}")
    (big,) = await spans_of(store, attempt)
    assert (len(big.attributes), len(big.events)) == (500, 500)


@pytest.mark.parametrize("bounds", [{"max_buffered_spans": 0}, {"max_buffered_bytes": -1}])
def test_a_tracer_without_room_is_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bounds))):
        OtelTracer(**bounds)


def test_a_tracer_travels() -> None:
    assert isinstance(pickle.loads(pickle.dumps(OtelTracer(max_buffered_spans=7))), OtelTracer)


# --- What the program did with the global provider: one process each, as it can be set once only -----------------

PROGRAM = """
import asyncio, logging, sys, warnings
warnings.simplefilter("error")
from opentelemetry import trace
from lightning.store.backends import InMemoryLightningStore
from lightning.tracing import OtelTracer, emit_reward
{setup}

async def main():
    store = InMemoryLightningStore()
    for _ in range(2):
        rollout = await store.start_rollout("task")
        async with OtelTracer().trace(store, rollout.rollout_id, rollout.attempt.attempt_id):
            with tracer.start_as_current_span("mine"):
                emit_reward(0.5)
        print([span.name for span in await store.query_spans(rollout.rollout_id)])
    await store.close()

logging.basicConfig(stream=sys.stdout, format="%(message)s")
asyncio.run(main())
{check}
"""


def run_program(setup: str, check: str = "") -> list[str]:
    program = PROGRAM.format(setup=textwrap.dedent(setup), check=textwrap.dedent(check))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_provider_ours_is_installed() -> None:
    lines = run_program('tracer = trace.get_tracer("early")')
    assert lines == ["['agentlightning.annotation', 'mine']"] * 2


def test_a_provider_of_the_program_is_listened_to_and_keeps_its_own_processors() -> None:
    lines = run_program(
        """
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        exporter = InMemorySpanExporter()
        trace.set_tracer_provider(TracerProvider())
        trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
        tracer = trace.get_tracer("mine")
        """,
        "print([span.name for span in exporter.get_finished_spans()])",
    )
    assert lines == ["['agentlightning.annotation', 'mine']"] * 2 + ["['mine', 'mine']"]


def test_a_reward_is_recorded_even_where_the_program_samples_nothing() -> None:
    lines = run_program(
        """
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
        trace.set_tracer_provider(TracerProvider(sampler=ALWAYS_OFF))
        tracer = trace.get_tracer("mine")
        """
    )
    assert lines == ["['agentlightning.annotation']"] * 2


def test_a_provider_that_cannot_be_listened_to_is_told_of_once() -> None:
    lines = run_program(
        """
        trace.set_tracer_provider(trace.NoOpTracerProvider())
        tracer = trace.get_tracer("mine")
        """
    )
    assert "NoOpTracerProvider, which takes no span processors" in lines[0]
    assert lines[1:] == ["['agentlightning.annotation']"] * 2
