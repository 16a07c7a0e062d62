"""Spans over OTLP: from exporters as they are, and from requests that no exporter makes."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, TraceFlags
from opentelemetry.trace import StatusCode as SpanStatusCode
from opentelemetry.trace.span import TraceState

from lightning import codec
from lightning.rpc import LightningStoreServer
from lightning.rpc.otlp import OTLP_SERVICE
from lightning.rpc.tokens import add_token
from lightning.store import InMemoryLightningStore, LightningStoreThreaded
from lightning.testing.unreliable import UnreliableStore
from lightning.types import AttemptedRollout, Span

pytestmark = pytest.mark.anyio

DEADLINE_SECONDS = 30.0


@pytest.fixture
async def stub(server: LightningStoreServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        yield TraceServiceStub(channel)


def place(rollout: AttemptedRollout, **more: Any) -> dict[str, Any]:
    return {
        "agentlightning.rollout_id": rollout.rollout_id,
        "agentlightning.attempt_id": rollout.attempt.attempt_id,
        **more,
    }


def full_spans(attributes: dict[str, Any]) -> list[ReadableSpan]:
    """Spans with everything that the SDK can say."""
    finished = InMemorySpanExporter()
    provider = TracerProvider(
        resource=Resource({"service.name": "agent", "pids": [1, 2], **attributes}, "https://schema/res"),
        span_limits=SpanLimits(
            max_span_attributes=8, max_events=2, max_event_attributes=1, max_link_attributes=1
        ),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(SimpleSpanProcessor(finished))
    tracer = provider.get_tracer("my.library", "1.2", "https://schema/lib", {"flavour": "salt"})
    state = TraceState([("zeta", "1"), ("alpha", "2")])
    caller = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(1), trace_state=state)
    linked = SpanContext(0x123, 0x456, is_remote=False, trace_flags=TraceFlags(1))
    values = {
        "dropped": 0,
        "text": "ä\0",
        "yes": True,
        "small": -(2**63),
        "big": 2**63 - 1,
        "one": 1.0,
        "x": math.inf,
        "list": ["a", "b"],
        "empty": [],
    }
    with tracer.start_as_current_span(
        "chat",
        context=trace.set_span_in_context(trace.NonRecordingSpan(caller)),
        kind=SpanKind.CLIENT,
        attributes=values,
        links=[Link(linked, {"why": "because", "which": [1, 2]}), Link(caller)],
        start_time=1_795_225_234_683_197_811,
    ) as span:
        for number in range(3):
            span.add_event("token", {"ids": [1, 2, 3], "number": number}, timestamp=1_795_225_234_683_197_812)
        tracer.start_span("inner").end()
        span.set_status(Status(SpanStatusCode.ERROR, "went wrong"))
    tracer.start_span("root").end()
    return list(finished.get_finished_spans())


async def export(server: LightningStoreServer, spans: list[ReadableSpan], **options: Any) -> SpanExportResult:
    exporter = OTLPSpanExporter(f"http://{server.endpoint}", insecure=True, **options)
    try:
        return await asyncio.to_thread(exporter.export, spans)
    finally:
        exporter.shutdown()


def as_exported(original: ReadableSpan, rollout: AttemptedRollout, number: int) -> Span:
    """What the exporter of the SDK for Python sends of a span: neither trace flags, nor trace states but its own."""
    span = Span.from_opentelemetry(original, rollout.rollout_id, rollout.attempt.attempt_id, number)
    for other in (span.parent, *(link.context for link in span.links)):
        if other is not None:
            other.trace_state = {}
    for name in ("trace_flags", "parent_trace_flags", "link_trace_flags"):
        (span.model_extra or {}).pop(name, None)
    return span


@pytest.mark.parametrize("compression", grpc.Compression)
@pytest.mark.parametrize("wrap", [lambda store: store, LightningStoreThreaded], ids=["memory", "threaded"])
async def test_nothing_of_a_span_is_lost_and_nothing_stored_twice(
    wrap: Any, compression: grpc.Compression, serve: Any
) -> None:
    server = await serve(wrap(InMemoryLightningStore()))
    rollout = await server.start_rollout("task")
    originals = full_spans(place(rollout))
    for _ in range(2):
        result = await export(server, originals, compression=compression)
        assert result is SpanExportResult.SUCCESS
    found = await server.query_spans(rollout.rollout_id, sort_by="sequence_id")
    expected = [as_exported(original, rollout, number) for number, original in enumerate(originals, start=1)]
    assert list(found) == expected
    assert [span.model_extra for span in found] == [span.model_extra for span in expected]
    outer = next(span for span in found if span.name == "chat")
    assert [type(value) for value in outer.attributes.values()] == [
        str,
        bool,
        int,
        int,
        float,
        float,
        list,
        list,
    ]
    current = await server.get_rollout_by_id(rollout.rollout_id)
    assert current is not None
    assert current.status == "running"


async def test_values_that_only_the_protocol_has_are_kept(server: LightningStoreServer, stub: Any) -> None:
    rollout = await server.start_rollout("task")
    request = encode_spans(full_spans(place(rollout))[-1:])
    span = request.resource_spans[0].scope_spans[0].spans[0]
    del span.attributes[:]
    span.attributes.add(key="bytes").value.bytes_value = b"\0\xff"
    span.attributes.add(key="nothing")
    span.attributes.add(key="nan").value.double_value = math.nan
    nested = span.attributes.add(key="nested").value.kvlist_value.values.add(key="in").value.array_value
    nested.values.add().int_value = 1
    nested.values.add().string_value = "1"
    span.status.code, span.status.message = trace_pb2.Status.STATUS_CODE_OK, "fine"
    span.start_time_unix_nano = 0
    span.parent_span_id, span.flags = b"12345678", 0x103
    span.trace_state = "zeta=1, alpha=2=3,"
    span.links.add(trace_id=span.trace_id, span_id=span.span_id, flags=0x302, trace_state="a=b")
    response = await stub.Export(request, timeout=DEADLINE_SECONDS)
    assert not response.HasField("partial_success")
    (found,) = await server.query_spans(rollout.rollout_id)
    assert math.isnan(found.attributes.pop("nan"))
    assert found.attributes == {"bytes": b"\0\xff", "nothing": None, "nested": {"in": [1, "1"]}}
    assert (found.status.status_code, found.status.description) == ("OK", "fine")
    assert found.start_time is None
    assert found.context is not None
    assert found.context.trace_state == {"zeta": "1", "alpha": "2=3"}
    assert found.parent is not None
    assert (found.parent.span_id, found.parent.is_remote) == (b"12345678".hex(), False)
    (link,) = found.links
    assert (link.context.is_remote, link.context.trace_state) == (True, {"a": "b"})
    assert found.model_extra is not None
    assert (found.model_extra["trace_flags"], found.model_extra["link_trace_flags"]) == (3, [2])


def spoil_attribute(span: trace_pb2.Span) -> None:
    value = span.attributes.add(key="deep").value
    for _ in range(codec.MAX_ATTRIBUTE_DEPTH + 1):
        value = value.array_value.values.add()


BAD_SPANS: dict[str, tuple[Any, str]] = {
    "no trace id": (lambda span: span.ClearField("trace_id"), "the trace_id has 0 bytes, not 16"),
    "a long span id": (lambda span: setattr(span, "span_id", b"123456789"), "the span_id has 9 bytes, not 8"),
    "a zero span id": (lambda span: setattr(span, "span_id", bytes(8)), "the span_id is all zeros"),
    "a short parent id": (lambda span: setattr(span, "parent_span_id", b"1"), "parent_span_id has 1 bytes"),
    "an unknown kind": (lambda span: setattr(span, "kind", 99), "the kind is 99"),
    "an unknown status": (lambda span: setattr(span.status, "code", -1), "the status code is -1"),
    "a trace state that is none": (lambda span: setattr(span, "trace_state", "a=1,b"), "trace state 'a=1,b'"),
    "a trace state with doubles": (lambda span: setattr(span, "trace_state", "a=1,a=2"), "different keys"),
    "a link to nowhere": (lambda span: span.links.add(), "trace_id of a link has 0 bytes"),
    "attributes too deep": (spoil_attribute, "nested deeper than"),
}


async def test_spans_that_cannot_be_stored_are_refused_one_by_one(
    server: LightningStoreServer, stub: Any
) -> None:
    rollout = await server.start_rollout("task")
    request = pb.ExportTraceServiceRequest()
    for spoil, _ in [*BAD_SPANS.values(), (lambda span: None, "")]:
        request.MergeFrom(encode_spans(full_spans(place(rollout))[-1:]))
        spoil(request.resource_spans[-1].scope_spans[0].spans[0])
    response = await stub.Export(request, timeout=DEADLINE_SECONDS)
    assert response.partial_success.rejected_spans == len(BAD_SPANS)
    (found,) = await server.query_spans(rollout.rollout_id)
    assert found.span_id == request.resource_spans[-1].scope_spans[0].spans[0].span_id.hex()


@pytest.mark.parametrize("kind", BAD_SPANS)
async def test_the_refusal_says_why(kind: str, server: LightningStoreServer, stub: Any) -> None:
    rollout = await server.start_rollout("task")
    spoil, reason = BAD_SPANS[kind]
    request = encode_spans(full_spans(place(rollout)))
    spoil(request.resource_spans[0].scope_spans[0].spans[1])
    response = await stub.Export(request, timeout=DEADLINE_SECONDS)
    assert response.partial_success.rejected_spans == 1
    assert reason in response.partial_success.error_message
    assert (await server.query_spans(rollout.rollout_id)).total == 2


async def test_spans_that_belong_nowhere_are_refused_and_the_others_stored(
    server: LightningStoreServer, stub: Any
) -> None:
    rollout, other = await server.start_rollout(1), await server.start_rollout(2)
    homeless: list[tuple[dict[str, Any], str]] = [
        ({}, "the resource has no attribute agentlightning.rollout_id (3)"),
        ({"agentlightning.rollout_id": rollout.rollout_id}, "no attribute agentlightning.attempt_id (3)"),
        (place(rollout, **{"agentlightning.rollout_id": 7}), "must be an id, not 7 (3)"),
        (place(rollout, **{"agentlightning.rollout_id": "ro-nobody"}), "ro-nobody"),
        (place(rollout, **{"agentlightning.attempt_id": other.attempt.attempt_id}), other.attempt.attempt_id),
        (place(rollout, **{"agentlightning.attempt_id": "latest"}), "latest"),
        (
            place(rollout, **{"agentlightning.span_sequence_id": -1}),
            "span_sequence_id must be a whole number",
        ),
        (place(rollout, **{"agentlightning.span_sequence_id": "1.5"}), "not '1.5' (3)"),
    ]
    request = pb.ExportTraceServiceRequest()
    for attributes, _ in homeless:
        request.MergeFrom(encode_spans(full_spans(attributes)))
    request.MergeFrom(encode_spans(full_spans(place(other))))
    response = await stub.Export(request, timeout=DEADLINE_SECONDS)
    assert response.partial_success.rejected_spans == 3 * len(homeless)
    for _, reason in homeless:
        assert reason in response.partial_success.error_message
    assert (await server.query_spans(rollout.rollout_id)).total == 0
    assert (await server.query_spans(other.rollout_id)).total == 3


@pytest.mark.parametrize("number", [7, "7"])
async def test_the_resource_may_number_its_spans(
    number: Any, server: LightningStoreServer, stub: Any
) -> None:
    rollout = await server.start_rollout("task")
    attributes = place(rollout, **{"agentlightning.span_sequence_id": number})
    await stub.Export(encode_spans(full_spans(attributes)[:1]), timeout=DEADLINE_SECONDS)
    (found,) = await server.query_spans(rollout.rollout_id)
    assert found.sequence_id == 7


async def test_a_number_beyond_64_bits_is_refused(server: LightningStoreServer, stub: Any) -> None:
    rollout = await server.start_rollout("task")
    attributes = place(rollout, **{"agentlightning.span_sequence_id": "9" * 30})
    response = await stub.Export(encode_spans(full_spans(attributes)), timeout=DEADLINE_SECONDS)
    assert response.partial_success.rejected_spans == 3
    assert "sequence_id is out of range" in response.partial_success.error_message


async def test_many_reasons_make_no_endless_message(server: LightningStoreServer, stub: Any) -> None:
    request = pb.ExportTraceServiceRequest()
    for number in range(100):
        attributes = {"agentlightning.rollout_id": f"ro-{number}" * 200, "agentlightning.attempt_id": "at"}
        request.MergeFrom(encode_spans(full_spans(attributes)))
    response = await stub.Export(request, timeout=DEADLINE_SECONDS)
    assert response.partial_success.rejected_spans == 300
    assert response.partial_success.error_message.endswith("and 92 more reasons")
    assert len(response.partial_success.error_message) < 3000


async def test_what_is_no_request_is_refused(server: LightningStoreServer) -> None:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        call = channel.unary_unary(f"/{OTLP_SERVICE.full_name}/Export")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff" * 20, timeout=DEADLINE_SECONDS)
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT
        assert "ExportTraceServiceRequest" in (caught.value.details() or "")
        assert await call(b"", timeout=DEADLINE_SECONDS) == b""


async def test_an_exporter_is_told_to_try_again_while_the_store_is_away(
    server: LightningStoreServer, store: UnreliableStore, stub: Any
) -> None:
    rollout = await server.start_rollout("task")
    request: Message = encode_spans(full_spans(place(rollout)))
    store.away = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Export(request, timeout=DEADLINE_SECONDS)
    assert caught.value.code() is StatusCode.UNAVAILABLE
    store.away = False
    assert not (await stub.Export(request, timeout=DEADLINE_SECONDS)).HasField("partial_success")
    assert (await server.query_spans(rollout.rollout_id)).total == 3


async def test_the_service_has_a_health_and_is_told_of(server: LightningStoreServer, client: Any) -> None:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        request = health_pb2.HealthCheckRequest(service=OTLP_SERVICE.full_name)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_SECONDS)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert server.capabilities["otlp_traces"]
    assert client.capabilities["otlp_traces"]


PROGRAM = """
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("some.agent")
with tracer.start_as_current_span("plan"):
    for number in range(1000):
        with tracer.start_as_current_span("step", attributes={"number": number}):
            pass
