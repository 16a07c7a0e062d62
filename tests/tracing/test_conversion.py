"""Spans of OpenTelemetry to the store's and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from lightning.codec import decode_span, encode_span
from lightning.store.backends import InMemoryLightningStore
from lightning.types import Span

NOW_NS = 1_795_225_234_683_197_811


def record(**limits: int) -> tuple[trace.Tracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(
        resource=Resource({"service.name": "agent", "pids": [1, 2]}, "https://schema/res"),
        span_limits=SpanLimits(**limits),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("my.library", "1.2", "https://schema/lib", {"flavour": "salt"}), exporter


def remote_parent(flags: int = 1) -> SpanContext:
    state = TraceState([("zeta", "1"), ("alpha", "2"), ("mid", "3")])
    return SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(flags), trace_state=state)


def make_full_span() -> ReadableSpan:
    tracer, exporter = record()
    linked = SpanContext(0x123, 0x456, is_remote=False, trace_flags=TraceFlags(0))
    span = tracer.start_span(
        "chat",
        context=trace.set_span_in_context(trace.NonRecordingSpan(remote_parent())),
        kind=SpanKind.CLIENT,
        attributes={
            "text": "ä\0",
            "yes": True,
            "n": 2**63 - 1,
            "x": math.inf,
            "list": ["a", "b"],
            "empty": [],
        },
        links=[Link(linked, {"why": "because", "which": [1, 2]}), Link(remote_parent())],
        start_time=NOW_NS,
    )
    span.add_event("token", {"ids": [1, 2, 3]}, timestamp=NOW_NS + 1)
    span.add_event("token", timestamp=NOW_NS + 3)
    span.set_status(Status(StatusCode.ERROR, "went wrong"))
    span.end(NOW_NS + 7)
    (finished,) = exporter.get_finished_spans()
    return finished


def same(one: ReadableSpan, other: ReadableSpan) -> bool:
    return all_of(one) == all_of(other)


def all_of(span: ReadableSpan) -> dict[str, Any]:
    return {
        "text": span.to_json(),
        "context": span.context,
        "flags": span.context and span.context.trace_flags,
        "remote": span.context and span.context.is_remote,
        "parent": (span.parent, span.parent and (span.parent.trace_flags, span.parent.is_remote)),
        "states": [list((c.trace_state or {}).items()) for c in (span.context, span.parent) if c is not None],
        "times": (span.start_time, span.end_time),
        "attributes": dict(span.attributes or {}),
        "events": [
            (e.name, dict(e.attributes or {}), e.timestamp, e.dropped_attributes) for e in span.events
        ],
        "links": [
            (k.context, k.context.trace_flags, k.attributes and dict(k.attributes), k.dropped_attributes)
            for k in span.links
        ],
        "kind": span.kind,
        "status": (span.status.status_code, span.status.description),
        "resource": span.resource,
        "scope": span.instrumentation_scope,
        "dropped": (span.dropped_attributes, span.dropped_events, span.dropped_links),
    }


def test_every_part_becomes_the_field_it_belongs_to() -> None:
    span = Span.from_opentelemetry(make_full_span(), "ro-1", "at-1", 7)
    assert (span.rollout_id, span.attempt_id, span.sequence_id) == ("ro-1", "at-1", 7)
    assert span.trace_id == "00000000000000000000000000000abc"
    assert span.parent_id == "0000000000000def"
    assert len(span.span_id) == 16
    assert span.name == "chat"
    assert (span.status.status_code, span.status.description) == ("ERROR", "went wrong")
    assert span.attributes["list"] == ["a", "b"]
    assert span.attributes["n"] == 2**63 - 1
    assert span.attributes["x"] == math.inf
    assert span.start_time == pytest.approx(NOW_NS / 1e9)
    assert [event.name for event in span.events] == ["token", "token"]
    assert span.events[0].attributes == {"ids": [1, 2, 3]}
    assert [link.context.span_id for link in span.links] == ["0000000000000456", "0000000000000def"]
    assert span.context is not None
    assert span.context.span_id == span.span_id
    assert span.parent is not None
    assert span.parent.is_remote
    assert list(span.parent.trace_state.items()) == [("zeta", "1"), ("alpha", "2"), ("mid", "3")]
    assert span.resource.attributes["pids"] == [1, 2]
    assert span.resource.schema_url == "https://schema/res"
    extra = span.model_extra
    assert extra is not None
    assert extra["kind"] == "CLIENT"
    assert extra["instrumentation_scope"] == {
        "name": "my.library",
        "version": "1.2",
        "schema_url": "https://schema/lib",
        "attributes": {"flavour": "salt"},
    }


def test_there_and_back_is_the_same_span() -> None:
    original = make_full_span()
    assert same(Span.from_opentelemetry(original, "ro", "at", 1).to_opentelemetry(), original)


def test_there_and_back_through_the_encoding_is_the_same_span() -> None:
    original = make_full_span()
    kept = decode_span(encode_span(Span.from_opentelemetry(original, "ro", "at", 1)), 1)
    assert same(kept.to_opentelemetry(), original)


def test_what_the_sdk_dropped_is_counted_there_and_back() -> None:
    tracer, exporter = record(
        max_span_attributes=1, max_events=1, max_links=1, max_event_attributes=1, max_link_attributes=1
    )
    links = [Link(remote_parent(), {"a": 1, "b": 2})] * 3
    span = tracer.start_span("s", attributes={"a": 1, "b": 2}, links=links)
    span.add_event("e", {"a": 1})
    span.add_event("e", {"a": 1, "b": 2, "c": 3})
    span.end()
    (original,) = exporter.get_finished_spans()
    converted = Span.from_opentelemetry(original, "ro", "at", 1)
    assert converted.model_extra is not None
    assert converted.model_extra["dropped_attributes"] == 1
    assert converted.model_extra["dropped_events"] == 1
    assert converted.model_extra["dropped_links"] == 2
    assert same(converted.to_opentelemetry(), original)


def test_a_span_that_nobody_annotated_stays_bare() -> None:
    original = ReadableSpan("bare", SpanContext(1, 2, False, TraceFlags(1)), attributes={})
    span = Span.from_opentelemetry(original, "ro", "at", 1)
    assert (span.start_time, span.end_time, span.parent, span.parent_id) == (None, None, None, None)
    assert span.model_extra == {"kind": "INTERNAL"}
    assert same(span.to_opentelemetry(), original)


def test_public_fields_of_a_subclass_are_kept_if_json_can_hold_them() -> None:
    class Richer(ReadableSpan):
        def __init__(self) -> None:
            super().__init__("rich", SpanContext(1, 2, is_remote=False))
            self.token_counts = {"prompt": 3, "parts": (1, 2)}
            self.socket = object()
            self._private = 1

    span = Span.from_opentelemetry(Richer(), "ro", "at", 1)
    assert span.model_extra is not None
    assert span.model_extra["token_counts"] == {"prompt": 3, "parts": [1, 2]}
    assert "socket" not in span.model_extra
    assert "_private" not in span.model_extra
    assert span.to_opentelemetry().token_counts == {"prompt": 3, "parts": [1, 2]}  # type: ignore[attr-defined]


def test_a_span_without_a_context_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nameless one"):
        Span.from_opentelemetry(ReadableSpan("nameless one"), "ro", "at", 1)


def test_a_changed_time_counts_more_than_the_nanoseconds_kept_of_the_old_one() -> None:
    span = Span.from_opentelemetry(make_full_span(), "ro", "at", 1).model_copy(update={"end_time": 2.5})
    assert span.to_opentelemetry().end_time == 2_500_000_000


def test_a_span_made_by_hand_can_be_converted() -> None:
    span = Span(
        rollout_id="ro",
        attempt_id="at",
        sequence_id=1,
        trace_id="0" * 31 + "1",
        span_id="0" * 15 + "2",
        parent_id="0" * 15 + "3",
        name="by hand",
        attributes={"nested": [["a"], ["b"]]},
        start_time=1.5,
        kind="not a kind",
    )
    converted = span.to_opentelemetry()
    assert converted.kind is SpanKind.INTERNAL
    assert converted.start_time == 1_500_000_000
    assert converted.parent is not None
    assert converted.parent.span_id == 3
    assert (converted.attributes or {})["nested"] == (("a",), ("b",))


times = st.none() | st.integers(0, 2**63 - 1)
scalars = st.text(max_size=5) | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
values = scalars | st.lists(st.text(max_size=5), max_size=3).map(tuple)
attribute_maps = st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=4)


@settings(deadline=None)  # a loaded machine proves nothing
@given(
    attributes=attribute_maps,
    start=times,
    end=times,
    kind=st.sampled_from(SpanKind),
    flags=st.integers(0, 255),
)
def test_no_span_is_changed_by_going_there_and_back(
    attributes: dict[str, Any], start: int | None, end: int | None, kind: SpanKind, flags: int
) -> None:
    original = ReadableSpan(
        "any",
        SpanContext(2**128 - 1, 2**64 - 1, is_remote=False, trace_flags=TraceFlags(flags)),
        parent=remote_parent(flags),
        attributes=attributes,
        kind=kind,
        start_time=start,
        end_time=end,
    )
    kept = decode_span(encode_span(Span.from_opentelemetry(original, "ro", "at", 0)), 3)
    assert kept.sequence_id == 3
    back = kept.to_opentelemetry()
    assert dict(back.attributes or {}) == attributes
    assert [type(value) for value in (back.attributes or {}).values()] == [*map(type, attributes.values())]
    assert (back.start_time, back.end_time, back.kind) == (start, end, kind)
    assert back.context is not None
    assert back.context.trace_flags == flags
    assert back.parent is not None
    assert back.parent.trace_flags == flags


@pytest.mark.anyio
async def test_the_store_takes_a_span_of_the_sdk_and_gives_it_back() -> None:
    store = InMemoryLightningStore()
    rollout = await store.start_rollout("task")
    original = make_full_span()
    await store.add_otel_span(rollout.rollout_id, rollout.attempt.attempt_id, original)
    (stored,) = await store.query_spans(rollout.rollout_id)
    assert stored.sequence_id == 1
    assert same(stored.to_opentelemetry(), original)
    await store.close()
