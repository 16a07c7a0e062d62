"""Spans: what an agent did, in OpenTelemetry's shape, ordered within an attempt by `sequence_id`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from lightning.types.record import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
"""A value as OpenTelemetry defines it. Floats may be NaN or infinite; integers have 64 bits."""
Attributes = dict[str, Any]
"""`AttributeValue` by name. Typed loosely so that reading one needs no cast; checked when a span is stored."""
TraceState = dict[str, str]
StatusCode = Literal["UNSET", "OK", "ERROR"]


class SpanContext(Record):
    """Identity of a span across systems."""

    trace_id: str
    """32 lower-case hex digits."""
    span_id: str
    """16 lower-case hex digits."""
    is_remote: bool = False
    trace_state: TraceState = Field(default_factory=dict)
    """W3C trace state; its order means something and is kept."""


class TraceStatus(Record):
    """Outcome of the operation that a span describes."""

    status_code: StatusCode = "UNSET"
    description: str | None = None


class Event(Record):
    """Something that happened at one moment within a span."""

    name: str
    attributes: Attributes = Field(default_factory=dict)
    timestamp: float | None = None
    """Seconds since the epoch."""


class Link(Record):
    """A reference to a span that is related but not the parent."""

    context: SpanContext
    attributes: Attributes | None = None


class OtelResource(Record):
    """The entity that produced a span (not a `Resource` of the store)."""

    attributes: Attributes = Field(default_factory=dict)
    schema_url: str = ""


class Span(Record):
    """One traced operation of an attempt. Fields beyond these are kept as they are, if JSON can hold them."""

    model_config = ConfigDict(extra="allow")

    rollout_id: str
    attempt_id: str
    sequence_id: int = Field(ge=0)
    """Order within the attempt. 0 asks the store to number the span as it arrives."""
    trace_id: str
    """32 lower-case hex digits."""
    span_id: str
    """16 lower-case hex digits; identifies the span within its attempt."""
    parent_id: str | None = None
    name: str
    status: TraceStatus = Field(default_factory=TraceStatus)
    attributes: Attributes = Field(default_factory=dict)
    events: list[Event] = Field(default_factory=list)
    links: list[Link] = Field(default_factory=list)
    start_time: float | None = None
    """Seconds since the epoch."""
    end_time: float | None = None
    """Seconds since the epoch."""
    context: SpanContext | None = None
    parent: SpanContext | None = None
    resource: OtelResource = Field(default_factory=OtelResource)

    @classmethod
    def from_opentelemetry(
        cls, source: ReadableSpan, rollout_id: str, attempt_id: str, sequence_id: int
    ) -> Span:
        """Convert a span of the OpenTelemetry SDK; nanoseconds become seconds, ids become hex digits.

        Raises:
            ValueError: The span has no context, hence no ids.
        """
        from lightning.tracing.conversion import (
            span_from_opentelemetry,
        )  # the SDK is imported only where it is used

        return span_from_opentelemetry(source, rollout_id, attempt_id, sequence_id)

    def to_opentelemetry(self) -> ReadableSpan:
        """Convert back into a span of the OpenTelemetry SDK, for exporters and processors made for it."""
        from lightning.tracing.conversion import span_to_opentelemetry

        return span_to_opentelemetry(self)
