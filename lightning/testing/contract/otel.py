"""Spans of the OpenTelemetry SDK, stored and handed back."""

from __future__ import annotations

import math

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from lightning.store.contract import LightningStore
from lightning.testing.contract.base import (
    UNKNOWN_ATTEMPT,
    UNKNOWN_ROLLOUT,
    StoreTheme,
    everything,
    refused,
    same,
    statuses,
)

TRACE_ID = 0x0123456789ABCDEF
SPAN_ID = 0xFEDC
START_NANOSECONDS = 1_700_000_000_123_456_789


def sdk_span(span_id: int = SPAN_ID) -> ReadableSpan:
    """A span of the SDK with something in every field."""
    sampled = TraceFlags(TraceFlags.SAMPLED)
    state = TraceState([("vendor", "first"), ("another", "second")])
    return ReadableSpan(
        name="chat völlig",
        context=SpanContext(TRACE_ID, span_id, is_remote=False, trace_flags=sampled, trace_state=state),
        parent=SpanContext(TRACE_ID, 0xA, is_remote=True, trace_flags=TraceFlags(0)),
        resource=Resource({"service.name": "agent", "numbers": (1, 2)}, "https://schema"),
        attributes={
            "text": "a",
            "truth": True,
            "integer": 2**53 + 1,
            "real": 1.0,
            "nan": math.nan,
            "texts": ("a", "b"),
            "reals": (0.5, math.inf),
        },
        events=[
            Event("token", {"index": 1}, START_NANOSECONDS + 1),
            Event("plain", {}, START_NANOSECONDS + 2),
        ],
        links=[Link(SpanContext(2**127, 2**63, is_remote=True, trace_flags=sampled), {"why": "retry"})],
        kind=SpanKind.CLIENT,
        status=Status(StatusCode.ERROR, "no luck"),
        start_time=START_NANOSECONDS,
        end_time=START_NANOSECONDS + 1_500_000_001,
        instrumentation_scope=InstrumentationScope("library", "1.2"),
    )


class OpenTelemetryContract(StoreTheme):
    """`add_otel_span`."""

    async def test_a_span_of_the_sdk_is_stored(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        stored = await store.add_otel_span(started.rollout_id, started.attempt.attempt_id, sdk_span())
        assert stored is not None
        (span,) = await store.query_spans(started.rollout_id)
        assert same(span.model_dump(), stored.model_dump())
        assert (span.rollout_id, span.attempt_id) == (started.rollout_id, started.attempt.attempt_id)
        assert (span.trace_id, span.span_id) == ("00000000000000000123456789abcdef", "000000000000fedc")
        assert (span.parent_id, span.name, span.sequence_id) == ("000000000000000a", "chat völlig", 1)
        assert (span.start_time, span.end_time) == (1_700_000_000.1234568, 1_700_000_001.6234567)
        assert (span.status.status_code, span.status.description) == ("ERROR", "no luck")
        assert await statuses(store, started.rollout_id) == ("running", "running")

    async def test_its_parts_are_stored(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        span = await store.add_otel_span(started.rollout_id, started.attempt.attempt_id, sdk_span())
        assert span is not None
        assert same(
            span.attributes,
            {
                "text": "a",
                "truth": True,
                "integer": 2**53 + 1,
                "real": 1.0,
                "nan": math.nan,
                "texts": ["a", "b"],
                "reals": [0.5, math.inf],
            },
        )
        assert [(event.name, event.attributes) for event in span.events] == [
            ("token", {"index": 1}),
            ("plain", {}),
        ]
        assert span.events[0].timestamp == (START_NANOSECONDS + 1) / 1e9
        (link,) = span.links
        assert (link.context.trace_id, link.context.span_id) == ("8" + "0" * 31, "8" + "0" * 15)
        assert (link.context.is_remote, link.attributes) == (True, {"why": "retry"})
        assert span.context is not None
        assert (span.context.trace_id, span.context.span_id) == (span.trace_id, span.span_id)
        assert list(span.context.trace_state.items()) == [("vendor", "first"), ("another", "second")]
        assert span.parent is not None
        assert (span.parent.span_id, span.parent.is_remote) == (span.parent_id, True)
        assert span.resource.attributes == {"service.name": "agent", "numbers": [1, 2]}
        assert span.resource.schema_url == "https://schema"

    async def test_it_comes_back_without_loss(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        original = sdk_span()
        await store.add_otel_span(started.rollout_id, started.attempt.attempt_id, original)
        (span,) = await store.query_spans(started.rollout_id)
        back = span.to_opentelemetry()
        assert back.to_json() == original.to_json()
        assert (back.start_time, back.end_time) == (original.start_time, original.end_time)
        assert (back.context, back.parent) == (original.context, original.parent)
        assert back.instrumentation_scope == original.instrumentation_scope
        assert [event.timestamp for event in back.events] == [event.timestamp for event in original.events]

    async def test_further_fields_are_kept(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        original = sdk_span()
        vars(original)["cost"] = {"tokens": [1, 2.5]}
        await store.add_otel_span(started.rollout_id, started.attempt.attempt_id, original)
        (span,) = await store.query_spans(started.rollout_id)
        assert span.model_extra is not None
        assert same(span.model_extra["cost"], {"tokens": [1, 2.5]})

    async def test_it_can_be_given_a_number(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)
        numbers = []
        for span_id, sequence_id in ((1, None), (2, 7), (3, None)):
            span = await store.add_otel_span(*ids, sdk_span(span_id), sequence_id=sequence_id)
            numbers.append(span and span.sequence_id)
        assert numbers == [1, 7, 8]

    async def test_a_duplicate_of_the_sdk_is_skipped(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        ids = (started.rollout_id, started.attempt.attempt_id)
        assert await store.add_otel_span(*ids, sdk_span()) is not None
        assert await store.add_otel_span(*ids, sdk_span(), sequence_id=9) is None
        assert await store.get_next_span_sequence_id(*ids) == 2

    async def test_a_span_of_the_sdk_for_nobody_is_refused(self, store: LightningStore) -> None:
        started = await store.start_rollout("task")
        before = await everything(store)
        with refused(ValueError, UNKNOWN_ROLLOUT):
            await store.add_otel_span(UNKNOWN_ROLLOUT, started.attempt.attempt_id, sdk_span())
        with refused(ValueError, UNKNOWN_ATTEMPT):
            await store.add_otel_span(started.rollout_id, UNKNOWN_ATTEMPT, sdk_span())
        assert await everything(store) == before
