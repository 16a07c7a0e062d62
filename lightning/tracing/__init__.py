"""Recording what agents do: their OpenTelemetry spans on the way to the store."""

from __future__ import annotations

from lightning.tracing.conversion import span_from_opentelemetry, span_to_opentelemetry
from lightning.tracing.emit import emit_reward, find_final_reward, find_rewards
from lightning.tracing.sink import AttemptTrace
from lightning.tracing.tracer import OtelTracer

__all__ = [
    "AttemptTrace",
    "OtelTracer",
    "emit_reward",
    "find_final_reward",
    "find_rewards",
    "span_from_opentelemetry",
    "span_to_opentelemetry",
]
