"""What OpenTelemetry says of a span that the store's span has no field for, kept among its further fields.

Spans arrive from the SDK and over OTLP; whichever way one came, the same is kept of it under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.types import Attributes, to_json_value

SAMPLED = 1
"""The trace flags of a span that nothing special is to be said of."""

_NANOSECONDS_PER_SECOND = 1_000_000_000


def to_seconds(nanoseconds: int | None) -> float | None:
    """A time as the store's spans hold it; as a float it is exact to about 240 nanoseconds only."""
    return None if nanoseconds is None else nanoseconds / _NANOSECONDS_PER_SECOND


def to_nanoseconds(seconds: float) -> int:
    """The time that `seconds` says."""
    return round(seconds * _NANOSECONDS_PER_SECOND)


def scope_fields(
    name: str, version: str | None, schema_url: str | None, attributes: Attributes
) -> dict[str, Any]:
    """The further field `instrumentation_scope`.

    Raises:
        TypeError: An attribute that JSON does not have.
        ValueError: As `to_json_value`.
    """
    fields: dict[str, Any] = {"name": name}
    if version != "":  # what a tracer has that was given none
        fields["version"] = version
    if schema_url:
        fields["schema_url"] = schema_url
    if attributes:
        fields["attributes"] = to_json_value(attributes, "instrumentation_scope.attributes")
    return fields


def exact_fields(
    *,
    times_ns: tuple[int | None, int | None],
    event_times_ns: Sequence[int],
    dropped: Mapping[str, int],
    event_dropped_attributes: Sequence[int],
    link_dropped_attributes: Sequence[int],
    trace_flags: int,
    parent_trace_flags: int,
    link_trace_flags: Sequence[int],
) -> dict[str, Any]:
    """What the span's own fields would lose; what would say nothing is left out.

    Args:
        times_ns: Start and end, in nanoseconds since the epoch.
        event_times_ns: The same for each event.
        dropped: How many `attributes`, `events`, `links` the tracer dropped.
        event_dropped_attributes: For each event, how many attributes.
        link_dropped_attributes: For each link.
        trace_flags: The span's own.
        parent_trace_flags: Its parent's; `SAMPLED` if it has none or they are not known.
        link_trace_flags: Those of each link.
    """
    start, end = times_ns
    fields: dict[str, Any] = {
        "start_time_ns": start,
        "end_time_ns": end,
        "event_times_ns": list(event_times_ns),
    }
    fields.update((f"dropped_{what}", count) for what, count in dropped.items())
    fields["event_dropped_attributes"] = _unless_all(event_dropped_attributes, 0)
    fields["link_dropped_attributes"] = _unless_all(link_dropped_attributes, 0)
    said = {name: value for name, value in fields.items() if value}
    if trace_flags != SAMPLED:
        said["trace_flags"] = trace_flags
    if parent_trace_flags != SAMPLED:
        said["parent_trace_flags"] = parent_trace_flags
    if flags := _unless_all(link_trace_flags, SAMPLED):
        said["link_trace_flags"] = flags
    return said


def _unless_all(numbers: Sequence[int], usual: int) -> list[int]:
    return list(numbers) if any(number != usual for number in numbers) else []
