"""Records for tests, with every field that does not matter filled in."""

from __future__ import annotations

import uuid
from typing import Any

from lightning.types import Attempt, AttemptedRollout, Span


def make_span(attempt: Attempt | AttemptedRollout, **fields: Any) -> Span:
    """A span of `attempt` (or of the latest attempt of a rollout) with ids of its own.

    Args:
        attempt: Whose span it is.
        fields: Replace what would be filled in: any fields of `Span`, or further ones.
    """
    latest = attempt.attempt if isinstance(attempt, AttemptedRollout) else attempt
    defaults: dict[str, Any] = {
        "rollout_id": latest.rollout_id,
        "attempt_id": latest.attempt_id,
        "sequence_id": 0,
        "trace_id": uuid.uuid4().hex,
        "span_id": uuid.uuid4().hex[:16],
        "name": "step",
        "start_time": 1.5,
        "end_time": 2.25,
    }
    return Span(**{**defaults, **fields})
