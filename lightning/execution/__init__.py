"""Where the algorithm and the runners of a job live, and how they are started, watched and stopped."""

from __future__ import annotations

from lightning.execution.base import (
    AlgorithmBundle,
    ExecutionError,
    ExecutionStrategy,
    RunnerBundle,
    worker_name,
)
from lightning.execution.client_server import ClientServerExecutionStrategy
from lightning.execution.events import ExecutionEvent, MultiprocessingEvent, ThreadingEvent
from lightning.execution.shared_memory import SharedMemoryExecutionStrategy

__all__ = [
    "AlgorithmBundle",
    "ClientServerExecutionStrategy",
    "ExecutionError",
    "ExecutionEvent",
    "ExecutionStrategy",
    "MultiprocessingEvent",
    "RunnerBundle",
    "SharedMemoryExecutionStrategy",
    "ThreadingEvent",
    "worker_name",
]