provider.shutdown()
"""


async def test_a_program_that_knows_only_opentelemetry_lands_in_its_attempt(
    serve: Any, tmp_path: Path
) -> None:
    token, _ = add_token(tmp_path / "tokens.json", "runner", "sdk", None)
    server = await serve(tokens=tmp_path / "tokens.json")
    rollouts = [await server.start_rollout(number) for number in range(2)]
    programs = []
    for rollout in rollouts:
        told = ",".join(f"{key}={value}" for key, value in place(rollout).items())
        settings = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{server.endpoint}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{token}",
            "OTEL_RESOURCE_ATTRIBUTES": told,
        }
        programs.append(
            await asyncio.create_subprocess_exec(
                sys.executable,
                *("-c", PROGRAM),
                env={**os.environ, **settings},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        )
    for program in programs:
        said, _ = await asyncio.wait_for(program.communicate(), DEADLINE_SECONDS)
        assert (program.returncode, said) == (0, b"")
    for rollout in rollouts:
        found = await server.query_spans(rollout.rollout_id, sort_by="sequence_id")
        assert [span.sequence_id for span in found] == [*range(1, 1002)]
        assert [span.attributes.get("number") for span in found] == [*range(1000), None]
        assert {span.attempt_id for span in found} == {rollout.attempt.attempt_id}
