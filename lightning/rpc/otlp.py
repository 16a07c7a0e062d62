"""OTLP: any OpenTelemetry SDK, in any language, sends spans to the store by its standard exporter.

The attributes of the resource say which attempt the spans belong to. Spans that cannot be stored are refused by the
protocol's partial success, with the reason; the others are stored. An exporter that lost the answer and repeats the
call stores nothing twice.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from lightning.codec.otlp import resource_from_otlp, scope_from_otlp, span_from_otlp
from lightning.store.contract import LightningStore, UnknownIdError
from lightning.types import OtelResource, Span

if TYPE_CHECKING:
    from lightning.rpc.handlers import UnaryHandler
    from lightning.rpc.service import StoreService

logger = logging.getLogger(__name__)

OTLP_SERVICE = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"]

ROLLOUT_ID = "agentlightning.rollout_id"
ATTEMPT_ID = "agentlightning.attempt_id"
SEQUENCE_ID = "agentlightning.span_sequence_id"
"""Attributes of the resource. The last one may be missing: the store numbers the spans as they arrive."""

_TOLD_REASONS = 8
_TOLD_CHARACTERS = 300


async def export(
    service: StoreService, request: trace_service_pb2.ExportTraceServiceRequest
) -> trace_service_pb2.ExportTraceServiceResponse:
    """Store what can be stored, and say what could not."""
    refused = _Refused()
    for spans in _by_attempt(request, refused).values():
        await _store(service.store, spans, refused)
    response = trace_service_pb2.ExportTraceServiceResponse()
    if refused.count:
        response.partial_success.rejected_spans = refused.count
        response.partial_success.error_message = refused.message()
        logger.info("OTLP: %s", response.partial_success.error_message)
    return response


OTLP_HANDLERS: dict[str, UnaryHandler] = {"Export": export}


@dataclass
class _Refused:
    """The spans that are not stored, and why."""

    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.reasons.total()

    def add(self, error: Exception, spans: int) -> None:
        self.reasons[str(error)[:_TOLD_CHARACTERS]] += spans

    def message(self) -> str:
        told = [f"{reason} ({count})" for reason, count in self.reasons.most_common(_TOLD_REASONS)]
        more = len(self.reasons) - len(told)
        return f"refused {self.count} spans: {'; '.join(told)}" + (
            f"; and {more} more reasons" if more else ""
        )


@dataclass(frozen=True)
class _Place:
    """Where the spans of a resource belong."""

    rollout_id: str
    attempt_id: str
    sequence_id: int

    @classmethod
    def of(cls, resource: OtelResource) -> _Place:
        """Raises `ValueError` if the resource does not say."""
        return cls(
            _id(resource, ROLLOUT_ID),
            _id(resource, ATTEMPT_ID),
            _number(resource.attributes.get(SEQUENCE_ID, 0)),
        )


def _id(resource: OtelResource, name: str) -> str:
    if name not in resource.attributes:
        raise ValueError(f"the resource has no attribute {name}")
    value = resource.attributes[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"the resource's attribute {name} must be an id, not {value!r}")
    return value


def _number(value: object) -> int:
    """Resource attributes that come from the environment are always text."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < _TOLD_CHARACTERS:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"the resource's attribute {SEQUENCE_ID} must be a whole number from 0 on, not {value!r}"
        )
    return value


def _by_attempt(
    request: trace_service_pb2.ExportTraceServiceRequest, refused: _Refused
) -> dict[tuple[str, str], list[Span]]:
    """The spans that are well-formed, by where they belong, in order."""
    groups: dict[tuple[str, str], list[Span]] = {}
    for source in request.resource_spans:
        resource = resource_from_otlp(source)
        try:
            place = _Place.of(resource)
        except ValueError as error:
            refused.add(error, sum(len(scope.spans) for scope in source.scope_spans))
            continue
        group = groups.setdefault((place.rollout_id, place.attempt_id), [])
        for scope in source.scope_spans:
            group.extend(_decode(scope, place, resource, refused))
    return groups


def _decode(
    source: trace_pb2.ScopeSpans, place: _Place, resource: OtelResource, refused: _Refused
) -> Iterator[Span]:
    try:
        scope = scope_from_otlp(source)
    except (TypeError, ValueError) as error:
        refused.add(error, len(source.spans))
        return
    for span in source.spans:
        try:
            yield span_from_otlp(
                span,
                rollout_id=place.rollout_id,
                attempt_id=place.attempt_id,
                sequence_id=place.sequence_id,
                resource=resource,
                scope=scope,
            )
        except ValueError as error:
            refused.add(error, 1)


async def _store(store: LightningStore, spans: Sequence[Span], refused: _Refused) -> None:
    """Store the spans of one attempt. If the store refuses some, which are found by halves, the others are stored."""
    if not spans:
        return
    try:
        await store.add_many_spans(spans)
    except (TypeError, ValueError) as error:
        if len(spans) == 1 or isinstance(error, UnknownIdError):
            refused.add(error, len(spans))
            return
        middle = len(spans) // 2
        await _store(store, spans[:middle], refused)
        await _store(store, spans[middle:], refused)
