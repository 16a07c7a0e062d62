"""The records that users see, and the rules for what may stand in them."""

from __future__ import annotations

from lightning.types.payload import decode_payload, encode_payload, to_json_value, validate_encoded_payload
from lightning.types.resources import LLM, NamedResources, PromptTemplate, Resource, ResourcesUpdate
from lightning.types.results import LightningStoreCapabilities, LightningStoreStatistics, PaginatedResult
from lightning.types.rollouts import (
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
    RolloutEvent,
    RolloutMode,
    RolloutStatus,
)
from lightning.types.sentinel import UNSET, Unset
from lightning.types.spans import (
    Attributes,
    AttributeValue,
    Event,
    Link,
    OtelResource,
    Span,
    SpanContext,
    StatusCode,
    TraceState,
    TraceStatus,
)
from lightning.types.workers import (
    AttemptRef,
    CancelAttempt,
    Drain,
    HeartbeatReply,
    ResourcesChanged,
    Stop,
    Worker,
    WorkerCommand,
    WorkerHeartbeat,
    WorkerStatus,
)

__all__ = [
    "LLM",
    "UNSET",
    "Attempt",
    "AttemptRef",
    "AttemptStatus",
    "AttemptedRollout",
    "AttributeValue",
    "Attributes",
    "CancelAttempt",
    "Drain",
    "EnqueueRolloutRequest",
    "Event",
    "HeartbeatReply",
    "LightningStoreCapabilities",
    "LightningStoreStatistics",
    "Link",
    "NamedResources",
    "OtelResource",
    "PaginatedResult",
    "PromptTemplate",
    "Resource",
    "ResourcesChanged",
    "ResourcesUpdate",
    "Rollout",
    "RolloutConfig",
    "RolloutEvent",
    "RolloutMode",
    "RolloutStatus",
    "Span",
    "SpanContext",
    "StatusCode",
    "Stop",
    "TraceState",
    "TraceStatus",
    "Unset",
    "Worker",
    "WorkerCommand",
    "WorkerHeartbeat",
    "WorkerStatus",
    "decode_payload",
    "encode_payload",
    "to_json_value",
    "validate_encoded_payload",
]
