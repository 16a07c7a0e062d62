"""A client without stubs: what is served, and how to call it, it learns from the server."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from lightning.rpc import LightningStoreServer

pytestmark = pytest.mark.anyio

STORE = "lightningpb.v1.LightningStoreService"
OTLP = "opentelemetry.proto.collector.trace.v1.TraceService"
HEALTH = "grpc.health.v1.Health"


class Stubless:
    """Calls methods by name, with dicts, as grpcurl does."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self._database)

    def services(self) -> set[str]:
        return set(self._database.get_services())

    def methods(self, service: str) -> set[str]:
        return set(self._pool.FindServiceByName(service).methods_by_name)

    def call(self, service: str, method: str, request: dict[str, Any]) -> dict[str, Any]:
        described = self._pool.FindServiceByName(service).methods_by_name[method]
        kind, answer = GetMessageClass(described.input_type), GetMessageClass(described.output_type)
        invoke = self._channel.unary_unary(f"/{service}/{method}", kind.SerializeToString, answer.FromString)
        return MessageToDict(invoke(ParseDict(request, kind()), timeout=30))


async def test_a_client_without_stubs_finds_and_calls_everything(server: LightningStoreServer) -> None:
    def explore() -> tuple[str, str]:
        with grpc.insecure_channel(server.endpoint) as channel:
            client = Stubless(channel)
            assert {STORE, OTLP, HEALTH} <= client.services()
            assert {"EnqueueRollouts", "WorkerSession", "StreamSpans"} <= client.methods(STORE)
            assert client.methods(OTLP) == {"Export"}
            for service in ("", STORE, OTLP):
                assert client.call(HEALTH, "Check", {"service": service}) == {"status": "SERVING"}
            spec = {"inputJson": "eyJuIjogMX0="}  # {"n": 1}, in base64 as JSON writes bytes
            (made,) = client.call(STORE, "EnqueueRollouts", {"requestId": "r", "specs": [spec]})["rollouts"]
            (claimed,) = client.call(STORE, "DequeueRollouts", {"requestId": "c", "limit": 1})["rollouts"]
            assert claimed["rolloutId"] == made["rolloutId"]
            attempt_id = claimed["latestAttempt"]["attemptId"]
            span = {"traceId": "AAAAAAAAAAAAAAAAAAAAAQ==", "spanId": "AAAAAAAAAAE=", "name": "by hand"}
            ids = {"agentlightning.rollout_id": made["rolloutId"], "agentlightning.attempt_id": attempt_id}
            attributes = [{"key": key, "value": {"stringValue": value}} for key, value in ids.items()]
            scoped = {"resource": {"attributes": attributes}, "scopeSpans": [{"spans": [span]}]}
            assert client.call(OTLP, "Export", {"resourceSpans": [scoped]}) == {}
            return made["rolloutId"], attempt_id

    rollout_id, attempt_id = await asyncio.to_thread(explore)
    rollout = await server.get_rollout_by_id(rollout_id)
    assert rollout is not None
    assert rollout.input == {"n": 1}
    (span,) = await server.query_spans(rollout_id, attempt_id)
    assert (span.name, span.trace_id, span.span_id) == ("by hand", f"{1:032x}", f"{1:016x}")
