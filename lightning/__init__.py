"""A gRPC control plane for agent training: one store, runners anywhere, ordered OpenTelemetry spans.

The public names. Each is loaded from its module when it is first used, so that `import lightning` is quick and a
process loads only what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning.environment import refuse_rival_package

if TYPE_CHECKING:
    from lightning.agents import Agent, rollout
    from lightning.execution import (
        ClientServerExecutionStrategy,
        ExecutionEvent,
        ExecutionStrategy,
        MultiprocessingEvent,
        SharedMemoryExecutionStrategy,
        ThreadingEvent,
    )
    from lightning.rpc import LightningStoreClient, LightningStoreServer
    from lightning.runner import AgentRunner, Hook, system_snapshot
    from lightning.store import (
        InMemoryLightningStore,
        LightningStore,
        LightningStoreThreaded,
        MongoLightningStore,
        SQLiteLightningStore,
    )
    from lightning.tracing import OtelTracer, emit_reward, find_final_reward
    from lightning.training import Adapter, Algorithm, TraceToMessages, TraceToTriplets, Trainer, Triplet
    from lightning.types import (
        LLM,
        UNSET,
        Attempt,
        AttemptedRollout,
        EnqueueRolloutRequest,
        Event,
        Link,
        NamedResources,
        OtelResource,
        PaginatedResult,
        PromptTemplate,
        Resource,
        ResourcesUpdate,
        Rollout,
        RolloutConfig,
        Span,
        SpanContext,
        TraceStatus,
        Worker,
    )

__all__ = [
    "LLM",
    "UNSET",
    "Adapter",
    "Agent",
    "AgentRunner",
    "Algorithm",
    "Attempt",
    "AttemptedRollout",
    "ClientServerExecutionStrategy",
    "EnqueueRolloutRequest",
    "Event",
    "ExecutionEvent",
    "ExecutionStrategy",
    "Hook",
    "InMemoryLightningStore",
    "LightningStore",
    "LightningStoreClient",
    "LightningStoreServer",
    "LightningStoreThreaded",
    "Link",
    "MongoLightningStore",
    "MultiprocessingEvent",
    "NamedResources",
    "OtelResource",
    "OtelTracer",
    "PaginatedResult",
    "PromptTemplate",
    "Resource",
    "ResourcesUpdate",
    "Rollout",
    "RolloutConfig",
    "SQLiteLightningStore",
    "SharedMemoryExecutionStrategy",
    "Span",
    "SpanContext",
    "ThreadingEvent",
    "TraceStatus",
    "TraceToMessages",
    "TraceToTriplets",
    "Trainer",
    "Triplet",
    "Worker",
    "emit_reward",
    "find_final_reward",
    "rollout",
    "system_snapshot",
]

_HOMES = {
    "agents": ("Agent", "rollout"),
    "execution": (
        "ClientServerExecutionStrategy",
        "ExecutionEvent",
        "ExecutionStrategy",
        "MultiprocessingEvent",
        "SharedMemoryExecutionStrategy",
        "ThreadingEvent",
    ),
    "rpc": ("LightningStoreClient", "LightningStoreServer"),
    "runner": ("AgentRunner", "Hook", "system_snapshot"),
    "store": (
        "InMemoryLightningStore",
        "LightningStore",
        "LightningStoreThreaded",
        "MongoLightningStore",
        "SQLiteLightningStore",
    ),
    "tracing": ("OtelTracer", "emit_reward", "find_final_reward"),
    "training": ("Adapter", "Algorithm", "TraceToMessages", "TraceToTriplets", "Trainer", "Triplet"),
}
"""The module under `lightning` that a name comes from; those not listed come from `types`."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

refuse_rival_package()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lightning' has no attribute {name!r}")
    value = getattr(import_module(f"lightning.{_HOME_OF.get(name, 'types')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
