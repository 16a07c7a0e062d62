"""The agent of the soak: makes spans as fast as it can."""

from __future__ import annotations

from typing import Any

from opentelemetry import trace

import lightning

SPANS = 4
_SPAN_BYTES = 1024


@lightning.rollout
async def agent(task: Any) -> float:
    """A few turns."""
    tracer = trace.get_tracer(__name__)
    for turn in range(SPANS):
        with tracer.start_as_current_span(f"turn-{turn}") as span:
            span.set_attribute("gen_ai.prompt", "x" * _SPAN_BYTES)
    return 1.0
